"""The laws of beam search on a toy: brute force, greedy, paging inside the loop, running out, what a step may cost."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxattn as pax
from paxattn.decoding import beam
from paxattn.decoding.expand import top_k
from tests.toys import Toy, assert_same, prompts, tokens_of

TOY = Toy.create()
LENGTHS, NEW, BEAMS = (1, 6, 9), 8, 4
EOS = (11, 20)


def begin(block_size=3, num_blocks=60, **options):
    options = {"num_beams": BEAMS, "max_new_tokens": NEW, "eos_token_id": EOS, **options}
    return beam.begin(TOY, *prompts(LENGTHS), block_size=block_size, num_blocks=num_blocks, **options)


branch = jax.jit(lambda search: beam.branch(TOY, search, budget=7))
advance = jax.jit(lambda search, steps: beam.advance(TOY, search, steps=steps))


def results(search):
    return beam.finish(search, num_return_sequences=BEAMS, width=NEW)


def sequences(result):
    """[[(tokens, score)]], empty places left out."""
    beams = zip(result.token_ids.tolist(), result.length.tolist(), result.score.tolist(), strict=True)
    return [[(tuple(t[:n]), s) for t, n, s in zip(*prompt, strict=True) if n] for prompt in beams]


def path(search, taken=None):
    """Every state of a run, one step at a time; `taken` blocks are somebody else's."""
    if taken is not None:
        table = search.rows.cache.table
        table = dataclasses.replace(table, blocks=pax.Blocks(taken.astype(jnp.int32)))
        search = dataclasses.replace(
            search, rows=dataclasses.replace(search.rows, cache=pax.Cache(table, search.rows.cache.layers))
        )
    states = [branch(search)]
    while states[-1].rows.running.any():
        states.append(advance(states[-1], 1))
    return states


@functools.cache
def baseline():
    return path(begin())


class Small:
    """The toy with its vocabulary cut to 4 tokens, so that all sequences can be listed."""

    vocab_size, cache_spec = 4, Toy.cache_spec

    def __call__(self, tokens, plan, layers):
        return TOY(tokens, plan, layers)

    def logits(self, hidden):
        return TOY.logits(hidden)[:, :4]


def every_sequence(new, eos):
    for n in range(1, new + 1):
        for tokens in itertools.product(range(4), repeat=n):
            if eos not in tokens[:-1] and (tokens[-1] == eos or n == new):
                yield tokens


@jax.jit
def wide(ids, penalty):
    return pax.beam_search(Small(), ids, jnp.array([4]), num_beams=48, num_return_sequences=40, max_new_tokens=3,
                           length_penalty=penalty, early_stopping=False, eos_token_id=3, block_size=2)  # fmt: skip


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0])
def test_a_wide_search_is_brute_force(penalty):
    """With a beam for every sequence the search is exhaustive: 4 tokens, one of them eos, at most 3 new ones."""
    small, eos, ids = Small(), 3, [2, 1, 0, 1]
    listed = list(every_sequence(3, eos))
    found = wide(jnp.array([ids]), penalty)
    fed = jnp.array([[*ids, *tokens, 0, 0][:7] for tokens in listed])
    cache = pax.Cache.create(TOY.cache_spec, num_blocks=99, block_size=7, max_num_seqs=len(listed), max_model_len=7)
    cache, plan, _ = pax.extend(cache, jnp.full(len(listed), 7), budget=fed.size)
    logprob = jax.nn.log_softmax(small.logits(small(fed.ravel(), plan, cache.layers)[0])).reshape(len(listed), 7, 4)
    score = {
        tokens: sum(float(logprob[i, 3 + j, t]) for j, t in enumerate(tokens)) / len(tokens) ** penalty
        for i, tokens in enumerate(listed)
    }
    (got,) = sequences(found)
    assert len(got) == len(listed)
    assert [t for t, _ in got] == sorted(listed, key=lambda tokens: -score[tokens])
    # Programs of other shapes add in another order: 7e-6 of a score apart on one kind of CPU, 3e-6 on another.
    np.testing.assert_allclose([s for _, s in got], [score[t] for t, _ in got], rtol=1e-5, atol=1e-5)


class Markov:
    """The next token depends on the last one alone: a search over it can be written down with lists."""

    vocab_size, cache_spec = 12, pax.CacheSpec(0, 1, 1, jnp.float32)
    logprob = np.asarray(jax.nn.log_softmax(2.5 * jax.random.normal(jax.random.key(2), (12, 12))))

    def __call__(self, tokens, plan, layers):
        return jnp.asarray(self.logprob)[tokens], layers

    def logits(self, hidden):
        return hidden


def with_lists(last, k, new, eos, penalty, early):
    """Hugging Face's rule for one prompt that ends in token `last`: [(tokens, score)], best first."""
    live, ended = [((), 0.0)], []
    for length in range(1, new + 1):
        grown = [((*t, v), s + p) for t, s in live for v, p in enumerate(Markov.logprob[(last, *t)[-1]].tolist())]
        best = sorted(grown, key=lambda c: -c[1])[: (1 + len(eos)) * k]
        ends = [tokens[-1] in eos or length == new for tokens, _ in best]
        ended += [(t, s / length**penalty) for (t, s), e in zip(best[:k], ends, strict=False) if e]
        ended = sorted(ended, key=lambda c: -c[1])[:k]
        live = [c for c, e in zip(best, ends, strict=True) if not e][:k]
        far = new if early == "never" and penalty > 0 else length
        if length == new or (len(ended) == k and (early is True or live[0][1] / far**penalty <= ended[-1][1])):
            return ended


@pytest.mark.parametrize("early", [False, True, "never"])
def test_the_rule_written_with_lists(early):
    """Every last token as a prompt, all in one batch, however early each of them ends."""

    @jax.jit
    def found(penalty):
        return pax.beam_search(
            Markov(), jnp.arange(12)[:, None], jnp.ones(12, jnp.int32), num_beams=3, num_return_sequences=3,
            max_new_tokens=7, length_penalty=penalty, early_stopping=early, eos_token_id=(0, 5), block_size=2,
        )  # fmt: skip

    for penalty in (-1.0, 0.0, 1.0, 2.0):
        for last, got in enumerate(sequences(found(penalty))):
            want = with_lists(last, 3, 7, (0, 5), penalty, early)
            assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want]
            np.testing.assert_allclose([s for _, s in got], [s for _, s in want], rtol=1e-5)


def test_one_beam_is_greedy():
    options = {"max_new_tokens": NEW, "eos_token_id": EOS, "block_size": 3}
    greedy = jax.jit(lambda *p: pax.generate(TOY, *p, max_model_len=32, **options))(*prompts(LENGTHS))
    single = jax.jit(lambda *p: pax.beam_search(TOY, *p, num_beams=1, **options))(*prompts(LENGTHS))
    assert [[list(tokens) for tokens, _ in s] for s in sequences(single)] == [[t] for t in tokens_of(greedy)]
    np.testing.assert_allclose(single.logprobs[:, 0], greedy.logprobs, atol=1e-5)
    assert (single.finish_reason[:, 0] == greedy.finish_reason).all()


def test_the_table_is_sound_at_every_step():
    """And the run meets what it should: shared parents, all beams from one, ends inside and on the edge of a block."""
    parents, ended = set(), set()
    for before, after in itertools.pairwise(baseline()):
        table = after.rows.cache.table
        assert not any(pax.violations(table).values())
        assert (table.length == jnp.where(after.rows.running, after.rows.known - 1, 0)).all()
        copied = int(after.rows.stats.blocks_copied - before.rows.stats.blocks_copied)
        assert copied <= after.rows.known.size, "at most one copy a beam and step"
        for prompt in np.asarray(table.pages).reshape(len(LENGTHS), BEAMS, -1):
            if prompt.any():
                parents.add(len(np.unique(prompt, axis=0)))
        alive = np.asarray(after.ended.finish) == pax.Finish.STOP
        ended |= set((np.asarray(after.ended.length)[alive] % 3).tolist())
    assert {1, 2} <= parents, "beams that share everything"
    assert {0, 1} <= ended, "hypotheses that end on a block's edge, and inside"
    last = baseline()[-1].rows
    assert int(last.cache.table.blocks.num_used) == 0
    assert int(last.stats.blocks_allocated) == int(last.stats.blocks_freed)


def test_block_size_is_unobservable():
    want = sequences(results(baseline()[-1]))
    again = advance(branch(begin(block_size=1, num_blocks=200)), 99)
    assert_same(sequences(results(again)), want)


@pytest.mark.parametrize("seed", range(3))
def test_block_names_are_unobservable(seed):
    taken = jnp.asarray(np.random.default_rng(seed).random(60) < 0.3).at[0].set(False)
    assert_same(sequences(results(path(begin(), taken)[-1])), sequences(results(baseline()[-1])))


def test_garbage_is_unobservable():
    search = begin()
    poisoned = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.ndim == 4 else x, search)
    assert_same(sequences(results(advance(branch(poisoned), 99))), sequences(results(baseline()[-1])))


def test_the_default_pool_is_enough():
    """Sized for shared prompts: less than a whole row a beam."""
    for lengths in ((1, 1), (6, 9), (9, 9), (7, 8)):
        ids, length = prompts(lengths, width=9)
        result = default_pool(ids, length)
        assert pax.Status(int(result.status)) is pax.Status.OK
        assert result.cache.table.blocks.refcount.size < 1 + 2 * BEAMS * -(-(9 + 2) // 2)


@jax.jit
def default_pool(ids, length):
    return pax.beam_search(TOY, ids, length, num_beams=BEAMS, max_new_tokens=2, block_size=2)


@pytest.mark.parametrize("room", range(4, 40, 3))
def test_running_out_keeps_what_has_ended(room):
    """Mid-search, at a reorder: a status, and the hypotheses of the step before are those of the unbounded run."""
    states = path(begin(), jnp.arange(60) > room)
    rows = states[-1].rows
    assert (rows.cache.table.blocks.refcount == (jnp.arange(60) > room)).all(), "nothing leaks"
    out = pax.Status(int(rows.status)) is pax.Status.OUT_OF_BLOCKS
    assert out == (room < int(baseline()[-1].rows.stats.blocks_peak))
    if len(states) > out:  # else the prompts did not fit
        same = baseline()[len(states) - 1 - out]
        jax.tree.map(np.testing.assert_array_equal, states[-1].ended, same.ended)
    if out:
        assert (results(states[-1]).finish_reason == pax.Finish.OUT_OF_BLOCKS).any()


def test_nan_ends_that_prompt_only():
    search = begin()
    states = [branch(search)]
    table = states[0].rows.cache.table
    own = int(table.pages[BEAMS, 0])  # the first block of prompt 1, which all its beams share
    sick = jax.tree.map(lambda x: x.at[own].set(jnp.nan) if x.ndim == 4 else x, states[0])
    end = advance(sick, 99)
    result, want = results(end), sequences(results(baseline()[-1]))
    got = sequences(result)
    assert_same([got[0], got[2]], [want[0], want[2]])
    assert (result.finish_reason[1] == pax.Finish.NOT_FINITE).any()
    assert int(end.rows.cache.table.blocks.num_used) == 0


def test_the_sum_of_logprobs_is_the_score():
    result = results(advance(branch(begin(length_penalty=0.5)), 99))
    total = result.logprobs.sum(axis=-1) / jnp.maximum(result.length, 1) ** 0.5
    np.testing.assert_allclose(jnp.where(result.length > 0, total, result.score), result.score, rtol=1e-5)


@pytest.mark.parametrize("n", [2000, 4096])
def test_top_k_of_long_rows_is_the_plain_one(n):
    """Ties and minus infinities included."""
    score = np.random.default_rng(n).integers(0, 40, (3, n)).astype(np.float32)
    score[1] = -np.inf
    score[1, [5, 700, 1999]] = 1, 2, 1
    for got, want in zip(top_k(jnp.asarray(score), 6), jax.lax.top_k(score, 6), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_search_moves_no_pool():
    search = begin(num_blocks=20_000)
    pool = search.rows.cache.layers[0].k.nbytes
    for step in (lambda s: beam.advance(TOY, s), lambda s: beam.branch(TOY, s, budget=7)):
        memory = jax.jit(step, donate_argnums=0).lower(search).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= 4 * pool
        assert memory.temp_size_in_bytes < pool / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 3}, r"num_return_sequences is 3.*num_beams = 2"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"early_stopping": "maybe"}, "early_stopping is 'maybe'"),
        ({"early_stopping": 1}, "early_stopping is 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_blocks": 2, "block_size": 2}, "the pool has 1"),
    ],
)
def test_bad_input_is_refused(options, message):
    options = {"num_beams": 2, "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=message):
        pax.beam_search(TOY, jnp.array([[1, 2, 3]]), jnp.array([3]), **options)
