"""Several rows a prompt: samples that share it, and trees of rows grown and pruned with `fork`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxattn as pax
from paxattn.decoding import step
from paxattn.decoding.sampling import sample_keys
from tests.toys import Toy, prompts, tokens_of

TOY = Toy.create()
LENGTHS, NEW, N, STEPS = (1, 5, 6, 17), 9, 3, 20


@functools.partial(jax.jit, static_argnames=("n", "block_size", "max_num_batched_tokens", "trace"))
def generate(ids, length, n=1, **options):
    options = {"block_size": 3, "temperature": jnp.full(len(ids), 0.9), "top_p": 0.95, **options}
    return pax.generate(TOY, ids, length, max_new_tokens=NEW, num_return_sequences=n, **options)


def keys(seed=4):
    return jax.random.split(jax.random.key(seed), len(LENGTHS))


@functools.cache
def shared():
    return generate(*prompts(LENGTHS), n=N, key=keys(), trace=STEPS)


def test_samples_that_share_a_prompt_are_independent_runs():
    ids, length = prompts(LENGTHS)
    alone = generate(jnp.repeat(ids, N, axis=0), jnp.repeat(length, N), key=sample_keys(keys(), N))
    assert tokens_of(shared()) == tokens_of(alone)
    np.testing.assert_allclose(shared().logprobs, alone.logprobs, atol=1e-5)
    assert len({tuple(t) for t in tokens_of(shared())}) > 2 * len(LENGTHS)


def test_more_samples_change_none():
    few, many = (jax.random.key_data(sample_keys(keys(), n)).reshape(len(LENGTHS), n, -1) for n in (2, 5))
    assert (many[:, :2] == few).all()
    assert (few[:, 0] == jax.random.key_data(keys())).all(), "one sample is what it was without this option"
    assert len(np.unique(many.reshape(-1, many.shape[-1]), axis=0)) == 5 * len(LENGTHS)


def test_greedy_samples_are_identical_and_knobs_are_per_prompt():
    result = generate(*prompts(LENGTHS), n=N, temperature=jnp.array([0.0, 0.9, 0.0, 0.9]), key=keys())
    got = [tokens_of(result)[i : i + N] for i in range(0, len(LENGTHS) * N, N)]
    assert [len({tuple(t) for t in group}) for group in got] == [1, N, 1, N]
    assert got[1] == tokens_of(shared())[N : 2 * N]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_loop_of_its_own_for_the_plain_case_is_unobservable(monkeypatch, temperature):
    """Tails are shared at first, so that greedy rows start in the general loop and go over to the plain one."""
    ids, length = prompts(LENGTHS)
    options = {"max_new_tokens": NEW, "num_return_sequences": N, "block_size": 3, "temperature": temperature}
    got = []
    for waits in False, True:
        monkeypatch.setattr(step, "questions_wait", lambda waits=waits: waits)
        result = jax.jit(lambda ids: pax.generate(TOY, ids, length, key=keys(), **options))(ids)
        assert not any(pax.violations(result.cache.table).values())
        got.append((tokens_of(result), int(result.stats.steps), int(result.stats.blocks_copied)))
    assert got[0] == got[1]
    assert got[0][2] > 0


def test_block_size_and_chunking_are_unobservable():
    result = generate(*prompts(LENGTHS), n=N, block_size=16, max_num_batched_tokens=7, key=keys())
    assert tokens_of(result) == tokens_of(shared())
    assert not any(pax.violations(result.cache.table).values())


def test_a_prompt_is_fed_once_and_its_blocks_are_shared():
    stats = shared().stats
    assert int(stats.tokens_fed) == sum(LENGTHS) + len(LENGTHS) * N * (NEW - 1)
    whole = sum(n // 3 for n in LENGTHS)  # blocks that nobody writes again
    rest = sum(-(-(n + NEW - 1) // 3) - n // 3 for n in LENGTHS)
    assert int(stats.blocks_peak) == whole + N * rest
    assert int(stats.blocks_copied) == (N - 1) * sum(n % 3 > 0 for n in LENGTHS), "the last holder keeps the tail"
    assert int(stats.blocks_allocated) == int(stats.blocks_freed)
    assert shared().cache.table.blocks.refcount.size <= 1 + len(LENGTHS) * (17 // 3 + N * (NEW // 3 + 1))


def test_the_trace_of_sharing_adds_up():
    stats, trace = shared().stats, np.asarray(shared().trace)
    steps, rows = int(stats.steps), len(LENGTHS) * N
    held, common, unshared, copied = trace[:steps].T
    assert trace.shape == (STEPS, 4)
    assert not trace[steps:].any(), "as many lines as steps"
    totals = stats.block_steps_held, stats.block_steps_shared, stats.block_steps_unshared, stats.blocks_copied
    assert trace.sum(axis=0).tolist() == [int(total) for total in totals]
    assert held.max() == int(stats.blocks_peak)
    whole = sum(n // 3 for n in LENGTHS)
    assert common[-1] == whole, "tails have parted"
    assert unshared[-1] - held[-1] == (N - 1) * whole
    assert copied.max() <= rows
    assert generate(*prompts(LENGTHS), key=keys()).trace is None


def test_the_count_of_sharing_is_the_tables():
    table = pax.PageTable.create(num_blocks=30, block_size=2, max_num_seqs=4, max_model_len=12)
    assert float(pax.sharing(table).saving) == 0
    table, _, _ = pax.append(table, jnp.array([5, 0, 0, 3]))
    table, _, _ = pax.append(pax.fork(table, jnp.array([0, 0, 0, 3])), jnp.array([1, 1, 0, 0]))
    cells = [block for row in np.asarray(table.pages).tolist() for block in row if block]
    count = pax.sharing(table)
    assert (int(count.unshared), int(count.held)) == (len(cells), len(set(cells))) == (11, 7)
    assert int(count.shared) == len({block for block in cells if cells.count(block) > 1})
    assert float(count.saving) == pytest.approx(4 / 11)


def test_running_out_while_prompts_are_fed_ends_every_row():
    state = pax.start(TOY, *prompts(LENGTHS), max_new_tokens=NEW, num_return_sequences=2, num_blocks=8, block_size=3)
    state = jax.jit(lambda s: pax.fan_out(TOY, s, group=2, budget=10))(state)
    assert pax.Status(int(state.status)) is pax.Status.OUT_OF_BLOCKS
    assert (state.finish == pax.Finish.OUT_OF_BLOCKS).all()
    assert int(state.cache.table.blocks.num_used) == 0


@jax.jit
def think(cache, tokens, grows):
    """One thought: each row in `grows` is fed its token and gives its log-probabilities."""
    cache, plan, status = pax.extend(cache, grows.astype(jnp.int32), budget=tokens.size)
    hidden, layers = TOY(tokens[plan.row], plan, cache.layers)
    return pax.Cache(cache.table, layers), jax.nn.log_softmax(TOY.logits(hidden[plan.last])), status


def test_a_tree_of_thoughts_ends_with_the_pool_as_it_began():
    """Depth 5, branches of 3, the 2 best nodes kept: rows are nodes, a child forks its parent's row, losers are freed.

    The best leaf's score is that of the same tokens fed in one go, so sharing and pruning changed nothing.
    """
    rows, branches, kept, depth = 8, 3, 2, 5
    cache = pax.Cache.create(TOY.cache_spec, num_blocks=25, block_size=2, max_num_seqs=rows, max_model_len=12)
    empty = cache.table
    prompt = [7, 3, 30]
    for token in prompt:  # the root lives in row 0
        cache, logprob, _ = think(cache, jnp.full(rows, token), jnp.arange(rows) == 0)
    nodes = {0: (prompt, 0.0)}
    for level in range(depth):
        children = [
            (row, int(token), score + float(logprob[row, token]))
            for row, (_, score) in nodes.items()
            for token in jnp.argsort(-logprob[row])[:branches]
        ]
        parent = [row for row, _, _ in children] + [-1] * (rows - len(children))
        cache = pax.Cache(pax.fork(cache.table, jnp.array(parent)), cache.layers)
        held = pax.sharing(cache.table)
        assert level == 0 or 0 < float(held.saving) < 1
        tokens = jnp.array([token for _, token, _ in children] + [0] * (rows - len(children)))
        cache, logprob, status = think(cache, tokens, jnp.array(parent) >= 0)
        pax.check(status)
        grown = {row: (nodes[p][0] + [token], score) for row, (p, token, score) in enumerate(children)}
        nodes = dict(sorted(grown.items(), key=lambda node: -node[1][1])[:kept])
        lost = jnp.array([row not in nodes for row in range(rows)])
        cache = pax.Cache(pax.free(cache.table, lost), cache.layers)
        assert not any(pax.violations(cache.table).values())

    best, score = max(nodes.values(), key=lambda node: node[1])
    alone = jax.jit(lambda *p: pax.generate(TOY, *p, max_new_tokens=1))(jnp.array([best]), jnp.array([len(best)]))
    row = max(nodes, key=lambda r: nodes[r][1])
    assert int(alone.token_ids[0, 0]) == int(jnp.argmax(logprob[row]))
    np.testing.assert_allclose(alone.logprobs[0, 0], logprob[row].max(), rtol=1e-4)
    assert len(best) == len(prompt) + depth
    assert score < 0
    end = pax.free(cache.table, jnp.ones(rows, bool))
    jax.tree.map(np.testing.assert_array_equal, end, empty)
