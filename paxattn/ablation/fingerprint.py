"""What tells one subject of a sweep from another, so that no row of a file is taken for another model's.

lengths   every number
model     structure (static fields and configs in it), cache spec, config, and of each array shape, dtype, two sums
"""

import hashlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paxattn.decoding.packed import Packed


def fingerprint(subject: Any, config: Any = None) -> str:
    """16 hex digits that follow all of a model or of lengths, and the config that a model was made of.

    One pass over the parameters where they lie; 64 bits of each leave the device. A packed model is the model.
    """
    if not hasattr(subject, "cache_spec"):
        lengths = np.asarray(subject)
        told = f"{type(subject).__name__}{lengths.shape}{lengths.dtype}".encode() + lengths.tobytes()
        return hashlib.sha256(told).hexdigest()[:16]
    model = subject.whole if isinstance(subject, Packed) else subject
    leaves, tree = jax.tree.flatten(model)
    sums = jax.device_get([_checksum(leaf) for leaf in leaves])
    told = [type(model).__qualname__, str(tree), repr(model.cache_spec), repr(model.vocab_size)]
    told += [repr(config), repr(getattr(model, "config", None))]
    told += [f"{jnp.shape(leaf)} {jnp.result_type(leaf)} {two}" for leaf, two in zip(leaves, sums, strict=True)]
    nowhere = re.sub(r" at 0x[0-9a-f]+", "", "\n".join(told))  # a function is where it was put this time
    return hashlib.sha256(nowhere.encode()).hexdigest()[:16]


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """Two sums over the bits of an array, modulo 2 ** 32: of its elements, and of these weighted by their place."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    info = jnp.iinfo if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.finfo
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{min(32, info(leaf.dtype).bits)}")).astype(jnp.uint32)
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(bits.ndim)):  # not of a flattened copy, which a mesh would have to gather
        place += jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        stride *= bits.shape[axis]
    place = place * jnp.uint32(2654435761) + 1
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * place, dtype=jnp.uint32)])
