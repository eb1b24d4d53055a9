"""Queries dealt to tiles, tiles in the order of their work. Plain XLA; equal calls of a program's layers are one.

token axis       |  row 0: 11 queries  | row 1: 3 | idle: 2 |
tiles of 8       [. . . . . . . .][. . . - - - - -]
                                  [- - - . . . - -]                - a neighbour's, computed and not written
                                  [- - - - - - . .]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

ALIGN = 8
"""Tiles start at multiples of this on the token axis: TMA moves rows by eights."""


class Plan(NamedTuple):
    """Query tiles, heaviest first."""

    tile: jax.Array  # int32 [n, 9]: first token; own rows from, to; position of its row 0; row;
    # KV tiles from, to; nobody's slots below, from
    live: jax.Array  # int32 [1]: tiles in use


def plan_tiles(
    num_tokens: int,
    length: jax.Array,
    query_start: jax.Array,
    *,
    tile: int,
    kv_tile: int,
    sliding_window: int | None,
    least: int = 1,
) -> Plan:
    """Deals `num_tokens` packed queries to tiles of at most `tile`; idle tokens form a last row without keys.

    Rows of fewer than `least` queries get no tile.
    """
    rows = length.shape[0] + 1
    query_start = jnp.concatenate([query_start, jnp.full(1, num_tokens, jnp.int32)])
    length = jnp.concatenate([length, jnp.zeros(1, jnp.int32)])
    start, count = query_start[:-1], jnp.diff(query_start)
    aligned = start // ALIGN * ALIGN
    due = count >= jnp.full(rows, least).at[-1].set(1)  # idle tokens are always written
    tiles_of_row = jnp.where(due, (start + count - aligned + tile - 1) // tile, 0)
    end_of_row = jnp.cumsum(tiles_of_row, dtype=jnp.int32)

    num_tiles = (num_tokens + rows * (tile + ALIGN - 2)) // tile  # sum of tiles_of_row, at most
    i = jnp.arange(num_tiles, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(i[:, None] >= end_of_row, axis=1, dtype=jnp.int32), rows - 1)
    token = aligned[row] + (i - end_of_row[row] + tiles_of_row[row]) * tile
    low = jnp.maximum(start[row] - token, 0)
    high = jnp.minimum(start[row] + count[row] - token, tile)
    position = length[row] - count[row] + token - start[row]

    begin, dead_to = jnp.zeros_like(row), jnp.zeros_like(row)
    if sliding_window is not None:
        begin = jnp.maximum(position + low - sliding_window + 1, 0) // kv_tile
        dead_to = jnp.maximum(length - count - sliding_window + 1, 0)[row]
    end = jnp.where((row < rows - 1) & (i < end_of_row[-1]), (position + high - 1) // kv_tile + 1, begin)
    fields = [token, low, high, position, jnp.minimum(row, rows - 2), begin, end, dead_to, length[row]]

    work = jnp.where(i < end_of_row[-1], end - begin, -1)
    before = (work > work[:, None]) | ((work == work[:, None]) & (i < i[:, None]))
    place = jnp.sum(before, axis=1, dtype=jnp.int32)
    tiles = jnp.zeros((num_tiles, len(fields)), jnp.int32).at[place].set(jnp.stack(fields, 1), unique_indices=True)
    return Plan(tiles, end_of_row[-1:])
