"""A decode call's sizes, its memory, and the way of a worker through its share of the items."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.config import KernelConfig

ROWS = 64
"""Rows of a warpgroup's matrix product: queries of a tile times query heads of a KV head, at most."""


Ref = Any
"""Memory as a kernel's body sees it: the checker knows no type for all of them."""


class Barriers(NamedTuple):
    """One for each buffer of queries and each slot of the K and V rings."""

    q: Ref
    k: Ref
    v: Ref


class Refs(NamedTuple):
    """Global memory, then shared memory of one block, then its barriers."""

    q: Ref  # [n, K, rows, D]
    k: Ref  # [N, K, S, D]
    v: Ref
    pages: Ref
    tile: Ref  # of the schedule
    share: Ref
    out: Ref  # [n, K, rows, D]
    lse: Ref  # [n, K, 8 or more]
    part: Ref  # [2 * workers, 2, rows, D]: a result in two halves, high and low bits
    part_lse: Ref  # [2 * workers, 8 or more]
    q_ring: Ref
    k_ring: Ref
    v_ring: Ref
    weights: Ref  # of the interpreter only
    lse_stage: Ref
    full: Barriers
    free: Barriers


class Item(NamedTuple):
    """KV tiles j0 <= j < j1 of one (query tile, KV head): scalars."""

    tile: jax.Array
    head: jax.Array
    j0: jax.Array
    j1: jax.Array


@dataclasses.dataclass(frozen=True)
class Call:
    """Static sizes of one call."""

    config: KernelConfig
    rows: int  # of a copy of queries: 8 or more
    tile_size: int  # queries a tile
    kv_heads: int
    head_dim: int
    block_size: int
    unit: int  # tokens a copy of keys or values: never across a page
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    interpret: bool
    dtype: jnp.dtype

    def worker(self, lane):
        """Number of this block's worker `lane` among all."""
        return lax.axis_index("sm") * self.config.workers + lane

    def buffer(self, lane, i):
        """Where a worker's i-th item has its queries."""
        return lane * 2 + lax.rem(i, jnp.int32(2))

    def slot(self, lane, done):
        """Where a worker's KV tile is before which `done` were."""
        return lane * self.config.stages + lax.rem(done, jnp.int32(self.config.stages))

    def some_rows(self, i):
        """`rows` rows from 0; the start is known at run time only, so that the copy may reach past the end."""
        return pl.ds(lax.rem(i, jnp.int32(1)), self.rows)

    def items(self, refs: Refs, lane, look, carry):
        """Runs carry = look(i, item, carry) over the items of a worker's share."""
        worker, kv_heads = self.worker(lane), jnp.int32(self.kv_heads)
        first, skip = refs.share[worker, 0], refs.share[worker, 1]
        end, rest = refs.share[worker + 1, 0], refs.share[worker + 1, 1]

        def each(i, carry):
            item = first + i
            tile = lax.div(item, kv_heads)
            j0 = jnp.where(i == 0, skip, 0)
            j1 = jnp.where(item == end, rest, refs.tile[tile, 2])
            return look(i, Item(tile, lax.rem(item, kv_heads), j0, j1), carry)

        return lax.fori_loop(0, end - first + (rest > 0).astype(jnp.int32), each, carry)
