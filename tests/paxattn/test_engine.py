"""The engine: requests that come and go while others are served, cancelled anywhere, streamed, counted."""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxattn as pax
from tests.toys import VOCAB, Chain

CHAIN = Chain(jnp.int32(7))
RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(0, VOCAB, n).tolist() for n in (3, 17, 1, 30, 8, 5, 25, 2)]
NEW = 10


def engine(steps=3, **options):
    """Two rows, four lines, a pool that forces preemption: the same shapes everywhere, compiled once."""
    sizes = {"max_num_seqs": 2, "max_model_len": 48, "block_size": 4, "num_blocks": 13, "max_num_batched_tokens": 6}
    return pax.Engine(CHAIN, **{**sizes, "steps": steps, **options})


def submit_all(it, **options):
    return [it.submit(prompt, max_new_tokens=NEW, **options) for prompt in PROMPTS]


def assert_idle(it):
    """Everything is over and given back."""
    assert not it.busy
    assert not it.step()
    table = it.service.cache.table
    assert int(table.blocks.num_used) == 0
    assert not any(pax.violations(table).values())
    assert int(it.service.stats.blocks_allocated) == int(it.service.stats.blocks_freed)


def expected(prompt, new=NEW):
    return CHAIN.answer(prompt, new)


@pytest.mark.parametrize("steps", [1, 3])
def test_requests_may_come_while_others_are_served(steps):
    it = engine(steps)
    answers = submit_all(it)
    for _ in range(4):
        it.step()
    answers += submit_all(it)
    it.run()
    assert [a.token_ids for a in answers] == [expected(p) for p in PROMPTS] * 2
    assert {a.finish_reason for a in answers} == {"length"}
    assert all(len(a.logprobs) == NEW for a in answers)
    assert_idle(it)
    late = it.submit(PROMPTS[0], max_new_tokens=4)  # after idle time
    it.run()
    assert late.token_ids == expected(PROMPTS[0], 4)
    assert_idle(it)


def test_without_requests_there_is_nothing_to_do():
    it = engine()
    it.run()
    assert_idle(it)
    assert it.metrics()["steps"] == 0


def test_cancel_anywhere():
    it = engine()
    answers = submit_all(it)
    backlog, twice = answers[7], answers[6]
    assert it.cancel(backlog)  # before it got anywhere
    assert it.cancel(twice)
    assert not it.cancel(twice)
    it.step()
    assert answers[0].token_ids
    assert not answers[1].token_ids
    assert it.cancel(answers[1])  # its prompt of 17 is being fed, 5 tokens a step
    assert it.cancel(answers[0])  # it decodes
    assert it.cancel(answers[2])  # it waits in a line of the device
    it.step()
    seen = list(answers[0].token_ids)
    it.run()
    assert not it.cancel(answers[3])  # after its end
    assert answers[0].token_ids == seen == expected(PROMPTS[0])[: len(seen)]
    for r, answer in enumerate(answers):
        gone = r in (0, 1, 2, 6, 7)
        assert answer.finish_reason == ("cancelled" if gone else "length")
        assert gone or answer.token_ids == expected(PROMPTS[r])
    assert_idle(it)


def test_cancel_from_a_callback_and_everything_at_once():
    it = engine()
    calls = []

    def stop_at_four(answer):
        calls.append(answer)
        if len(answer.token_ids) >= 4:
            it.cancel(answer, pax.Finish.STOP)

    answers = submit_all(it, on_tokens=stop_at_four)
    it.run()
    assert {a.finish_reason for a in answers} == {"stop"}
    assert all(4 <= len(a.token_ids) < NEW for a in answers)
    assert set(calls) == set(answers)
    answers = submit_all(it)
    it.step()
    assert all(it.cancel(answer) for answer in answers)
    it.step()
    assert_idle(it)


def test_a_line_is_not_given_away_while_its_cancelled_request_still_sits():
    """A cancel that comes while a chunk runs reaches the device before the line is written again."""
    it = engine()
    first, *others = submit_all(it)
    read = it._read

    def cancel_meanwhile(line, answer, news):
        if answer is first and answer.finish_reason is None:
            it.cancel(first)
        return read(line, answer, news)

    it._read = cancel_meanwhile
    it.step()
    it.run()
    assert first.token_ids == []
    assert [a.token_ids for a in others] == [expected(p) for p in PROMPTS[1:]]
    assert_idle(it)


def test_streams_run_the_engine_for_all():
    it = engine()
    answers = submit_all(it)
    assert list(it.stream(answers[1])) == expected(PROMPTS[1])
    assert list(it.stream(answers[1])) == expected(PROMPTS[1]), "an answer may be read again"
    it.cancel(answers[5])
    assert list(it.stream(answers[5])) == answers[5].token_ids
    with pytest.raises(ValueError, match="another engine"):
        list(engine().stream(answers[7]))

    async def read(prompt):
        answer = it.submit(prompt, max_new_tokens=NEW)
        return [token async for token in it.astream(answer)]

    async def read_all():
        return await asyncio.gather(*map(read, PROMPTS))

    assert asyncio.run(read_all()) == [expected(p) for p in PROMPTS]
    it.run()
    assert_idle(it)


def test_metrics_add_up():
    it = engine()
    answers = submit_all(it)
    assert it.metrics()["waiting"] == len(PROMPTS)
    it.step()
    now = it.metrics()
    assert (now["running"], now["waiting"], now["ended"]) == (2, 6, 0)
    assert 0 < now["occupancy"] <= 1
    assert now["blocks_used"] == int(it.service.cache.table.blocks.num_used)
    it.run()
    end = it.metrics()
    assert end["output_tokens"] == sum(len(a.token_ids) for a in answers) == NEW * len(PROMPTS)
    assert (end["running"], end["waiting"], end["ended"], end["occupancy"]) == (0, 0, 8, 0)
    assert end["preemptions"] > 0
    assert end["steps"] == int(it.service.stats.steps)
    assert min(end["tokens_per_s"], end["time_to_first_token"], end["time_per_token"]) > 0
    assert all(a.submitted < a.first_token <= a.ended for a in answers)


def test_a_key_makes_a_sample():
    it = engine()
    key, knobs = jax.random.key(9), {"temperature": 2.0, "max_new_tokens": NEW}
    one, two, other = (it.submit(PROMPTS[0], key=k, **knobs) for k in (key, key, None))
    it.run()
    assert one.token_ids == two.token_ids != other.token_ids


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt_length is 0; a prompt cannot be empty"),
        ([1] * 40, {}, r"prompt \+ max_new_tokens is 50; a row holds max_model_len = 48"),
        ([1] * 60, {}, r"prompt \+ max_new_tokens is 70; a row holds max_model_len = 48"),
        ([VOCAB], {}, "a token id is 37"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"temperature": -1.0}, "temperature is -1"),
    ],
)
def test_bad_requests_are_refused_at_submission(prompt, options, message):
    it = engine()
    with pytest.raises(ValueError, match=message):
        it.submit(prompt, **{"max_new_tokens": NEW, **options})
    assert_idle(it)


def test_a_request_that_could_never_finish_is_refused():
    it = engine(num_blocks=9)
    with pytest.raises(ValueError, match="may need 9 blocks of 4 tokens; the pool has 8 to hand out"):
        it.submit([1] * 25, max_new_tokens=10)
    with pytest.raises(TypeError, match="num_beams"):
        it.submit([1], max_new_tokens=1, num_beams=2)


@pytest.mark.parametrize("option", [{"steps": 0}, {"max_num_requests": 0}, {"max_num_batched_tokens": 1}])
def test_bad_sizes_are_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is {next(iter(option.values()))}"):
        engine(**option)
