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
    rows = length.shape[0]
    num_tiles = (num_tokens + rows * (tile - 1)) // tile  # sum of ceil(count / tile), at most
    tiles_of_row = (jnp.diff(query_start) + tile - 1) // tile
    first_tile = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(tiles_of_row, dtype=jnp.int32)])
    i = jnp.arange(num_tiles, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(i[:, None] >= first_tile[1:], axis=1, dtype=jnp.int32), rows - 1)
    index = (query_start[row] + (i - first_tile[row]) * tile)[:, None] + jnp.arange(tile, dtype=jnp.int32)
    real = (i < first_tile[-1])[:, None] & (index < query_start[row + 1][:, None])
    position = jnp.where(real, (length[row] - query_start[row + 1])[:, None] + index, -1)

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    token_row = jnp.minimum(jnp.sum(token[:, None] >= query_start[1:], axis=1), rows - 1)
    place = first_tile[token_row] * tile + token - query_start[token_row]
    return QueryTiles(row, jnp.clip(index, 0, num_tokens - 1), position, jnp.clip(place, 0, num_tiles * tile - 1))
