"""What a decoding loop asks of a model: one forward over packed tokens, and logits where they are wanted.

    tokens [T], plan --model--> hidden [T, E], pools        hidden [n, E] --model.logits--> float32 [n, V]

The library knows no network. A toy of ten lines serves as well as a Llama (see tests/toys.py).
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from paxattn.cache import KV, CacheSpec, Plan
from paxattn.decoding.vocabulary import Scores
from paxattn.typing import Array, Float, Int32


class Model(Protocol):
    """A pytree with a cache spec, a vocabulary size and two pure functions."""

    @property
    def cache_spec(self) -> CacheSpec:
        """Layers, KV heads, head size and dtype of the cache that it reads and writes."""
        ...

    @property
    def vocab_size(self) -> int:
        """V; token ids are in [0, V)."""
        ...

    def __call__(
        self, tokens: Int32[Array, "T"], plan: Plan, layers: tuple[KV, ...]
    ) -> tuple[Float[Array, "T E"], tuple[KV, ...]]:
        """Feeds a step's tokens; writes their keys and values; gives their hidden states."""
        ...

    def logits(self, hidden: Float[Array, "n E"]) -> Scores:
        """Scores of the next token for any selection of hidden states: [n, V], or a `Slice` of it on a mesh."""
        ...


def logits_of(model: Model, hidden: Float[Array, "n E"]) -> Scores:
    """The model's logits as float32, in which everything about tokens is decided, whatever it computes in."""
    return jax.tree.map(lambda values: values.astype(jnp.float32), model.logits(hidden))
