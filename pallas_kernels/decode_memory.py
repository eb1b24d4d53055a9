"""The memory side of a decode worker: queries, then page by page keys and values, as slots of the rings become free.

page table  -- ids -->  TMA, `unit` tokens at a time  -->  ring  -- full -->  products
                                                                 <-- free --
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_walk import Call, Item, Refs


def stream(call: Call, refs: Refs, lane) -> None:
    """Copies everything that a worker's share reads."""
    kv_tile, unit, block_size = call.config.kv_tile, call.unit, jnp.int32(call.block_size)
    last_page = refs.pages.shape[1] - 1

    def fetch(i, item: Item, done):
        buffer = call.buffer(lane, i)
        pl.when(i >= 2)(lambda: plgpu.barrier_wait(refs.free.q.at[buffer]))
        queries = refs.q.at[item.tile, item.head, call.some_rows(i)]
        plgpu.copy_gmem_to_smem(queries, refs.q_ring.at[buffer, pl.ds(0, call.rows)], refs.full.q.at[buffer])
        row, begin = refs.tile[item.tile, 0], refs.tile[item.tile, 1]

        def one(j, done):
            slot = call.slot(lane, done)
            tokens = [(begin + j) * kv_tile + u for u in range(0, kv_tile, unit)]
            pages = [jnp.minimum(lax.div(t, block_size), last_page) for t in tokens]
            ids = [refs.pages[row, page] for page in pages]
            for pool, ring, full, free in (
                (refs.k, refs.k_ring, refs.full.k, refs.free.k),
                (refs.v, refs.v_ring, refs.full.v, refs.free.v),
            ):
                pl.when(done >= call.config.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                for u, (t, page) in enumerate(zip(tokens, ids, strict=True)):
                    at = pl.ds(pl.multiple_of(lax.rem(t, block_size), unit), unit)
                    target = ring.at[slot, pl.ds(u * unit, unit)]
                    plgpu.copy_gmem_to_smem(pool.at[page, item.head, at], target, full.at[slot])
            return done + 1

        return lax.fori_loop(item.j0, item.j1, one, done)

    call.items(refs, lane, fetch, jnp.int32(0))


def stream_warps(call: Call, refs: Refs) -> None:
    """One warpgroup copies for all workers: a warp for the keys (and queries) and one for the values of each."""

    @plgpu.warp_map
    def _(warp):
        for lane in range(call.config.workers):
            pl.when(warp == 2 * lane)(lambda lane=lane: _stream(call, refs, lane, keys=True))
            pl.when(warp == 2 * lane + 1)(lambda lane=lane: _stream(call, refs, lane, keys=False))


def _stream(call: Call, refs: Refs, lane, *, keys: bool) -> None:
    kv_tile, unit, stages = call.config.kv_tile, call.unit, call.config.stages
    block_size, last_page = jnp.int32(call.block_size), refs.pages.shape[1] - 1
    offsets = range(0, kv_tile, unit)
    pool, ring, full, free = (
        (refs.k, refs.k_ring, refs.full.k, refs.free.k) if keys else (refs.v, refs.v_ring, refs.full.v, refs.free.v)
    )

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
            pl.when(done >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            for o, page in zip(offsets, ids, strict=True):
                at = 0
                if kv_tile % call.block_size:
                    at = lax.div(lax.rem((begin + j) * kv_tile + o, block_size), jnp.int32(unit)) * unit
                plgpu.copy_gmem_to_smem(
                    pool.at[page, item.head, pl.ds(at, unit)], ring.at[slot, pl.ds(o, unit)], full.at[slot]
                )
            return done + 1, *ahead

        return lax.fori_loop(item.j0, item.j1, one, (done, *page_ids(item.j0)))[0]

    call.items(refs, lane, fetch, jnp.int32(0))
