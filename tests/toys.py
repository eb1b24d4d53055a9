"""Models of a few lines that fulfil `paxattn.Model`: the library's tests need no network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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

    cache_spec = pax.CacheSpec(LAYERS, KV_HEADS, DIM, jnp.float32)

    @property
    def vocab_size(self):
        return self.head.shape[1]

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


def assert_same(got, want) -> None:
    """Equal trees; floats exactly on a CPU, nearly elsewhere: a GPU adds up in another order for each shape."""
    rtol = 0.0 if jax.default_backend() == "cpu" else 1e-5
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one == (pytest.approx(other, rel=rtol, abs=rtol) if isinstance(other, float) else other)


CHAIN = np.uint32(0x9E3779B1)


@struct
class Chain:
    """The next token is a hash of all tokens so far, kept as a running sum in the cache: a cheap model for long runs.

    A step adds to what it finds in the row's last slot, so a request on another's blocks, or fed twice, shows.
    """

    salt: jax.Array

    vocab_size = VOCAB
    cache_spec = pax.CacheSpec(1, 1, 1, jnp.int32)

    def __call__(self, tokens, plan, layers):
        (kv,) = layers
        mixed = mix(tokens, plan.position, self.salt)
        total = jnp.cumsum(jnp.where(plan.live, mixed, 0))
        first = plan.query_start[plan.row]
        before = plan.position[first] - 1
        block = plan.pages[plan.row, jnp.maximum(before, 0) // kv.k.shape[2]]
        found = jnp.where(before >= 0, kv.k[block, 0, before % kv.k.shape[2], 0], 0)
        total = total - (total - jnp.where(plan.live, mixed, 0))[first] + found
        kv = pax.write(kv, plan, total[:, None, None], total[:, None, None])
        return total[:, None], (kv,)

    def logits(self, hidden):
        return jax.nn.one_hot(scramble(hidden[:, 0]) % VOCAB, VOCAB)

    def answer(self, prompt, new):
        """The tokens that `new` steps of this model give, in plain numpy."""
        prompt, salt = np.asarray(prompt, np.int32), np.asarray(self.salt)
        total, tokens = mix(prompt, np.arange(len(prompt), dtype=np.int32), salt).sum(dtype=np.int32), []
        with np.errstate(over="ignore"):
            for at in range(len(prompt), len(prompt) + new):
                tokens.append(int(scramble(total) % VOCAB))
                total = total + mix(np.int32(tokens[-1]), np.int32(at), salt)
        return tokens


def scramble(x):
    """A hash of int32 in 32 bits, the same in numpy and JAX."""
    with np.errstate(over="ignore"):
        x = x.astype(np.uint32) * CHAIN
        x = (x ^ (x >> np.uint32(15))) * CHAIN
        return x ^ (x >> np.uint32(13))


def mix(token, position, salt):
    """What a token at a position adds to the sum."""
    return scramble(token * np.int32(65599) + position * np.int32(31) + salt).astype(np.int32)


def prompts(lengths, width=None, seed=1):
    """Random prompts of these lengths, with junk past their ends: ids [B, width] and lengths [B]."""
    shape = (len(lengths), width or max(lengths))
    ids = jax.random.randint(jax.random.key(seed), (64, 256), 0, VOCAB, jnp.int32)
    return ids[: shape[0], : shape[1]], jnp.asarray(lengths, jnp.int32)


def tokens_of(result):
    """The new tokens of each row as lists."""
    return [list(map(int, ids[:n])) for ids, n in zip(result.token_ids, result.length, strict=True)]
