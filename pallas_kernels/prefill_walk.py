"""A prefill call's sizes, its work items and the way through them that all warps of a program share.

Items, (query tile, heads), come heaviest first; every other round of the programs is dealt backwards:

    program   0 1 2
    items     0 1 2
              5 4 3
              6 7 8
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.config import PrefillConfig

ROWS = 64
"""Queries a warpgroup holds: the rows of its matrix products."""


def ring(n, size: int):
    """The n-th place of a ring; without a sign, which would cost instructions of its own."""
    return lax.rem(n.astype(jnp.uint32), jnp.uint32(size)).astype(jnp.int32)


class Item(NamedTuple):
    """One work item: scalars of the plan, and the heads that it is about."""

    token: jax.Array  # first token of the tile on the token axis, a multiple of 8
    low: jax.Array  # rows low <= r < high of the tile are its own
    high: jax.Array
    position: jax.Array  # of the tile's row 0 in its sequence; negative where row 0 is a neighbour's
    row: jax.Array
    begin: jax.Array  # KV tiles begin <= j < end
    end: jax.Array
    dead_to: jax.Array  # slots below `dead_to` and from `dead_from` on are nobody's
    dead_from: jax.Array
    head: jax.Array  # query head of warpgroup 0
    more: jax.Array  # whether the program has a next item and that sees any key


class Refs(NamedTuple):
    """Everything in memory: arguments, results, rings, and the barriers that say full or free."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    pages: jax.Array
    tile: jax.Array
    live: jax.Array
    out: jax.Array
    lse: jax.Array
    q_ring: jax.Array
    k_ring: jax.Array
    v_ring: jax.Array
    weights: jax.Array | None
    q_full: jax.Array
    kv_full: jax.Array
    q_free: jax.Array
    kv_free: jax.Array
    o_full: jax.Array
    turn: jax.Array


@dataclasses.dataclass(frozen=True)
class Call:
    """Static sizes of one call, and who does what in it."""

    config: PrefillConfig
    heads: int
    head_dim: int
    group: int
    block_size: int
    num_pages: int
    paired: bool
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    interpret: bool
    dtype: jnp.dtype

    @property
    def units(self) -> int:
        """Work items a query tile."""
        return self.heads // 2 if self.paired else self.heads

    @property
    def copy(self) -> int:
        """Tokens a TMA copy: never across a page."""
        return math.gcd(self.block_size, self.config.kv_tile)

    @property
    def programs(self) -> int:
        """Programs that share the items; more than there can be items where each gets one."""
        return self.config.programs or 2**24

    @property
    def ahead(self) -> bool:
        """Whether an item's last product is issued with the next item's first: their queries are in memory together."""
        return self.config.query_stages > 1

    def buffer(self, i):
        """Where the i-th item's queries are."""
        return ring(i, self.config.query_stages)

    def slot(self, n):
        """Where the keys of a program's n-th KV tile are, and the values of the one before it."""
        return ring(n, self.config.stages)

    def part(self, item, wg):
        """A warpgroup's share of an item: its first token, its head, and its rows from, to."""
        if self.paired:
            return item.token, item.head + wg, item.low, item.high
        past = wg * ROWS
        return item.token + past, item.head, jnp.maximum(item.low - past, 0), jnp.minimum(item.high - past, ROWS)

    def items(self, refs, look, carry):
        """Runs carry = look(i, item, carry) over the items of this program; the next one is read ahead."""

        def each(i, carry):
            (_, head, *fields), carry = carry
            ahead = self._read(refs, i + 1)
            item = Item(*fields, head=head, more=ahead[0] & (ahead[2 + 5] < ahead[2 + 6]))
            return ahead, look(i, item, carry)

        total, programs = refs.live[0] * self.units, jnp.int32(self.programs)
        rounds = lax.div(total, programs)
        mine = rounds + (self._index(rounds) < total).astype(jnp.int32)
        return lax.fori_loop(0, mine, each, (self._read(refs, jnp.int32(0)), carry))[1]

    def _index(self, i):
        """Which one of all items is the i-th of this program."""
        program, programs = lax.axis_index("program"), jnp.int32(self.programs)
        return i * programs + jnp.where(lax.rem(i, jnp.int32(2)) == 0, program, programs - 1 - program)

    def _read(self, refs, i):
        """Whether there is an i-th item, its head, and its tile's line of the plan."""
        index, end = self._index(i), refs.live[0] * self.units
        inside = jnp.minimum(index, end - 1)
        tile, unit = lax.div(inside, jnp.int32(self.units)), lax.rem(inside, jnp.int32(self.units))
        head = unit * 2 if self.paired else unit
        return index < end, head, *(refs.tile[tile, f] for f in range(9))

    def begins(self, refs):
        """Whether this program's first item sees any key; those that see none come last."""
        there, _, *fields = self._read(refs, jnp.int32(0))
        return there & (fields[5] < fields[6])
