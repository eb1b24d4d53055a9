"""Packed queries dealt to tiles of one row each: what lets one loop serve decode, verify and prefill.

token axis  | row 0: 5 queries | row 1: 2 | idle |     tiles of 4:  [0 0 0 0] [0 . . .] [1 1 . .]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class QueryTiles(NamedTuple):
    """n tiles of `tile` queries; those past the end of a row are padding."""

    row: jax.Array  # int32 [n]
    token: jax.Array  # int32 [n, tile] each query's place on the token axis
    position: jax.Array  # int32 [n, tile] of each query in its row, -1 for padding
    place: jax.Array  # int32 [T] of each token in the flattened tiles


def query_tiles(num_tokens: int, tile: int, length: jax.Array, query_start: jax.Array) -> QueryTiles:
    """Deals `num_tokens` packed queries to tiles of at most `tile` queries."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    if tile == 1:  # a token is a tile
        row = _row_of(token, query_start)
        position = jnp.where(token < query_start[-1], look_up(length - query_start[1:], row) + token, -1)
        return QueryTiles(row, token[:, None], position[:, None], token)
    rows = length.shape[0]
    num_tiles = (num_tokens + rows * (tile - 1)) // tile  # sum of ceil(count / tile), at most
    tiles_of_row = jax.lax.div(jnp.diff(query_start) + tile - 1, jnp.int32(tile))
    first_tile = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(tiles_of_row, dtype=jnp.int32)])
    i = jnp.arange(num_tiles, dtype=jnp.int32)
    row = _row_of(i, first_tile)
    # Of a row, what is added to a tile's or a token's number:
    begin, end, before = query_start[:-1] - first_tile[:-1] * tile, query_start[1:], length - query_start[1:]
    index = (look_up(begin, row) + i * tile)[:, None] + jnp.arange(tile, dtype=jnp.int32)
    real = (i < first_tile[-1])[:, None] & (index < look_up(end, row)[:, None])
    position = jnp.where(real, look_up(before, row)[:, None] + index, -1)
    place = token - look_up(begin, _row_of(token, query_start))
    return QueryTiles(row, jnp.clip(index, 0, num_tokens - 1), position, jnp.clip(place, 0, num_tiles * tile - 1))


def _row_of(i: jax.Array, start: jax.Array) -> jax.Array:
    """The row b with start[b] <= i < start[b + 1]; the last one for what lies past the end."""
    return jnp.minimum(jnp.sum(i[:, None] >= start[1:], axis=1, dtype=jnp.int32), start.size - 2)


def look_up(x: jax.Array, i: jax.Array) -> jax.Array:
    """x[i] where no index is negative or out of bounds: checks of both are most of what such a line compiles to."""
    return x.at[i].get(mode="promise_in_bounds", wrap_negative_indices=False)
