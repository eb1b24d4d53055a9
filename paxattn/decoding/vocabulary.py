"""Scores over the vocabulary, wherever it lies: whole on a device, or a slice on each device of a mesh axis.

    device 0  [ . . 9 . ]   9 at 2, sum of exp   ┐ gathered: three numbers a row and device,
    device 1  [ . 7 . . ]   7 at 5, sum of exp   ┘ never the scores  ->  token 2, the same bits on every device

A model whose head is cut gives a `Slice` where others give an array. What is decided from gathered numbers is decided
alike on every device, so page tables that follow from it cannot drift apart.
"""

import jax
import jax.numpy as jnp

from paxattn.typing import Array, Float32, Int32, static, struct


@struct
class Slice:
    """This device's part of the scores: the vocabulary is cut into equal runs along a mesh axis, in its order."""

    values: Float32[Array, "n V_local"]
    axis: str = static()


Scores = Float32[Array, "n V"] | Slice


@struct
class Peak:
    """What most decisions need of a row's scores. `top` is NaN where any score of the row is."""

    top: Float32[Array, "n"]
    token: Int32[Array, "n"]  # the arg-max, the first of equals
    total: Float32[Array, "n"]  # sum of exp(score - top)


def local(scores: Scores) -> Float32[Array, "n V_local"]:
    """The scores that this device has."""
    return scores.values if isinstance(scores, Slice) else scores


def size(scores: Scores) -> int:
    """V, of the whole vocabulary."""
    return scores.values.shape[1] * jax.lax.axis_size(scores.axis) if isinstance(scores, Slice) else scores.shape[1]


def offset(scores: Scores) -> Int32[Array, ""] | int:
    """The token that this device's first score belongs to."""
    return jax.lax.axis_index(scores.axis) * scores.values.shape[1] if isinstance(scores, Slice) else 0


def whole(scores: Scores) -> Float32[Array, "n V"]:
    """All scores on every device: a gather of n x V numbers, which sampling needs and greedy decoding does not."""
    if not isinstance(scores, Slice):
        return scores
    return jax.lax.all_gather(scores.values, scores.axis, axis=1, tiled=True)


def peak(scores: Scores) -> Peak:
    """The best token of each row, its score, and the sum that normalises; one small collective where cut.

    The arg-max is two plain reductions: XLA runs its own on one core of a CPU.
    """
    values = local(scores)
    top = jnp.max(values, axis=-1)
    at = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    token = jnp.min(jnp.where(values == top[:, None], at, values.shape[1] - 1), axis=-1)
    mine = Peak(top, token, jnp.sum(jnp.exp(values - top[:, None]), axis=-1))
    return _highest(scores, mine) if isinstance(scores, Slice) else mine


def _highest(scores: Slice, mine: Peak) -> Peak:
    """The peak of all devices. A token id is exact as a float32: vocabularies end at 2 ** 22."""
    numbers = jnp.stack([mine.top, (mine.token + offset(scores)).astype(jnp.float32), mine.total])
    tops, tokens, totals = jnp.moveaxis(jax.lax.all_gather(numbers, scores.axis), 1, 0)
    top = jnp.max(tops, axis=0)
    token = jnp.min(jnp.where(tops == top, tokens, size(scores) - 1), axis=0)
    return Peak(top, token.astype(jnp.int32), jnp.sum(totals * jnp.exp(tops - top), axis=0))


def score_of(scores: Scores, token: Int32[Array, "n"]) -> Float32[Array, "n"]:
    """The score of one token a row."""
    values = local(scores)
    at = token - offset(scores)
    mine = (at >= 0) & (at < values.shape[1])
    found = jnp.take_along_axis(values, jnp.where(mine, at, 0)[:, None], axis=-1)[:, 0]
    return jax.lax.psum(jnp.where(mine, found, 0), scores.axis) if isinstance(scores, Slice) else found


def log_softmax(scores: Scores, found: Peak) -> Scores:
    """Log-probabilities, cut as the scores are; `found` is their peak."""
    if not isinstance(scores, Slice):
        return jax.nn.log_softmax(scores)
    return Slice(scores.values - found.top[:, None] - jnp.log(found.total)[:, None], scores.axis)


def best(
    scores: Scores,
    score: Float32[Array, "R c"],
    beam: Int32[Array, "R c"],
    token: Int32[Array, "R c"],
    logprob: Float32[Array, "R c"],
) -> tuple[Float32[Array, "R c"], Int32[Array, "R c"], Int32[Array, "R c"], Float32[Array, "R c"]]:
    """The best c of the candidates that each device found in its slice; of equals the lower beam, then token."""
    if not isinstance(scores, Slice):
        return score, beam, token, logprob
    found = -score, beam, token + offset(scores), logprob
    score, beam, token, logprob = jax.lax.sort(
        jax.lax.all_gather(found, scores.axis, axis=1, tiled=True), dimension=1, num_keys=3
    )
    count = found[0].shape[1]
    return -score[:, :count], beam[:, :count], token[:, :count], logprob[:, :count]
