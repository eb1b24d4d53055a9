"""Who looks at what: the keys of all query tiles, dealt to workers in equal shares. Plain XLA, once a step.

    items        (tile, KV head) -> its run of KV tiles     |----a----|--b--|------c------|-d-|
    workers      equal shares of all of it                  |  0  |  1  |  2  |  3  |  4  | 5 |

A worker's share begins and ends anywhere, so no worker waits for another, however ragged the rows are. An item costs
more than its KV tiles, for its queries, its result and the wait for its first keys: counted as `item_tiles`, so that
who has many short items has fewer keys. An item inside one share is written once; one that crosses a border leaves
partial results, at most two a worker, merged later. (Osama et al. 2023 share out matrix products in this way, as
"Stream-K".)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tiles import QueryTiles


class Schedule(NamedTuple):
    """The KV tiles of all items, dealt to workers."""

    tile: jax.Array  # int32 [n, 5]: row, first KV tile, number of KV tiles, first and last query position
    share: jax.Array  # int32 [workers + 1, 3]: item and KV tile in it where each worker begins, borders inside the item


def schedule(
    tiles: QueryTiles, *, kv_tile: int, kv_heads: int, workers: int, sliding_window: int | None, item_tiles: int
) -> Schedule:
    """Deals the KV tiles that each (query tile, KV head) must see to `workers` equal shares.

    Idle tiles are items without a KV tile: their output, zero, is written like any other.
    """
    last = tiles.position.max(axis=1)
    first_position = tiles.position[:, 0]
    begin = jnp.zeros_like(last)
    if sliding_window is not None:
        begin = jnp.maximum(first_position - sliding_window + 1, 0) // kv_tile
    count = jnp.maximum(last // kv_tile + 1 - begin, 0)
    info = jnp.stack([tiles.row, begin, count, first_position, last], axis=1)

    cost = jnp.maximum(count + item_tiles, 1)
    end = jnp.cumsum(cost, dtype=jnp.int32) * kv_heads
    size = -(-end[-1] // workers)
    at = jnp.minimum(jnp.arange(workers + 1, dtype=jnp.int32) * size, end[-1])
    tile = jnp.sum(end <= at[:, None], axis=1, dtype=jnp.int32)
    inside = jnp.minimum(tile, count.shape[0] - 1)
    rest = jnp.where(at < end[-1], at - (end - cost * kv_heads)[inside], 0)
    head = rest // cost[inside]
    item, skip = tile * kv_heads + head, jnp.maximum(rest - head * cost[inside] - item_tiles, 0)
    borders = jnp.sum((item == item[:, None]) & (skip > 0), axis=1, dtype=jnp.int32)
    return Schedule(info, jnp.stack([item, skip, borders], axis=1))
