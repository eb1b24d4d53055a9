"""A saved state on another mesh: pools are cut anew over KV heads, what else a data shard has is the same bits.

    saved on one device   data=1 x model=2       data=1 x model=8        any of them onto any other
    [N, K=2, S, D]        [1, N, K=2, S, D]      [1, N, 8, S, D]
      h0 h1                 h0 | h1                h0|h0|h0|h0|h1|h1|h1|h1

The number of data shards stays: each has a pool of its own, and what its page table says holds for that pool alone.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

import paxattn as pax
from paxattn.mesh import DATA, MODEL, Cut


class SnapshotError(ValueError):
    """A snapshot that cannot be written, or that must not be gone on from; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a state lies on devices."""

    data: int | None  # D, the length of every array's leading axis; None: there is none, it is of one device
    model: int  # devices that a data shard's pools are cut over
    kv_heads: int  # of the model

    @staticmethod
    def of(state: Any, model: pax.Model) -> "Layout":
        """Read off the pools; without any, that of one device."""
        pools = [kv.k for kv in jax.tree.leaves(state, is_leaf=is_pool) if is_pool(kv)]
        data, devices = None, 1
        for pool in map(jnp.asarray, pools):
            data = pool.shape[0] if pool.ndim == 5 else None
            devices = pool.shape[-3] // pool.sharding.shard_shape(pool.shape)[-3]
        return Layout(data, devices, model.cache_spec.num_kv_heads)


def is_pool(node: Any) -> bool:
    """Whether it is the keys and values of a layer."""
    return isinstance(node, pax.KV)


@dataclasses.dataclass(frozen=True)
class Move:
    """From a layout to a mesh, or to one device where it is None.

    Raises:
      SnapshotError, models.sharding.MeshError: the state, or the model, does not fit there.
    """

    saved: Layout
    mesh: Mesh | None
    model: pax.Model

    def __post_init__(self):
        shards = self.mesh.shape[DATA] if self.mesh else 1
        if shards != (self.saved.data or 1):
            raise SnapshotError(
                f"it was saved on data={self.saved.data or 1}, which cannot become data={shards}: each data shard has "
                f"a pool of its own. Restore it on data={self.saved.data or 1}; the model axis may differ."
            )
        if self.mesh and isinstance(self.model, Cut):
            self.model.specs(MODEL, self.devices)  # raises where it does not fit

    @property
    def devices(self) -> int:
        """Of a model group."""
        return self.mesh.shape[MODEL] if self.mesh else 1

    def heads(self, saved: int) -> int:
        """KV heads that a pool of so many is to have."""
        if isinstance(self.model, Cut) and saved == self.saved.kv_heads:
            return self.model.cache_spec.num_kv_heads
        if self.devices != self.saved.model:
            raise SnapshotError(
                f"it holds pools of {saved} KV heads that are not cut along with the model (another model's, or one "
                f"that is whole on each device), and was saved on model={self.saved.model}: restore it on that."
            )
        return saved

    def place(self, shape: tuple[int, ...], pool: bool) -> Sharding:
        """Where an array as it was saved is read to: each device its slice, all heads where they cannot be cut."""
        lanes = () if self.saved.data is None else (DATA,)
        if pool:
            self.heads(shape[-3])
        if self.mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        cut = pool and shape[-3] % self.devices == 0
        return NamedSharding(self.mesh, P(*lanes, None, MODEL) if cut else P(*lanes))

    def seat(self, x: jax.Array, pool: bool) -> jax.Array:
        """An array that was read, as a lane of the mesh wants it."""
        heads = self.heads(x.shape[-3]) if pool else None
        lanes = (self.mesh is not None) - (self.saved.data is not None)
        if not lanes and (heads is None or heads == x.shape[-3]):
            return x
        if self.mesh is None or not x.size:  # XLA of JAX 0.11 crashes on empty arrays on a mesh
            return _fit(x, heads, lanes)
        where = NamedSharding(self.mesh, P(DATA, None, MODEL) if pool else P(DATA))
        return jax.jit(_fit, static_argnums=(1, 2), out_shardings=where)(x, heads, lanes)

    def finish(self, state: Any) -> Any:
        """`seat` for a whole state."""

        def node(x):
            return jax.tree.map(functools.partial(self.seat, pool=is_pool(x)), x)

        return jax.tree.map(node, state, is_leaf=is_pool)


def _fit(x: jax.Array, heads: int | None, lanes: int) -> jax.Array:
    """With that many KV heads, each of them repeated or one of its copies kept, and a leading axis more or less."""
    if heads is not None:
        x = x[..., jnp.arange(heads) * x.shape[-3] // heads, :, :]
    return x[None] if lanes > 0 else x[0] if lanes < 0 else x
