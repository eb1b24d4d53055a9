"""The memory side of decode: one warpgroup for all workers of an SM, a warp a stream.

page table  -- ids, a tile ahead -->  TMA, `unit` tokens at a time  -->  ring  -- full -->  products
                                                                              <-- free --
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_walk import Call, Item, Refs


def stream(call: Call, refs: Refs) -> None:
    """Copies what all workers' shares read: a warp for the queries and keys of each, a warp for its values."""

    @plgpu.warp_map
    def _(warp):
        for lane in range(call.config.workers):
            pl.when(warp == 2 * lane)(lambda lane=lane: _stream(call, refs, lane, keys=True))
            pl.when(warp == 2 * lane + 1)(lambda lane=lane: _stream(call, refs, lane, keys=False))


def _stream(call: Call, refs: Refs, lane: int, *, keys: bool) -> None:
    kv_tile, unit = call.config.kv_tile, call.unit
    block_size, last_page = jnp.int32(call.block_size), refs.pages.shape[1] - 1
    offsets = range(0, kv_tile, unit)
    keys_side = refs.k, refs.k_ring, refs.full.k, refs.free.k
    values_side = refs.v, refs.v_ring, refs.full.v, refs.free.v
    pool, ring, full, free = keys_side if keys else values_side

    def fetch(i, item: Item, done):
        if keys:
            buffer = call.buffer(lane, i)
            pl.when(i >= 2)(lambda: plgpu.barrier_wait(refs.free.q.at[buffer]))
            queries = refs.q.at[item.tile, item.head, call.some_rows(i)]
            plgpu.copy_gmem_to_smem(queries, refs.q_ring.at[buffer, pl.ds(0, call.rows)], refs.full.q.at[buffer])
        row, begin = refs.tile[item.tile, 0], refs.tile[item.tile, 1]

        def page_ids(j):
            pages = [lax.div((begin + j) * kv_tile + o, block_size) for o in offsets]
            return tuple(refs.pages[row, jnp.minimum(p, last_page)] for p in pages)

        def one(j, carry):
            done, *ids = carry
            ahead = page_ids(j + 1)  # the table's latency is spent while the slot is still in use
            slot = call.slot(lane, done)
            pl.when(done >= call.config.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            for o, page in zip(offsets, ids, strict=True):
                at = 0
                if kv_tile % call.block_size:  # a multiple of `unit`, in a form that the lowering knows as one
                    at = lax.div(lax.rem((begin + j) * kv_tile + o, block_size), jnp.int32(unit)) * unit
                source = pool.at[page, item.head, pl.ds(at, unit)]
                plgpu.copy_gmem_to_smem(source, ring.at[slot, pl.ds(o, unit)], full.at[slot])
            return done + 1, *ahead

        return lax.fori_loop(item.j0, item.j1, one, (done, *page_ids(item.j0)))[0]

    call.items(refs, lane, fetch, jnp.int32(0))
