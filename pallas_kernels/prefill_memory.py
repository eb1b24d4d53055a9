"""The memory warpgroup of the prefill kernel: four warps, each a stream of its own.

Queries, keys and values run ahead of the products, results leave behind them:

    page table  -- ids, read a tile ahead -->  TMA, a page at a time  -->  ring  -- full -->  products
                                                                                 <-- free --
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.prefill_walk import ROWS, ring


def multiple(x, factor: int):
    """x, a multiple of `factor`, in a form that the lowering knows as one: warps have no `pl.multiple_of`."""
    return lax.div(x, jnp.int32(factor)) * factor


def stream_queries(call, refs) -> None:
    """Copies the queries of all items."""
    stages = call.config.query_stages

    def fetch(_, item, done):
        slot = _free_slot(refs.q_free, done, stages)
        for wg in range(2):
            token, head, *_ = call.part(item, wg)
            at = pl.ds(multiple(token, 8), ROWS)
            plgpu.copy_gmem_to_smem(refs.q.at[at, head], refs.q_ring.at[slot, wg], refs.q_full.at[slot])
        return done + 1

    _drain(refs.q_free, call.items(refs, fetch, jnp.int32(0)), stages)


def stream_keys(call, refs) -> None:
    """Copies the keys of all items: those of the n-th KV tile into slot n."""
    done = _stream(call, refs, refs.k, refs.k_ring, jnp.int32(0))
    _arrive(call, refs, done)  # beside the last values are no keys
    _drain(refs.kv_free, done + 1, call.config.stages)


def stream_values(call, refs) -> None:
    """Copies the values of all items: those of the n-th KV tile into slot n + 1, beside the next one's keys."""
    _arrive(call, refs, jnp.int32(0))  # beside the first keys are no values
    done = _stream(call, refs, refs.v, refs.v_ring, jnp.int32(1))
    _drain(refs.kv_free, done, call.config.stages)


def _arrive(call, refs, done):
    """Signals what copies into the next slot would, once it is free."""
    slot = _free_slot(refs.kv_free, done, call.config.stages)
    for _ in range(call.config.kv_tile // call.copy):
        plgpu.barrier_arrive(refs.kv_full.at[slot])


def _stream(call, refs, pool, ring, done):
    """Copies KV tiles, page by page, as slots of the ring become free; returns what `done` counts then."""
    kv, stages, block_size = call.config.kv_tile, call.config.stages, jnp.int32(call.block_size)
    offsets = range(0, kv, call.copy)

    def page_ids(item, j):
        pages = [lax.div(j * kv + o, block_size) for o in offsets]
        return tuple(refs.pages[item.row, jnp.minimum(p, call.num_pages - 1)] for p in pages)

    def fetch(_, item, done):
        kv_head = lax.div(item.head, jnp.int32(call.group))

        def one(j, carry):
            done, *ids = carry
            ahead = page_ids(item, j + 1)  # the table's latency is spent while the slot is still in use
            slot = _free_slot(refs.kv_free, done, stages)
            for o, page in zip(offsets, ids, strict=True):
                at = 0 if kv % call.block_size == 0 else lax.rem(j * kv + o, block_size)
                to = ring.at[slot, pl.ds(o, call.copy)]
                plgpu.copy_gmem_to_smem(pool.at[page, kv_head, pl.ds(at, call.copy)], to, refs.kv_full.at[slot])
            return done + 1, *ahead

        return lax.fori_loop(item.begin, item.end, one, (done, *page_ids(item, item.begin)))[0]

    return call.items(refs, fetch, done)


def stream_results(call, refs) -> None:
    """Copies whole tiles of results out of their queries' place, which is free then; the others are out already."""

    def store(i, item, _):
        buffer = call.buffer(i)
        plgpu.barrier_wait(refs.o_full.at[buffer])
        for wg in range(2):
            token, head, low, high = call.part(item, wg)

            @pl.when((low == 0) & (high == ROWS))
            def _(wg=wg, token=token, head=head):
                at = pl.ds(multiple(token, 8), ROWS)
                plgpu.copy_smem_to_gmem(refs.q_ring.at[buffer, wg], refs.out.at[at, head])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(refs.q_free.at[buffer])
        return jnp.int32(0)

    call.items(refs, store, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _free_slot(free, done, stages):
    """The ring's next slot, waited for where it was used before."""
    slot = ring(done, stages)

    @pl.when(done >= stages)
    def _():
        plgpu.barrier_wait(free.at[slot])

    return slot


def _drain(free, done, stages):
    """Waits until all slots are free: nobody leaves while others still signal."""
    for back in reversed(range(stages)):

        @pl.when(done > back)
        def _(back=back):
            plgpu.barrier_wait(free.at[ring(done - 1 - back, stages)])
