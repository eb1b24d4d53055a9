"""Speculative sampling: certain guesses change no token, random guesses no distribution."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxattn as pax
from paxattn.decoding import speculative
from paxattn.decoding.sampling import DRAFT, Sampling, draw, keep, penalise, stream
from paxattn.typing import struct
from tests.paxattn.test_speculative import LENGTHS, NEW, QUICK, ROWS, SHALLOW, TOY, WIDTH, Scripted, started
from tests.toys import prompts, tokens_of

V, STEPS, ROWS_A_RUN, RUNS = 5, 3, 512, 16


@struct
class Chain:
    """The next token depends on the last alone, so that every distribution can be written down."""

    table: jax.Array

    vocab_size = V
    cache_spec = pax.CacheSpec(1, 1, 1, jnp.float32)

    def __call__(self, tokens, plan, layers):
        return self.table[tokens], layers

    def logits(self, hidden):
        return hidden


CHAIN = Chain(jax.random.normal(jax.random.key(4), (V, V)) * 1.5)
BIASED = Chain(jax.random.normal(jax.random.key(5), (V, V)) * 1.5 + jnp.arange(V) / 2)
KNOBS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 3},
    {"temperature": 1.3, "top_p": 0.8, "repetition_penalty": 1.7},
    {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 0.6},
]
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@struct
class Steady:
    """Draws its guess from one distribution, whatever the text and the knobs."""

    probability: jax.Array

    def init(self, state, k):
        return ()

    def propose(self, carry, state, k):
        rows, q = len(state.known), self.probability
        sampling = stream(Sampling.create(rows, temperature=1.0, key=state.sampling.key), DRAFT)
        table = jnp.broadcast_to(jnp.log(q), (rows, V))
        guess = jnp.stack([draw(table, sampling, state.known + i) for i in range(k)], axis=1)
        return pax.Draft(guess, jnp.full(rows, k), jnp.broadcast_to(q, (rows, k, V))), carry

    def settle(self, carry, state):
        return carry


STEADY = Steady(jnp.array([0.05, 0.15, 0.5, 0.0, 0.3]))


def chances(**knobs):
    """The probability of each sequence of STEPS tokens after token 0, from those of each token after each prefix."""
    sequences = np.array(list(itertools.product(range(V), repeat=STEPS)))
    text = jnp.asarray(np.pad(sequences, ((0, 0), (1, 0))))
    sampling = Sampling.create(len(text), **knobs)
    chance = np.ones(len(text))
    for i in range(STEPS):
        logits = penalise(CHAIN.table[text[:, i]], sampling, text, jnp.full(len(text), i + 1)) / knobs["temperature"]
        p = jax.nn.softmax(jnp.where(keep(logits, sampling), logits, -jnp.inf))
        chance *= np.asarray(p)[np.arange(len(text)), text[:, i + 1]]
    return dict(zip(map(tuple, sequences.tolist()), chance, strict=True))


@functools.partial(jax.jit, static_argnames="k", compiler_options=QUICK)
def sampled(drafter, key, knobs, k):
    ids, length = jnp.zeros((ROWS_A_RUN, 1), jnp.int32), jnp.ones(ROWS_A_RUN, jnp.int32)
    return pax.speculate(CHAIN, ids, length, drafter=drafter, num_speculative_tokens=k, max_new_tokens=STEPS, key=key,
                         **knobs)  # fmt: skip


def excess(drafter, knobs, k=2):
    """Chi-square of the sequences over thousands of seeds, less its degrees of freedom, in standard deviations."""
    want = chances(**knobs)
    seen, tallies = dict.fromkeys(want, 0), []
    for run in range(RUNS):
        result, tally = sampled(drafter, jax.random.key(run), OFF | knobs, k)
        tallies.append(tally.accepted.sum() / tally.drafted.sum())
        for tokens in map(tuple, np.asarray(result.token_ids).tolist()):
            seen[tokens] += 1
    assert not any(seen[s] for s in want if want[s] == 0), "a token that the knobs cut was drawn"
    pairs = np.array([(seen[s], want[s] * RUNS * ROWS_A_RUN) for s in want])
    often = pairs[:, 1] >= 5
    pairs = np.concatenate([pairs[often], pairs[~often].sum(axis=0, keepdims=True)])
    pairs = pairs[pairs[:, 1] >= 5]
    freedom = len(pairs) - 1
    square = ((pairs[:, 0] - pairs[:, 1]) ** 2 / pairs[:, 1]).sum()
    return (square - freedom) / (2 * freedom) ** 0.5, float(np.mean(tallies))


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("drafter", [pax.DraftModel(BIASED), STEADY], ids=["draft model", "steady"])
def test_the_distribution_is_the_targets(drafter, knobs):
    distance, accepted = excess(drafter, knobs)
    assert distance < 4.5
    assert 0.05 < accepted < 0.95, "guesses are accepted and rejected"


def test_a_guess_equal_in_distribution_is_always_accepted():
    """p = q: nothing is left to draw from, and rounding must not matter."""
    _, tally = sampled(pax.DraftModel(CHAIN), jax.random.key(0), OFF | KNOBS[1], 2)
    assert float(tally.accepted.sum() / tally.drafted.sum()) > 0.999


def always(logits, sampling, tokens, at, guess, real, probability):
    """Every guess is good enough."""
    return jnp.where(real, guess, right(logits, sampling, tokens, at, guess, real, None))


def from_p(logits, sampling, tokens, at, guess, real, probability):
    """Accepts by the book, but draws from p, not from what is left of it, after a rejection."""
    good = right(logits, sampling, tokens, at, guess, real, probability)
    return jnp.where(real & (good == guess), guess, right(logits, sampling, tokens, at, guess, real, None))


right = speculative.take


@pytest.mark.parametrize("wrong", [always, from_p])
def test_a_wrong_rule_of_acceptance_is_noticed(wrong, monkeypatch):
    monkeypatch.setattr(speculative, "take", wrong)
    sampled.clear_cache()
    try:
        assert excess(pax.DraftModel(BIASED), KNOBS[0])[0] > 8
    finally:
        sampled.clear_cache()


MIXED = {
    "temperature": jnp.array([1.0, 0.0, 0.7, 0.0, 1.2]),
    "top_p": jnp.array([0.9, 1.0, 1.0, 0.5, 1.0]),
    "repetition_penalty": jnp.array([1.0, 1.4, 1.2, 1.0, 1.3]),
    "key": jax.random.key(9),
}


@functools.cache
def plain():
    return jax.jit(lambda state: pax.advance(TOY, state, budget=19))(started(**MIXED))


@functools.partial(jax.jit, compiler_options=QUICK)
def mixed(drafter):
    options = {"max_new_tokens": NEW, "max_num_batched_tokens": 19, "max_model_len": WIDTH, "block_size": 3}
    return pax.speculate(TOY, *prompts(LENGTHS), drafter=drafter, num_speculative_tokens=4, **options, **MIXED)


@pytest.mark.parametrize("which", ["ngram", "oracle", "liar"])
def test_certain_guesses_change_no_token_however_rows_pick(which):
    """Sampled rows, greedy rows, penalties: the tokens of plain decoding, one by one."""
    spoilt = jnp.full((ROWS, WIDTH), which == "liar")
    script = Scripted(plain().tokens, spoilt, jnp.zeros(16, bool), jnp.int32(16))
    result, tally = mixed(pax.NGram(1) if which == "ngram" else script)
    assert tokens_of(result) == tokens_of(pax.finish(plain(), width=NEW))
    if which == "oracle":
        assert (tally.accepted == tally.drafted).all()
    if which == "liar":
        assert not tally.accepted.any()


def test_greedy_rows_beside_sampled_ones_are_greedy_under_random_guesses():
    result, tally = mixed(pax.DraftModel(SHALLOW))
    want = tokens_of(pax.finish(plain(), width=NEW))
    for row in (1, 3):
        assert tokens_of(result)[row] == want[row]
    assert tally.accepted.sum() > 0
    assert (result.length == NEW).all()
