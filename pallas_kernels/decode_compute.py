"""The compute side of a decode worker: scores, online softmax, weighted values, one KV tile after the other.

    S = Q K'  ->  m' = max(m, S)  ->  P = 2^(S - m')  ->  l = l 2^(m - m') + sum P,  O = O 2^(m - m') + P V

Milakov and Gimelshein 2018 (online softmax); Dao et al. 2022 (tiles).
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import WGMMAAccumulatorRef

from pallas_kernels.decode_walk import ROWS, Call, Item, Refs
from pallas_kernels.merge import LOW
from pallas_kernels.zero_dead import zero_dead

WGMMA = plgpu.Layout.WGMMA
LOG2_E = math.log2(math.e)


def compute(call: Call, refs: Refs, lane) -> None:
    """All items of a worker's share."""
    call.items(refs, lane, functools.partial(_attend, call, refs, lane), jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _attend(call: Call, refs: Refs, lane, i, item: Item, done):
    """One item; `done` KV tiles came before it."""
    buffer, j0, j1 = call.buffer(lane, i), item.j0, item.j1
    begin, count, first, last = (refs.tile[item.tile, f] for f in range(1, 5))
    plgpu.barrier_wait(refs.full.q.at[buffer])
    look = functools.partial(_look, call, refs, lane, buffer, begin, first, last, done - j0)
    per_row = WGMMA.reduce(1)
    carry = (
        plgpu.layout_cast(jnp.zeros((ROWS, call.head_dim), jnp.float32), WGMMA),
        plgpu.layout_cast(jnp.full((ROWS,), LOW, jnp.float32), per_row),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), per_row),
    )
    # Every query sees the KV tiles in [edge, full) whole.
    kv_tile = jnp.int32(call.config.kv_tile)
    full, edge = jnp.clip(lax.div(first + 1, kv_tile) - begin, j0, j1), j0
    if call.sliding_window is not None:
        outside = jnp.maximum(last - call.sliding_window + 1, 0) + kv_tile - 1
        edge = jnp.clip(lax.div(outside, kv_tile) - begin, j0, j1)
        full = jnp.maximum(full, edge)
        carry = lax.fori_loop(j0, edge, functools.partial(look, masked=True), carry)
    carry = lax.fori_loop(edge, full, functools.partial(look, masked=False), carry)
    acc, high, total = lax.fori_loop(full, j1, functools.partial(look, masked=True), carry)

    some = total != 0  # NaN stays: a sick row must show
    safe = jnp.where(some, total, 1.0)
    acc = acc * lax.broadcast_in_dim(1.0 / safe, acc.shape, [0])
    lse = jnp.where(some, high + jnp.log2(safe), -jnp.inf) * (1 / LOG2_E)
    _store(call, refs, lane, i, item, (j0 == 0) & (j1 == count), acc, lse)
    plgpu.barrier_arrive(refs.free.q.at[buffer])
    return done + j1 - j0


def _look(call: Call, refs: Refs, lane, buffer, begin, first, last, before, j, carry, *, masked: bool):
    """One KV tile of an item."""
    acc, high, total = carry
    slot = call.slot(lane, before + j)
    start = (begin + j) * call.config.kv_tile
    plgpu.barrier_wait(refs.full.k.at[slot])

    def scores(ref):
        plgpu.wgmma(ref, refs.q_ring.at[buffer], refs.k_ring.at[slot].T)
        return ref[...]

    s = pl.run_scoped(scores, WGMMAAccumulatorRef((ROWS, call.config.kv_tile), jnp.float32))
    plgpu.barrier_arrive(refs.free.k.at[slot])
    if call.soft_cap is None:
        s = s * (call.scale * LOG2_E)
    else:
        s = jnp.tanh(s * (call.scale / call.soft_cap)) * (call.soft_cap * LOG2_E)
    if masked:
        s = jnp.where(_seen(call, s.shape, start, first, last), s, -jnp.inf)
    new_high = jnp.maximum(high, s.max(axis=1))
    shrink = jnp.exp2(high - new_high)
    p = jnp.exp2(s - lax.broadcast_in_dim(new_high, s.shape, [0]))
    total = total * shrink + p.sum(axis=1)
    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
    plgpu.barrier_wait(refs.full.v.at[slot])
    if masked:
        dead_to = 0 if call.sliding_window is None else first - call.sliding_window + 1
        zero_dead(refs.v_ring.at[slot], start, dead_to, last + 1)
    acc = _weigh(call, refs, lane, acc, p.astype(call.dtype), refs.v_ring.at[slot])
    plgpu.barrier_arrive(refs.free.v.at[slot])
    return acc, new_high, total


def _weigh(call: Call, refs: Refs, lane, acc, p, values):
    """Acc + p @ values. The interpreter knows neither p in registers nor an accumulator that starts with a value."""
    if call.interpret:
        refs.weights[lane] = p
        plgpu.commit_smem()

        def anew(ref):
            plgpu.wgmma(ref, refs.weights.at[lane], values)
            return ref[...]

        return acc + pl.run_scoped(anew, WGMMAAccumulatorRef(acc.shape, jnp.float32))

    def onto(ref):
        plgpu.wgmma(ref, p, values)

    return pl.run_state(onto)(WGMMAAccumulatorRef.init(acc))


def _seen(call: Call, shape, start, first, last):
    """Which of a KV tile's positions (columns) each row may see; row r is query r % tile_size."""
    at = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA) + start
    position = last
    if call.tile_size > 1:
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)
        position = jnp.minimum(first + lax.rem(row, jnp.int32(call.tile_size)), last)
    seen = at <= position
    return seen if call.sliding_window is None else seen & (at > position - call.sliding_window)


def _store(call: Call, refs: Refs, lane, i, item: Item, whole, acc, lse) -> None:
    """A whole item goes to its place, a part of one beside the others; the queries' buffer stages it."""
    stage = refs.q_ring.at[call.buffer(lane, i)]
    value = acc.astype(call.dtype)
    stage[...] = value
    refs.lse_stage[lane] = lse
    plgpu.commit_smem()
    mine, mine_lse = stage.at[pl.ds(0, call.rows)], refs.lse_stage.at[lane, pl.ds(0, call.rows)]

    @pl.when(whole)
    def _():
        plgpu.copy_smem_to_gmem(mine, refs.out.at[item.tile, item.head, call.some_rows(i)])
        plgpu.copy_smem_to_gmem(mine_lse, refs.lse.at[item.tile, item.head])

    @pl.when(~whole)
    def _():
        part = 2 * call.worker(lane) + jnp.minimum(i, 1)
        plgpu.copy_smem_to_gmem(mine, refs.part.at[part, 0])
        plgpu.copy_smem_to_gmem(mine_lse, refs.part_lse.at[part])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        stage[...] = (acc - value.astype(jnp.float32)).astype(call.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, refs.part.at[part, 1])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
