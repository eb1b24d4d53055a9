"""Two numbers that stand for all bits of an array: taken where it lies, on one device or many, and 64 bits leave it."""

import jax
import jax.numpy as jnp


@jax.jit
def checksum(leaf: jax.Array) -> jax.Array:
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
