"""Models of a few lines that fulfil `paxattn.Model`: the library's tests need no network."""

import jax
import jax.numpy as jnp

import paxattn as pax
from paxattn.typing import struct

VOCAB, EMBED, HEADS, KV_HEADS, DIM, LAYERS = 37, 16, 4, 2, 8, 2


@struct
class Toy:
    """Two layers of real paged attention over random weights; every earlier token matters to the next."""

    embed: jax.Array
    head: jax.Array
    qkv: jax.Array
    out: jax.Array

    @staticmethod
    def create(seed: int = 0) -> "Toy":
        keys = jax.random.split(jax.random.key(seed), 4)
        return Toy(
            jax.random.normal(keys[0], (VOCAB, EMBED)),
            jax.random.normal(keys[3], (EMBED, VOCAB)) * 0.3,
            jax.random.normal(keys[1], (LAYERS, EMBED, HEADS + 2 * KV_HEADS, DIM)) * 0.7,
            jax.random.normal(keys[2], (LAYERS, HEADS * DIM, EMBED)) * 0.9,
        )

    vocab_size = VOCAB
    cache_spec = pax.CacheSpec(LAYERS, KV_HEADS, DIM, jnp.float32)

    def __call__(self, tokens, plan, layers):
        wave = jnp.sin(plan.position[:, None] * (1.3 ** -jnp.arange(EMBED)))
        x, pools = self.embed[tokens] + wave, []
        for qkv, out, kv in zip(self.qkv, self.out, layers, strict=True):
            q, k, v = jnp.split(jnp.einsum("te,ehd->thd", x, qkv), [HEADS, HEADS + KV_HEADS], axis=1)
            attended, kv = pax.attend(q, k, v, kv, plan)
            x = x + jnp.tanh(attended.reshape(x.shape[0], -1) @ out)
            pools.append(kv)
        return x, tuple(pools)

    def logits(self, hidden):
        return hidden @ self.head


def prompts(lengths, width=None, seed=1):
    """Random prompts of these lengths, with junk past their ends: ids [B, width] and lengths [B]."""
    shape = (len(lengths), width or max(lengths))
    ids = jax.random.randint(jax.random.key(seed), (64, 256), 0, VOCAB, jnp.int32)
    return ids[: shape[0], : shape[1]], jnp.asarray(lengths, jnp.int32)


def tokens_of(result):
    """The new tokens of each row as lists."""
    return [list(map(int, ids[:n])) for ids, n in zip(result.token_ids, result.length, strict=True)]
