"""The parts of a Llama layer that hold no state: normalisation, rotary angles, sums over a mesh.

x ---> + ---> x' --> norm --> attention or MLP --> the next delta
delta -^                                           rope: angle of pair i = position * frequency[i]
"""

import math

import jax
import jax.numpy as jnp

from models.config import LlamaConfig
from pallas_kernels import add_norm as norms
from pallas_kernels import few_rows, mosaic


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32 (Zhang and Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    mean = jnp.einsum("te,te->t", wide, wide)[:, None] / x.shape[-1]
    return (wide * jax.lax.rsqrt(mean + eps)).astype(x.dtype) * weight


def add_norm(
    x: jax.Array, delta: jax.Array, weight: jax.Array, eps: float, *, attention: str
) -> tuple[jax.Array, jax.Array]:
    """The sum of x and delta, and its norm: one kernel where the attention named has kernels."""
    if mosaic.chosen(attention) and norms.fits(x, weight):
        return norms.add_norm(x, delta, weight, eps=eps)
    x = x + delta
    return x, rms_norm(x, weight, eps)


def product(x: jax.Array, w: jax.Array, *, attention: str) -> jax.Array:
    """X [T, K] times w [K, ...]; those of few tokens by a kernel of its own where the attention named has kernels."""
    if mosaic.chosen(attention) and few_rows.fits(x, w):
        return few_rows.few_rows(x, w)
    return jnp.tensordot(x, w, 1)


def gated(x: jax.Array, w: jax.Array, bias: jax.Array | None, *, attention: str) -> jax.Array:
    """silu(x gate) * (x up), where w [K, 2, F] holds gate and up, and bias [2, F] theirs (Shazeer 2020): [T, F]."""
    if bias is None and mosaic.chosen(attention) and few_rows.fits(x, w):
        return few_rows.few_rows(x, w, gated=True)
    both = product(x, w, attention=attention)
    both = both if bias is None else both + bias
    return jax.nn.silu(both[:, 0]) * both[:, 1]


def rope_frequencies(config: LlamaConfig) -> jax.Array:
    """Radians a position for each pair of a head, float32 [D / 2]; rope types default, linear, llama3."""
    rope = config.rope
    frequency = rope.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    if rope.rope_type == "linear":
        return frequency / rope.factor
    if rope.rope_type == "llama3":
        # Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1).
        turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = jnp.clip(blend, 0, 1)
        return frequency * (blend + (1 - blend) / rope.factor)
    return frequency


def rope_angles(config: LlamaConfig, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [T, 1, D / 2], of the tokens' positions [T]; once a step, for all layers."""
    angle = position.astype(jnp.float32)[:, None, None] * rope_frequencies(config)
    return jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))  # else anew in each layer, where XLA fuses it


def total(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum of what the devices of a mesh axis have: one all-reduce, none where there is no axis."""
    return x if axis is None else jax.lax.psum(x, axis)


def lookup(embed: jax.Array, tokens: jax.Array, axis: str | None) -> jax.Array:
    """Embeddings [T, E] of tokens; where the vocabulary is cut, one device has each and the others add zero."""
    if axis is None:
        return embed[tokens]
    at = tokens - jax.lax.axis_index(axis) * embed.shape[0]
    mine = (at >= 0) & (at < embed.shape[0])
    return total(jnp.where(mine[:, None], embed[jnp.where(mine, at, 0)], 0), axis)
