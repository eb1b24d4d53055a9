"""The laws of speculation, on a toy: guesses are unobservable in the tokens, and leave nothing in the cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxattn as pax
from paxattn.decoding.speculative import advance, begin
from paxattn.typing import struct
from tests.toys import DIM, KV_HEADS, VOCAB, Toy, prompts, tokens_of

TOY = Toy.create()
LENGTHS, NEW, WIDTH = (1, 5, 16, 17, 40), 24, 64
ROWS, K = len(LENGTHS), 16
NO_EOS = (VOCAB, VOCAB)
# Many shapes, each run for milliseconds: compiling is what these tests cost.
QUICK = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


@struct
class Scripted:
    """Guesses the known answer, spoilt at some positions of the text or places of the guess."""

    answer: jax.Array  # [B, WIDTH]
    spoilt: jax.Array  # bool [B, WIDTH]
    places: jax.Array  # bool [K]
    cap: jax.Array  # tokens guessed at most

    def init(self, state, k):
        return ()

    def propose(self, carry, state, k):
        at = jnp.minimum(state.known[:, None] + jnp.arange(k), WIDTH - 1)
        right, spoilt = (jnp.take_along_axis(x, at, axis=1) for x in (self.answer, self.spoilt))
        guess = jnp.where(spoilt | self.places[:k], (right + 1) % VOCAB, right)
        return pax.Draft(guess, jnp.full(len(guess), jnp.minimum(self.cap, k)), None), carry

    def settle(self, carry, state):
        return carry


class Shallow(Toy):
    """The first layer of a toy: what self-speculation drafts with."""

    cache_spec = pax.CacheSpec(1, KV_HEADS, DIM, jnp.float32)


Shallow = struct(Shallow)
SHALLOW = Shallow(TOY.embed, TOY.head, TOY.qkv[:1], TOY.out[:1])
DRAFTERS = {
    "ngram": pax.NGram(2),
    "another model": pax.DraftModel(Toy.create(7)),
    "first layer": pax.DraftModel(SHALLOW),
    "the target": pax.DraftModel(TOY),
}


def started(limits=NEW, eos=NO_EOS, **options):
    return pax.start(TOY, *prompts(LENGTHS), max_new_tokens=jnp.broadcast_to(jnp.asarray(limits), (ROWS,)),
                     max_model_len=WIDTH, eos_token_id=eos, **options)  # fmt: skip


plainly = jax.jit(lambda state: pax.advance(TOY, state, budget=19))


@functools.cache
def plain():
    """The text of plain greedy decoding, prompts included."""
    return np.asarray(plainly(started()).tokens)


def baseline(row, limit=NEW, eos=()):
    new = plain()[row, LENGTHS[row] :][:limit].tolist()
    ends = [i for i, token in enumerate(new) if token in eos]
    return new[: ends[0] + 1] if ends else new


def scripted(spoilt=False, places=(), cap=K):
    mask = np.zeros(K, bool)
    mask[list(places)] = True
    return Scripted(jnp.asarray(plain()), jnp.broadcast_to(jnp.asarray(spoilt), (ROWS, WIDTH)), jnp.asarray(mask),
                    jnp.int32(cap))  # fmt: skip


def poisoned(cache):
    """NaN in every slot that no row owns."""
    table = cache.table
    at = jnp.arange(table.capacity)
    held = at < table.length[:, None]
    block = jnp.where(held, table.pages[:, at // table.block_size], table.blocks.refcount.size)
    owned = jnp.zeros((table.blocks.refcount.size, table.block_size), bool)
    owned = owned.at[block, at % table.block_size].set(True, mode="drop")[:, None, :, None]
    return pax.Cache(table, jax.tree.map(lambda pool: jnp.where(owned, pool, jnp.nan), cache.layers))


def is_cache(x):
    return isinstance(x, pax.Cache)


def complaints(state, taken):
    """Broken invariants of both caches, and rows that hold more than their known tokens but the last."""
    bad = jnp.int32(0)
    for cache in (x for x in jax.tree.leaves(state, is_leaf=is_cache) if is_cache(x)):
        table = cache.table
        if cache is state.cache:
            table = dataclasses.replace(table, blocks=pax.Blocks(table.blocks.refcount - taken))
        bad += sum(pax.violations(table).values())
        bad += jnp.sum(table.length > jnp.where(state.running, state.known - 1, 0))
    return bad


@functools.partial(jax.jit, static_argnames="k", compiler_options=QUICK)
def audited(drafter, state, k, taken):
    """Runs to the end, looking for complaints after each step and poisoning what nobody owns."""

    def body(carry):
        state, bad = carry
        state = advance(TOY, drafter, state, k=k, budget=19, steps=1)
        return jax.tree.map(lambda x: poisoned(x) if is_cache(x) else x, state, is_leaf=is_cache), bad + complaints(
            state, taken
        )

    return jax.lax.while_loop(lambda carry: carry[0].running.any(), body, (begin(drafter, state, k=k), jnp.int32(0)))


def check(drafter, state, k, limits=NEW, eos=()):
    """Tokens and reasons are those of plain decoding, the audit is clean, all blocks are back; gives the state."""
    state, bad = audited(drafter, state, k, jnp.zeros_like(state.cache.table.blocks.refcount))
    assert int(bad) == 0
    for row, limit in enumerate(np.broadcast_to(limits, ROWS)):
        want = baseline(row, limit, eos)
        got = state.tokens[row, LENGTHS[row] : int(state.known[row])].tolist()
        assert got == want, f"row {row}"
        reason = pax.Finish.STOP if want[-1] in eos else pax.Finish.LENGTH
        assert pax.Finish(int(state.finish[row])) is reason
    assert int(state.cache.table.blocks.num_used) == 0
    assert int(state.stats.blocks_allocated) == int(state.stats.blocks_freed)
    tally = state.tally
    plainly_fed = (
        state.known - 1 - tally.tokens
    )  # prompts, and tokens of rows that decoded beside the prompts of others
    assert int(state.stats.tokens_fed) == int(jnp.sum(plainly_fed + tally.steps + tally.drafted))
    assert (state.tally.accepted <= state.tally.drafted).all()
    assert (state.tally.blocks_rolled_back <= state.tally.blocks_reserved).all()
    return state


@pytest.mark.parametrize(("k", "block_size"), [(1, 3), (K, 1), (K, 2), (K, 3), (K, 16)])
def test_guesses_are_unobservable(k, block_size):
    """Always wrong, wrong at the last place, right, and right by chance, so that each row has its own number."""
    run = lambda drafter: check(drafter, started(block_size=block_size), k)  # noqa: E731
    wrong = run(scripted(spoilt=True))
    assert int(wrong.tally.accepted.sum()) == 0
    assert wrong.tally.steps.tolist() == wrong.tally.tokens.tolist()
    assert (wrong.tally.blocks_rolled_back == wrong.tally.blocks_reserved).all()
    right = run(scripted())
    assert (right.tally.accepted == right.tally.drafted).all()
    assert right.tally.steps.max() <= -(-NEW // (k + 1))
    assert not right.tally.blocks_rolled_back.any()
    run(scripted(places=[k - 1]))
    run(scripted(spoilt=np.random.default_rng(k).random((ROWS, WIDTH)) < 0.3))


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
def test_every_length_of_a_guess_is_unobservable(block_size):
    spoilt = np.random.default_rng(block_size).random((ROWS, WIDTH)) < 0.1
    for cap in range(K):
        check(scripted(spoilt, cap=cap), started(block_size=block_size), K)


@pytest.mark.parametrize(("name", "k", "block_size"), [*((name, 5, 3) for name in DRAFTERS), ("the target", 1, 16)])
def test_drafters_are_unobservable(name, k, block_size):
    state = check(DRAFTERS[name], started(block_size=block_size), k)
    if name == "the target":
        assert (state.tally.accepted == state.tally.drafted).all()


def test_rows_that_finish_in_one_step_and_limits_inside_a_run():
    state = check(scripted(), started(), K)
    assert state.tally.steps.max() == 2
    for limits in ([3, NEW, 1, 18, 2], [17, 17, 17, 17, 17], [18, 16, 2, 17, 1]):
        check(scripted(), started(limits, block_size=3), K, limits)
        check(DRAFTERS["first layer"], started(limits, block_size=3), 5, limits)


@pytest.mark.parametrize("at", [0, 1, 2, 7, 16, 17])
def test_eos_inside_an_accepted_run(at):
    for row in range(ROWS):
        eos = (baseline(row)[at], VOCAB)
        state = check(scripted(), started(eos=eos, block_size=3), K, eos=eos)
        assert int(state.tally.tokens.sum()) >= int(state.tally.accepted.sum())
        check(scripted(spoilt=True), started(eos=eos, block_size=3), K, eos=eos)


def test_running_out_shortens_guesses_and_ends_nothing_that_plain_decoding_finishes():
    """Blocks held by somebody else make the pool any size; rows that guess well must not starve those that do not."""
    limits = jnp.array([6, NEW, 2, 20, 13])
    some = np.zeros((ROWS, WIDTH), bool)
    some[::2] = True
    drafters = [scripted(), scripted(some), scripted(~some)]
    finished = short = 0
    for free in range(30, 60, 3):
        state = started(limits, block_size=3)
        size = state.cache.table.blocks.refcount.size
        taken = (jnp.arange(size) > free).astype(jnp.int32)
        table = dataclasses.replace(state.cache.table, blocks=pax.Blocks(taken))
        state = dataclasses.replace(state, cache=pax.Cache(table, state.cache.layers))
        want = plainly(state)
        for drafter in drafters:
            got, bad = audited(drafter, state, K, taken)
            assert int(bad) == 0
            assert (got.cache.table.blocks.refcount == taken).all()
            for row in range(ROWS):
                tokens, whole = (x.tokens[row, : int(x.known[row])].tolist() for x in (got, want))
                assert tokens[: len(whole)] == whole, "not a token less than plain decoding"
                assert tokens == plain()[row, : len(tokens)].tolist()
            assert bool((want.status == pax.Status.OK) <= (got.status == pax.Status.OK))
            short += int(want.status) != pax.Status.OK
            finished += int(want.status) == pax.Status.OK
    assert finished > 3 < short, "both happen"


def test_a_rolled_back_cache_is_that_of_a_run_which_never_guessed():
    """Bit for bit, each step: the shapes of both runs are the same, only the guesses are not."""
    go = jax.jit(lambda drafter, state: advance(TOY, drafter, state, k=7, budget=19, steps=1), compiler_options=QUICK)
    never, wrong = scripted(cap=0), scripted(spoilt=True)
    start = started(block_size=3)
    a, b = begin(never, start, k=7), begin(wrong, start, k=7)
    for _ in range(8 + NEW):
        a, b = go(never, a), go(wrong, b)
        same = jax.tree.map(lambda x, y: bool((x == y).all()), (a.tokens, a.logprobs, a.cache.table.length),
                            (b.tokens, b.logprobs, b.cache.table.length))  # fmt: skip
        assert all(jax.tree.leaves(same))
        assert int(a.cache.table.blocks.num_used) == int(b.cache.table.blocks.num_used)
        for layer in range(2):
            for x, y in zip(pax.view(a.cache, layer), pax.view(b.cache, layer), strict=True):
                assert (x == y).all()
    assert int(b.tally.drafted.sum()) > 0
    assert not a.running.any()


def test_a_guess_of_16_of_which_8_hold():
    """The chapter's example, by the numbers: blocks of 8, the cache at a block's edge."""
    ids, length = prompts((9,))
    state = pax.start(TOY, ids, length, max_new_tokens=NEW, max_model_len=WIDTH, block_size=8)
    answer = plainly(state).tokens
    spoilt = jnp.arange(WIDTH) >= 10 + 8  # the prompt and the token that its feeding gives are 10
    drafter = Scripted(answer, spoilt[None], jnp.zeros(K, bool), jnp.int32(K))
    go = jax.jit(lambda state: advance(TOY, drafter, state, k=K, budget=9, steps=1), compiler_options=QUICK)
    fed = go(begin(drafter, state, k=K))
    assert int(fed.cache.table.length[0]) == 9
    assert int(fed.cache.table.blocks.num_used) == 2
    after = go(fed)
    assert int(after.known[0]) == 10 + 8 + 1
    assert int(after.cache.table.length[0]) == 18
    assert int(after.cache.table.blocks.num_used) == 3
    assert {f: int(x[0]) for f, x in vars(after.tally).items()} == {
        "steps": 1, "tokens": 9, "drafted": 16, "accepted": 8, "blocks_reserved": 2, "blocks_rolled_back": 1,
    }  # fmt: skip


def test_nan_scores_end_that_row_only_and_what_held_before_is_kept():
    """A token whose keys, values and scores are NaN is guessed rightly: rows end where plain decoding ends them.

    In one tile of attention the value of a guess can reach the queries before it as 0 * NaN.
    """
    new = baseline(1)
    sick = next(token for i, token in enumerate(new) if i > 2 and token not in new[:i])
    toy = Toy(TOY.embed.at[sick, 0].set(jnp.nan), TOY.head, TOY.qkv, TOY.out)
    ids, length = prompts(LENGTHS)
    clean = [row for row in range(ROWS) if sick not in ids[row, : LENGTHS[row]]]

    def run(decode):
        state = pax.start(toy, ids, length, max_new_tokens=NEW, max_model_len=WIDTH, block_size=3)
        return jax.jit(decode, compiler_options=QUICK)(state)

    drafter = scripted()
    want = run(lambda state: pax.advance(toy, state, budget=19))
    got = run(lambda state: advance(toy, drafter, begin(drafter, state, k=4), k=4, budget=19))
    assert pax.Finish(int(got.finish[1])) is pax.Finish.NOT_FINITE
    assert got.finish.tolist() == want.finish.tolist()
    assert 1 in clean
    for row in clean:
        assert int(got.known[row]) == int(want.known[row])
        assert got.tokens[row, : int(got.known[row])].tolist() == want.tokens[row, : int(want.known[row])].tolist()
    assert int(got.cache.table.blocks.num_used) == 0


def test_a_run_moves_no_pool_and_talks_to_nobody():
    """Target's and draft's pools are updated in place, and nothing leaves the device inside the loop."""
    drafter = pax.DraftModel(SHALLOW)
    state = begin(drafter, started(num_blocks=20_000), k=3)
    pool = state.cache.layers[0].k.nbytes
    assert pool > 50 * state.carry.layers[0].k.nbytes
    run = jax.jit(lambda s: advance(TOY, drafter, s, k=3, budget=19), donate_argnums=0)
    compiled = run.lower(state).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * pool
    assert memory.temp_size_in_bytes < pool / 4
    text = compiled.as_text()
    assert not any(word in text for word in ("infeed", "outfeed", "callback", " send(", " recv("))


def followed(text, n, k):
    """Prompt lookup as a loop over a list."""
    for m in range(n, 0, -1):
        for end in range(len(text) - 1, m - 1, -1):
            if text[end - m : end] == text[-m:]:
                return (text[end:] * (k + 1))[:k]
    return []


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngrams_are_looked_up_as_in_a_list(n):
    rows, k = 200, 5
    rng = np.random.default_rng(n)
    tokens = jnp.asarray(rng.integers(0, 3, (rows, 12)), jnp.int32)
    known = jnp.asarray(rng.integers(1, 12, rows), jnp.int32)
    state = pax.start(TOY, tokens, known, max_new_tokens=1, max_model_len=13)
    draft, _ = pax.NGram(n).propose((), state, k)
    for row in range(rows):
        want = followed(tokens[row, : int(known[row])].tolist(), n, k)
        assert draft.tokens[row, : int(draft.count[row])].tolist() == want
    assert {0, k} == set(draft.count.tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_speculative_tokens": 0}, "num_speculative_tokens is 0"),
        ({"drafter": pax.DraftModel(Toy(TOY.embed, TOY.head[:, :-1], TOY.qkv, TOY.out))},
         "vocabulary has 36 tokens, the model's 37"),
        ({"drafter": pax.NGram(0)}, "n is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(change, message):
    arguments = {"drafter": pax.NGram(), "max_new_tokens": 4, "num_speculative_tokens": 2, **change}
    with pytest.raises(ValueError, match=message):
        pax.speculate(TOY, jnp.array([[1, 2, 3]]), jnp.array([3]), **arguments)


def test_the_pure_function_gives_what_generate_gives():
    @jax.jit
    def speculate(n):
        return pax.speculate(TOY, *prompts(LENGTHS), drafter=pax.NGram(), num_speculative_tokens=2, max_new_tokens=n,
                             max_model_len=WIDTH)  # fmt: skip

    result, tally = speculate(jnp.int32(9))
    assert tokens_of(result) == [baseline(row, 9) for row in range(ROWS)]
    want = jax.jit(lambda: pax.generate(TOY, *prompts(LENGTHS), max_new_tokens=9))()
    np.testing.assert_allclose(result.logprobs[:, :9], want.logprobs, atol=1e-4)
    assert tally.steps.shape == (ROWS,)
