"""Shapes are types: the letters that every signature uses, and the frozen pytree that every state is.

B  rows (sequences), max_num_seqs      K, H  KV heads, query heads (H = K * G)
T  tokens fed in one step, all rows    D     head size
P  pages a row                         L     layers
N  blocks in a pool                    E, V  model width, vocabulary
S  slots a block: the block size       M     tokens a row can hold
R  prompts, where one has many rows    W     new tokens allowed; columns of a prompt array

PageTable              Blocks                 pool of one layer [N, K, S, D]
row 0: [ 3 | 1 | . ]   refcount[N]            block 0: NULL, never handed out
row 1: [ 3 | 5 | . ]   [0 1 0 2 0 1 ...]      block 3: shared by rows 0 and 1
"""

import dataclasses
from typing import Any, dataclass_transform

import jax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key

__all__ = ["Array", "Bool", "Float", "Float32", "Int", "Int32", "Key", "static", "struct"]


def static(**kwargs: Any) -> Any:
    """A field of a `struct` that sets shapes or code: part of the tree's structure, not a leaf."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def struct(cls: type) -> type:
    """A frozen dataclass that is a pytree; fields made with `static()` are compared, not traced.

    Unflattening skips `__init__`, so that JAX may put what it likes (tracers, shapes, None) into the leaves
    while the types are still checked wherever a person builds the object.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)
    statics = tuple(f.name for f in fields if f.metadata.get("static"))
    leaves = tuple(f.name for f in fields if f.name not in statics)

    def flatten(self):
        return tuple(getattr(self, n) for n in leaves), tuple(getattr(self, n) for n in statics)

    def flatten_with_keys(self):
        children, aux = flatten(self)
        return tuple((jax.tree_util.GetAttrKey(n), c) for n, c in zip(leaves, children, strict=True)), aux

    def unflatten(aux, children):
        self = object.__new__(cls)
        for name, value in (*zip(leaves, children, strict=True), *zip(statics, aux, strict=True)):
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
