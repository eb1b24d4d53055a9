"""The memory side of decode: one warpgroup for all workers of an SM, a warp a stream.

page table  -- ids, a tile ahead -->  TMA, `unit` tokens at a time  -->  ring  -- full -->  products
                                                                              <-- free --

A tile that reaches past its row's end is copied in smaller pieces: what is dead costs next to no memory traffic.
"""

import functools
import itertools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_walk import Call, Item, Refs

WARPS = 4
"""Of a warpgroup."""


def stream(call: Call, refs: Refs) -> None:
    """Copies what all workers' shares read: keys and values are streams of their own, for few workers of two warps."""
    warps = min(WARPS // (2 * call.config.workers), call.config.kv_tile // call.unit)

    @plgpu.warp_map
    def _(warp):
        for i, (lane, keys, part) in enumerate(
            itertools.product(range(call.config.workers), (True, False), range(warps))
        ):
            mine = functools.partial(_stream, call, refs, lane, keys=keys, part=part, parts=warps)
            pl.when(warp == i)(mine)


def _stream(call: Call, refs: Refs, lane: int, *, keys: bool, part: int, parts: int) -> None:
    kv_tile, unit = call.config.kv_tile, call.unit
    block_size, offsets = jnp.int32(call.block_size), range(part * unit, kv_tile, parts * unit)
    keys_side = refs.k, refs.k_ring, refs.full.k, refs.free.k
    values_side = refs.v, refs.v_ring, refs.full.v, refs.free.v
    pool, ring, full, free = keys_side if keys else values_side

    def fetch(i, item: Item, done):
        if keys and part == 0:
            buffer = call.buffer(lane, i)
            pl.when(i >= 2)(lambda: plgpu.barrier_wait(refs.free.q.at[buffer]))
            queries = refs.q.at[item.tile, item.head, call.some_rows(i)]
            plgpu.copy_gmem_to_smem(queries, refs.q_ring.at[buffer, pl.ds(0, call.rows)], refs.full.q.at[buffer])
        row, begin, last = refs.tile[item.tile, 0], refs.tile[item.tile, 1], refs.tile[item.tile, 4]
        last_page = lax.div(jnp.maximum(last, 0), block_size)

        def page_ids(j):
            pages = [lax.div((begin + j) * kv_tile + o, block_size) for o in offsets]
            return tuple(refs.pages[row, jnp.minimum(p, last_page)] for p in pages)

        def one(j, carry, *, sizes):
            done, *ids = carry
            ahead = page_ids(j + 1)  # the table's latency is spent while the slot is still in use
            slot = call.slot(lane, done)
            pl.when(done >= call.config.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            for o, page in zip(offsets, ids, strict=True):
                at, live = 0, last + 1 - (begin + j) * kv_tile - o
                if kv_tile % call.block_size:  # a multiple of `unit`, in a form that the lowering knows as one
                    at = lax.div(lax.rem((begin + j) * kv_tile + o, block_size), jnp.int32(unit)) * unit

                def copy(size, at=at, o=o, page=page):
                    source = pool.at[page, item.head, pl.ds(at, size)]
                    plgpu.copy_gmem_to_smem(source, ring.at[slot, pl.ds(o, size)], full.at[slot])

                _smallest(sizes, live, copy)
            return done + 1, *ahead

        whole = jnp.clip(lax.div(last + 1, jnp.int32(kv_tile)) - begin, item.j0, item.j1)
        carry, tail = (done, *page_ids(item.j0)), _sizes(unit, call.config.tail_sizes)
        carry = lax.fori_loop(item.j0, whole, functools.partial(one, sizes=[unit]), carry)
        return lax.fori_loop(whole, item.j1, functools.partial(one, sizes=tail), carry)[0]

    call.items(refs, lane, fetch, jnp.int32(0))


def _sizes(unit: int, count: int) -> list[int]:
    """Tokens that a copy may have, largest first: `count` at most, a memory tile's 8 rows or more apart."""
    step = -(-unit // (8 * count)) * 8
    return list(range(unit, 0, -step))


def _smallest(sizes: list[int], live, copy) -> None:
    """copy(size) of the smallest size that holds `live` tokens: one copy always, for the barrier counts them."""
    if len(sizes) == 1:
        return copy(sizes[0])
    which = sum((live <= size).astype(jnp.int32) for size in sizes[1:])
    for i, size in enumerate(sizes):
        pl.when(which == i)(lambda size=size: copy(size))
