"""Paged attention in plain XLA: tiles of queries, an online softmax over chunks of pages.

    each tile of queries loops over its row's pages, CHUNK tokens at a time:  m, l, acc  <-  online softmax

Each chunk gathers only the blocks it needs: no dense [B, P * S] copy exists at any time. The number of tiles
has a static bound, the number of chunks is the longest live row's. Milakov and Gimelshein 2018 (online softmax).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.tiles import look_up, query_tiles

CHUNK = 64
"""Key positions looked at per iteration, in whole blocks; a row pays for its last chunk whole."""
MAX_TILE = 64
"""Queries a tile at most."""


def paged_attention(
    q, k_pool, v_pool, pages, length, query_start, *, scale, sliding_window=None, soft_cap=None, max_queries=None
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention`."""
    (num_tokens, heads, head_dim), (_, kv_heads, block_size, _) = q.shape, k_pool.shape
    tile = min(max_queries or max(num_tokens // pages.shape[0], 1), MAX_TILE)
    row, index, position, place = query_tiles(num_tokens, tile, length, query_start)
    num_tiles = row.shape[0]
    queries = q if tile == 1 else look_up(q, index)
    queries = queries.reshape(num_tiles, tile, kv_heads, -1, head_dim).transpose(0, 2, 1, 3, 4)
    group = queries.shape[3]

    chunk = max(1, CHUNK // block_size)  # pages
    width = chunk * block_size  # positions
    row_pages = look_up(jnp.pad(pages, ((0, 0), (0, -pages.shape[1] % chunk))), row)
    first = jnp.zeros((), jnp.int32)
    if sliding_window is not None:
        seen_from = jnp.where(position >= 0, position - sliding_window + 1, jnp.iinfo(jnp.int32).max)
        first = jnp.clip(jnp.min(seen_from), 0, jnp.max(position) + 1) // width

    def look(i, carry):
        high, total, acc = carry
        ids = jax.lax.dynamic_slice_in_dim(row_pages, i * chunk, chunk, axis=1, allow_negative_indices=False)
        keys = _gather(k_pool, ids)  # [n, K, width, D]
        at = i * width + jnp.arange(width)
        seen = at <= position[:, :, None]
        if sliding_window is not None:
            seen &= at > position[:, :, None] - sliding_window
        # Nobody's slots may hold NaN, and 0 * NaN is NaN: what no query of the tile sees is zeroed.
        values = jnp.where(seen.any(axis=1)[:, None, :, None], _gather(v_pool, ids), 0)
        score = jnp.einsum("nkqgd,nkjd->nkqgj", queries, keys, preferred_element_type=jnp.float32) * scale
        if soft_cap is not None:
            score = soft_cap * jnp.tanh(score / soft_cap)
        score = jnp.where(seen[:, None, :, None], score, -jnp.inf)
        new_high = jnp.maximum(high, score.max(axis=-1))
        shrink, weight = jnp.exp(high - new_high), jnp.exp(score - new_high[..., None])
        part = jnp.einsum("nkqgj,nkjd->nkqgd", weight.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return new_high, total * shrink + weight.sum(axis=-1), acc * shrink[..., None] + part

    shape = (num_tiles, kv_heads, tile, group)
    start = jnp.full(shape, -1e30, jnp.float32), jnp.zeros(shape), jnp.zeros((*shape, head_dim))
    last = jax.lax.div(jnp.max(position) + width, jnp.int32(width))
    high, total, acc = jax.lax.fori_loop(first, last, look, start)

    some = total != 0  # NaN scores stay NaN: a sick row must show
    out = jnp.where(some[..., None], acc / jnp.where(some, total, 1)[..., None], 0)
    lse = jnp.where(some, high + jnp.log(jnp.where(some, total, 1)), -jnp.inf)

    def unpack(tiles):  # [n, K, tile, G, ...] -> [T, H, ...]
        flat = tiles.swapaxes(1, 2).reshape(num_tiles * tile, heads, *tiles.shape[4:])
        return flat if tile == 1 else look_up(flat, place)

    live = jnp.arange(num_tokens) < query_start[-1]
    return (
        jnp.where(live[:, None, None], unpack(out), 0).astype(q.dtype),
        jnp.where(live[:, None], unpack(lse), -jnp.inf),
    )


def _gather(pool: jax.Array, ids: jax.Array) -> jax.Array:
    """Blocks ids[n, c] of a pool [N, K, S, D] as one run of positions a head: [n, K, c * S, D]."""
    tiles = look_up(pool, ids).swapaxes(1, 2)  # [n, K, c, S, D]
    return tiles.reshape(*tiles.shape[:2], -1, tiles.shape[-1])
