"""The engine: requests that come and go while others are served, cancelled anywhere, streamed, counted."""

import asyncio
import gc
import itertools
import statistics
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxattn as pax
from paxattn.serving import engine as module
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


def test_a_line_is_free_once_the_device_ended_it():
    """Whoever ended the answer, and even if nobody told the device."""
    it = engine()
    first, *others = submit_all(it)
    it.step()
    it.cancel(first)
    it._leaving.clear()
    it.run()
    assert not any(it._lines)
    assert [a.token_ids for a in others] == [expected(p) for p in PROMPTS[1:]]
    assert_idle(it)


def while_a_chunk_runs(it, do):
    """Calls `do` in another thread while each chunk runs, and waits for it."""
    chunk = it._programs.chunk

    def running(*given, **options):
        out = chunk(*given, **options)
        thread = threading.Thread(target=do)
        thread.start()
        thread.join()
        return out

    it._programs = it._programs._replace(chunk=running)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_ends_when_its_answer_is_cancelled_while_a_chunk_runs(asynchronous):
    it = engine()
    answer = it.submit(PROMPTS[0], max_new_tokens=NEW)
    while_a_chunk_runs(it, lambda: answer.token_ids and it.cancel(answer))

    async def read():
        return [token async for token in it.astream(answer)]

    seen = asyncio.run(read()) if asynchronous else list(it.stream(answer))
    assert seen == answer.token_ids == expected(PROMPTS[0])[: len(seen)]
    assert 0 < len(seen) < NEW
    assert answer.finish_reason == "cancelled"
    it.run()
    assert_idle(it)


def test_what_a_thread_notes_is_not_lost_in_a_turn():
    """A cancel is halfway through when the engine, in another thread, takes what was noted: it has to wait for it."""
    it = engine()
    answer = it.submit(PROMPTS[0], max_new_tokens=45)
    it.step()
    asked, stepper, lock = threading.Event(), threading.Thread(target=it.step), it._notes

    class Notes(dict):
        def __setitem__(self, *item):
            stepper.start()
            assert asked.wait(60)
            super().__setitem__(*item)

    class Gate:
        def __enter__(self):
            if threading.current_thread() is stepper:
                asked.set()
            lock.acquire()

        def __exit__(self, *_):
            lock.release()

    it._notes, it._leaving = Gate(), Notes()
    assert it.cancel(answer)
    stepper.join()
    it.run()
    assert int(it.service.queue.finish[0]) == pax.Finish.CANCELLED
    assert it.metrics()["ended"] == 1
    assert_idle(it)


def test_submit_and_cancel_leave_the_device_alone():
    it = engine()
    submit_all(it)
    key = jax.random.key(3)
    with jax.transfer_guard("disallow_explicit"):
        answer = it.submit(PROMPTS[0], max_new_tokens=NEW, temperature=0.5, key=key, top_k=3)
        other = it.submit(PROMPTS[0], max_new_tokens=NEW)
        it.cancel(answer)
    own, shared = ({type(x) for x in jax.tree.leaves(entry[1:])} for entry in list(it._backlog)[-2:])
    assert own == shared == {np.ndarray, type(key)}
    it.run()
    assert other.token_ids == expected(PROMPTS[0])


def test_streams_run_the_engine_for_all():
    it = engine()
    answers = submit_all(it)
    assert list(it.stream(answers[1])) == expected(PROMPTS[1])
    assert list(it.stream(answers[1])) == expected(PROMPTS[1]), "an answer may be read again"
    it.cancel(answers[5])
    assert list(it.stream(answers[5])) == answers[5].token_ids
    with pytest.raises(ValueError, match="another engine"):
        list(engine().stream(answers[7]))
    with pytest.raises(ValueError, match="another engine"):
        engine().cancel(answers[7])

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


def test_metrics_count_who_runs_and_who_waits_after_a_cancel():
    it = engine()
    answers = submit_all(it)[:2]
    it.step()
    assert all(map(it.cancel, answers))
    now = it.metrics()
    assert (now["running"], now["waiting"], now["ended"]) == (0, 6, 2)
    it.step()
    now = it.metrics()
    assert (now["running"], now["waiting"]) == (2, 4)
    for answer in (*it._unfinished,):
        it.cancel(answer)
    it.run()
    end = it.metrics()
    assert (end["running"], end["waiting"], end["ended"]) == (0, 0, 8)
    assert (end["blocks_used"], end["occupancy"]) == (0, 0)
    assert_idle(it)


def test_who_watches_is_told_the_end_once_and_is_forgotten(monkeypatch):
    monkeypatch.setattr(module, "LATEST", 3)
    it, ends = engine(), []

    def note(answer):
        if answer.finish_reason is not None:
            ends.append(id(answer))
        if answer is answers[0] and len(answer.token_ids) == 6:
            assert answers[1].token_ids  # the same chunk brought some
            it.cancel(answers[1])

    answers = submit_all(it, on_tokens=note)
    it.cancel(answers[7])  # in the backlog
    it.run()
    assert sorted(ends) == sorted(map(id, answers))
    last = [a for a in sorted(answers, key=lambda a: a.ended) if a.token_ids][-3:]
    now = it.metrics()
    assert now["ended"] == 8
    assert now["time_to_first_token"] == statistics.median(a.first_token - a.submitted for a in last)
    assert now["time_per_token"] == statistics.median((a.ended - a.first_token) / (NEW - 1) for a in last)
    gone = [weakref.ref(answer) for answer in answers]
    answers = last = None
    gc.collect()
    assert [ref() for ref in gone] == [None] * 8


def test_who_watches_and_raises_does_not_keep_others_from_being_told():
    it, told, raised = engine(), {}, []

    def note(answer):
        told[answer] = len(answer.token_ids)
        if not raised and sum(bool(a.token_ids) for a in answers) > 1:
            raised.append(answer)
            raise RuntimeError("of the one who watches")

    answers = submit_all(it, on_tokens=note)
    with pytest.raises(RuntimeError, match="of the one who watches"):
        it.run()
    assert told == {answer: len(answer.token_ids) for answer in answers if answer.token_ids}
    it.run()
    assert all(answer.token_ids == expected(answer.prompt_ids) for answer in answers)
    assert_idle(it)


def test_a_key_makes_a_sample():
    it = engine()
    key, knobs = jax.random.key(9), {"temperature": 2.0, "max_new_tokens": NEW}
    one, two, other = (it.submit(PROMPTS[0], key=k, **knobs) for k in (key, key, None))
    it.run()
    assert one.token_ids == two.token_ids != other.token_ids
    with pytest.raises(ValueError, match=r"key is key<fry> \(2,\), must be one key"):
        it.submit(PROMPTS[0], key=jax.random.split(key), **knobs)


def test_without_a_key_a_request_samples_with_its_number():
    """The numbers are those of the requests that were taken."""
    it, knobs = engine(seed=5), {"temperature": 2.0, "max_new_tokens": NEW}
    it.submit(PROMPTS[3], **knobs)  # number 0; so number i is not on line i
    it.run()
    numbered = []
    for prompt in PROMPTS[:3]:
        with pytest.raises(ValueError, match="prompt_length is 0"):
            it.submit([], **knobs)
        numbered.append(it.submit(prompt, **knobs))
    keys = (jax.random.fold_in(jax.random.key(5), i) for i in itertools.count(1))
    it.run()
    known = it._programs.enter._cache_size()
    keyed = [it.submit(prompt, key=key, **knobs) for prompt, key in zip(PROMPTS[:3], keys, strict=False)]
    it.run()
    assert [a.token_ids for a in numbered] == [a.token_ids for a in keyed]
    assert it._programs.enter._cache_size() == known


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
    with pytest.raises(ValueError, match=r"prompt \+ max_new_tokens is 2147483648; a row holds"):
        it.submit([1], max_new_tokens=2**31 - 1)
    with pytest.raises(TypeError, match="num_beams"):
        it.submit([1], max_new_tokens=1, num_beams=2)


@pytest.mark.parametrize("option", [{"steps": 0}, {"max_num_requests": 0}, {"max_num_batched_tokens": 1}])
def test_bad_sizes_are_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is {next(iter(option.values()))}"):
        engine(**option)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_model_len", "block_size"])
def test_sizes_of_nothing_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} is 0, must be at least 1"):
        pax.Engine(CHAIN, **{"max_num_seqs": 2, "max_model_len": 48, name: 0})
