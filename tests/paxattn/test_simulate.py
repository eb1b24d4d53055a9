"""The simulator does to a page table what serving does, and the ways that it is compared with are what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxattn as pax
from paxattn.serving import widths
from paxattn.serving.policy import highest_priority, shortest_prompt
from paxattn.serving.trace import COLUMNS
from paxattn.simulate import branch, draw_lengths, reserve, simulate
from tests.toys import Chain, prompts

LENGTHS, STEPS, LINES = (1, 5, 16, 17, 40, 3, 9, 22, 2, 30), 256, 10
ANSWERS = np.array([3, 20, 1, 12, 9, 20, 14, 2, 17, 8], np.int32)
ARRIVAL = np.array([0, 0, 0, 9, 3, 40, 40, 41, 200, 0], np.int32)
PRIORITY = np.arange(LINES, dtype=np.int32) % 4
SIZES = {"max_num_seqs": 3, "max_model_len": 64}
SETTINGS = {
    "first": {"block_size": 3, "num_blocks": 24, "policy": pax.Policy()},
    "priority": {"block_size": 1, "num_blocks": 60, "policy": pax.Policy(shortest_prompt, highest_priority, 0.1)},
    "two axes": {"block_size": 3, "num_blocks": 24, "policy": pax.Policy(), "max_num_batched_tokens": 64},
}


@functools.partial(jax.jit, static_argnames=("block_size", "num_blocks", "max_num_batched_tokens"))
def simulated(prompt, answer, policy, **options):
    return simulate(prompt, answer, steps=STEPS, policy=policy, arrival=ARRIVAL, priority=PRIORITY, **SIZES, **options)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_trace_is_that_of_serving(monkeypatch, name):
    """Column by column and step by step, with preemptions, waiting and idle time in it."""
    monkeypatch.setattr(widths, "LEAST_WIDTH", 1)
    setting = {"max_num_batched_tokens": 19} | SETTINGS[name]
    ids, length = prompts(LENGTHS)
    requests = pax.Requests.create(ids, length, max_new_tokens=ANSWERS, arrival=ARRIVAL, priority=PRIORITY)
    serve = jax.jit(lambda r: pax.serve(Chain(jnp.int32(7)), r, trace=STEPS, **SIZES, **setting))
    served, sim = serve(requests), simulated(length, ANSWERS, **setting)
    steps = int(served.stats.steps)
    assert sim.use.ended
    assert int(sim.use.steps) == steps < STEPS
    for column, want, got in zip(COLUMNS, served.trace[:steps].T, sim.trace[:steps].T, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=column)
    for field in ("preemptions", "times", "finish"):
        want = served.finish_reason if field == "finish" else getattr(served, field)
        jax.tree.map(np.testing.assert_array_equal, getattr(sim, field), want)
    if name == "first":
        assert int(sim.preemptions.sum()) > 0
        assert int(sim.trace[:, COLUMNS.index("waiting")].max()) > 0


def test_a_request_that_never_fits_is_refused():
    sizes = {"block_size": 3, "num_blocks": 9, "max_num_seqs": 1, "max_model_len": 32, "max_num_batched_tokens": 9}
    sim = simulate(np.array([30, 5, 24, 4]), np.array([9, 0, 2, 9]), steps=32, **sizes)
    assert [pax.Finish(int(f)).label for f in sim.finish] == [*3 * ["out_of_blocks"], "length"]


def test_a_budget_that_serving_refuses_is_refused():
    sizes = {"block_size": 4, "num_blocks": 40, "max_num_seqs": 4, "max_model_len": 16, "max_num_batched_tokens": 2}
    with pytest.raises(ValueError, match="max_num_batched_tokens is 2, must be at least max_num_seqs = 4"):
        simulate(np.ones(4, int), np.full(4, 4), steps=6, **sizes)


def test_two_thousand_pools_at_once_are_two_thousand_pools():
    """vmap over draws of lengths and over the watermark, which is a value: one program."""
    pools, rng = 2048, np.random.default_rng(0)
    prompt, answer = rng.integers(1, 9, (2, pools, 6)).astype(np.int32)
    watermark = np.linspace(0, 1, pools, dtype=np.float32)
    sizes = {"steps": 64, "num_blocks": 12, "block_size": 2, "max_num_seqs": 3, "max_model_len": 16}

    def one(prompt, answer, watermark):
        return simulate(prompt, answer, policy=pax.Policy(watermark=watermark), max_num_batched_tokens=8, **sizes)

    many = jax.jit(jax.vmap(one))(prompt, answer, watermark)
    assert many.use.ended.all()
    assert (many.finish == pax.Finish.LENGTH).all()
    alone = jax.jit(one)
    for i in (0, 1, 700, 2047):
        want = alone(prompt[i], answer[i], watermark[i])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, i=i: x[i], many), want)
    preempted = np.asarray(many.preemptions.sum(axis=1))
    assert preempted[:512].sum() > preempted[-512:].sum() == 0, "a pool that admits for the whole life preempts nobody"


def reserved_in_python(reserved, prompt, answer, tokens, rows):
    """The same rule with lists: [reserved, live, rows, somebody waits] a step."""
    waiting, live, use = 0, [], []
    while waiting < len(reserved) or live:
        room = tokens - sum(reserved[r] for r, _ in live)
        while waiting < len(reserved) and len(live) < rows and reserved[waiting] <= room:
            room -= reserved[waiting]
            live.append([waiting, prompt[waiting]])
            waiting += 1
        taken = sum(reserved[r] for r, _ in live), sum(held for _, held in live)
        use.append((*taken, len(live), waiting < len(reserved)))
        live = [[r, held + 1] for r, held in live if held + 1 < prompt[r] + answer[r]]
    return np.array(use)


@pytest.mark.parametrize("way", ["longest", "oracle"])
def test_reserved_memory_is_the_rule_with_lists(way):
    prompt, answer = draw_lengths("alpaca", 50, longest=100)
    reserved = np.full(50, 200, np.int32) if way == "longest" else prompt + answer
    use = jax.jit(lambda r: reserve(prompt, answer, r, steps=2048, pool_tokens=900, max_num_seqs=7))(reserved)
    want = reserved_in_python(reserved, prompt, answer, 900, 7)
    assert use.ended
    assert int(use.steps) == len(want)
    for got, column in zip((use.reserved, use.live, use.rows, use.waiting), want.T, strict=True):
        np.testing.assert_array_equal(got[: len(want)], column)
    busy = want[want[:, 3] > 0]
    np.testing.assert_allclose(use.wasted, 1 - busy[:, 1].sum() / busy[:, 0].sum(), rtol=1e-5)
    np.testing.assert_allclose(use.requests_at_once, busy[:, 2].mean(), rtol=1e-5)


def test_branches_share_what_arithmetic_says():
    """n rows of one prompt: its whole blocks once, a tail a row; rows that follow one row share all but tails."""
    prompt, answer, size = 10, 5, 4
    sizes = {"steps": 8, "block_size": size, "max_model_len": 32}
    go = jax.jit(lambda parents: branch(jnp.int32(prompt), jnp.int32(answer), parents, **sizes))
    samples, copied, faults = go(jnp.arange(3)[None])
    pages = [-(-(prompt + i) // size) for i in range(1, answer + 1)]
    assert int(faults) == 0
    assert int(copied) == 2  # the last holder keeps the original
    assert int(samples.unshared) == 3 * sum(pages)
    assert int(samples.held) == sum(2 + 3 * (p - 2) for p in pages)
    beams, _, faults = go(jnp.zeros((1, 3), jnp.int32))
    assert int(faults) == 0
    assert int(beams.held) == sum(p - 1 + 3 for p in pages)


def test_lengths_are_the_papers_on_average_and_named_ones_only():
    prompt, answer = draw_lengths("sharegpt", 20_000, longest=10**6)
    np.testing.assert_allclose([prompt.mean(), answer.mean()], (161, 338), rtol=0.05)
    with pytest.raises(ValueError, match="'gsm8k' is unknown; choose one of sharegpt, alpaca"):
        draw_lengths("gsm8k", 3)
