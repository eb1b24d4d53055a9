"""The sampler against a sorting oracle, and its independence of batch mates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxattn.decoding.sampling import Sampling, _penalise, keep, pick

V = 50


def kept_by_sorting(logits, top_k, top_p, min_p):
    """Hugging Face's order: top-k, then top-p over what is left, then min-p."""
    logits = logits.astype(np.float64)
    kept = np.ones(V, bool)
    if top_k:
        kept &= logits >= np.sort(logits)[-min(top_k, V)]
    p = np.where(kept, np.exp(logits - logits.max()), 0)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    if top_p < 1:
        nucleus = np.zeros(V, bool)
        nucleus[order[before < top_p]] = True
        kept &= nucleus
    return kept & (p >= min_p * p.max())


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [
    (0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (50, 1.0, 0.0), (99, 1.0, 0.0), (0, 0.9, 0.0),
    (0, 0.01, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.1), (0, 1.0, 1.0), (20, 0.7, 0.05), (3, 0.99, 0.2),
])  # fmt: skip
def test_filters_equal_sorting(top_k, top_p, min_p):
    logits = np.random.default_rng(0).standard_normal((40, V)).astype(np.float32) * 3 - 1
    got = keep(jnp.array(logits), Sampling.create(40, top_k=top_k, top_p=top_p, min_p=min_p))
    want = np.stack([kept_by_sorting(row, top_k, top_p, min_p) for row in logits])
    np.testing.assert_array_equal(got, want)


def test_the_whole_row_is_negative_or_holds_minus_infinity():
    logits = jnp.full((1, V), -jnp.inf).at[0, 3].set(-5.0).at[0, 4].set(-6.0)
    assert np.flatnonzero(keep(logits, Sampling.create(1, top_k=2))[0]).tolist() == [3, 4]
    assert np.flatnonzero(keep(logits, Sampling.create(1, top_p=0.5))[0]).tolist() == [3]


def draw(logits, sampling, known=5):
    rows = logits.shape[0]
    return pick(logits, sampling, jnp.zeros((rows, 8), jnp.int32), jnp.full(rows, known))[0]


def test_the_distribution_is_the_softmax():
    rows = 20_000
    logits = jnp.array([0.0, 1.0, 2.0, -1.0])
    got = draw(jnp.tile(logits, (rows, 1)), Sampling.create(rows, temperature=0.7, key=jax.random.key(3)))
    want = np.asarray(jax.nn.softmax(logits / 0.7)) * rows
    seen = np.bincount(got, minlength=4)
    assert ((seen - want) ** 2 / want).sum() < 21.1  # chi-square, 3 degrees of freedom, p = 1e-4
    assert ((seen - np.asarray(jax.nn.softmax(logits)) * rows) ** 2 / want).sum() > 21.1, "temperature matters"


def test_noise_depends_on_the_rows_key_and_position_alone():
    logits = jax.random.normal(jax.random.key(1), (6, V))
    keys = jax.random.split(jax.random.key(2), 6)
    together = draw(logits, Sampling.create(6, temperature=1.0, key=keys))
    back = draw(logits[::-1], Sampling.create(6, temperature=1.0, key=keys[::-1]))[::-1]
    assert together.tolist() == back.tolist()
    mixed = Sampling.create(6, temperature=jnp.array([1.0, 0, 1, 0, 1, 0]), key=keys)
    assert draw(logits, mixed)[::2].tolist() == together[::2].tolist()
    assert draw(logits, mixed)[1::2].tolist() == jnp.argmax(logits, -1)[1::2].tolist()
    flat = jnp.zeros((6, 5000))
    sampling = Sampling.create(6, temperature=1.0, key=keys)
    assert draw(flat, sampling, 5).tolist() != draw(flat, sampling, 6).tolist()


def test_plain_numbers_without_an_effect_are_greedy():
    assert Sampling.asked(2) is None
    assert Sampling.asked(2, temperature=0, top_k=5, key=jax.random.key(1)) is None
    for knobs in ({"temperature": 0.5}, {"repetition_penalty": 1.2}, {"temperature": jnp.zeros(2)}):
        assert isinstance(Sampling.asked(2, **knobs), Sampling)


def test_repetition_penalty_is_hugging_faces():
    logits = jnp.array([[2.0, -2.0, 1.0, 0.5]])
    tokens = jnp.array([[0, 1, 0, 3]])
    got = _penalise(logits, jnp.array([2.0]), tokens, jnp.array([3]))
    assert got.tolist() == [[1.0, -4.0, 1.0, 0.5]], "token 3 lies past the known ones"


def test_a_penalty_alone_changes_a_greedy_pick():
    logits, tokens = jnp.array([[2.0, 1.5, 0.0]] * 2), jnp.array([[0], [0]])
    sampling = Sampling.create(2, repetition_penalty=jnp.array([1.0, 2.0]))
    assert pick(logits, sampling, tokens, jnp.array([1, 1]))[0].tolist() == [0, 1]
