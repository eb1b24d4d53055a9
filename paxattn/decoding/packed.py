"""A model as a flat row of arrays, for what is called often.

    Llama -> Layer -> Param -> array      JAX walks this tree in Python at every call of a jitted function: 3 ms for
    Packed -> array, array, ...           32 layers, two decode steps of a small model; these, in 10 us

The structure is walked when a function is traced. Two structures are first compared by identity: pack a model once.
"""

import dataclasses
from typing import Any

import jax

from paxattn.cache import KV, CacheSpec, Plan
from paxattn.decoding.model import Model
from paxattn.decoding.vocabulary import Scores
from paxattn.typing import Array, Float, Int32, static, struct


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """What a model is but for its arrays; hashed once."""

    tree: Any
    code: int

    def __hash__(self) -> int:
        return self.code

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self.code == other.code and self.tree == other.tree)


@struct
class Packed:
    """A `Model` that stands for another; see `pack`."""

    arrays: tuple[Array, ...]
    structure: Structure = static()

    @property
    def whole(self) -> Model:
        """The model that was packed, with the arrays of this one."""
        return jax.tree.unflatten(self.structure.tree, self.arrays)

    @property
    def cache_spec(self) -> CacheSpec:
        """That of the model."""
        return self.whole.cache_spec

    @property
    def vocab_size(self) -> int:
        """That of the model."""
        return self.whole.vocab_size

    def __call__(
        self, tokens: Int32[Array, "T"], plan: Plan, layers: tuple[KV, ...]
    ) -> tuple[Float[Array, "T E"], tuple[KV, ...]]:
        """What the model does."""
        return self.whole(tokens, plan, layers)

    def logits(self, hidden: Float[Array, "n E"]) -> Scores:
        """What the model says."""
        return self.whole.logits(hidden)


def pack(model: Model) -> Packed:
    """The same model, cheap to hand to a jitted function; models of one structure share their programs."""
    arrays, tree = jax.tree.flatten(model)
    return Packed(tuple(arrays), Structure(tree, hash(tree)))
