"""A compute warpgroup of the prefill kernel: softmax, turn, products, softmax, turn, products.

    warpgroup 0  | P V, Q K' |  softmax  | P V, Q K' |  softmax  |
    warpgroup 1              | P V, Q K' |  softmax  | P V, Q K' |     a turn ends when the products are issued

The scores of tile j + 1 are multiplied together with the values of tile j, across items too, so that the tensor cores
find the next product waiting. They arrive together too, on one barrier.

A tensor core takes a product in small instructions and has room for few, so a warpgroup is held while it issues, then
waits for the last, then exponentiates: its own chain of products, waits and softmax is what a tile costs, and whatever
is not in it is free. The names of scopes are those of the timeline in benchmarks/gpu_timeline.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import WGMMAAccumulatorRef

from pallas_kernels.merge import LOW
from pallas_kernels.prefill_walk import ROWS
from pallas_kernels.store_rows import store_rows
from pallas_kernels.zero_dead import zero_dead

LOG2_E = math.log2(math.e)
COLUMNS = 8  # of a tile of scores, which four threads hold together


def compute(call, refs, wg) -> None:
    """All items of a program, for one of its two compute warpgroups."""
    pl.when(wg == 1)(lambda: _pass_turn(refs, wg))  # warpgroup 0 begins
    zero = jnp.int32(0)
    s = plgpu.layout_cast(jnp.zeros((ROWS, call.config.kv_tile), jnp.float32), plgpu.Layout.WGMMA)
    plgpu.barrier_wait(refs.kv_full.at[0])
    if call.ahead:
        s = _first_scores(call, refs, wg, zero, zero, call.begins(refs))
        plgpu.barrier_arrive(refs.kv_free.at[0])
    done, _ = call.items(refs, functools.partial(_attend, call, refs, wg), (zero, s))
    if not call.ahead:
        plgpu.barrier_arrive(refs.kv_free.at[call.slot(done)])
    pl.when(wg == 0)(lambda: _await_turn(refs, wg))


def _await_turn(refs, wg):
    plgpu.barrier_wait(refs.turn.at[wg])


def _pass_turn(refs, wg):
    plgpu.barrier_arrive(refs.turn.at[1 - wg])


def _first_scores(call, refs, wg, i, done, there):
    """Products of an item's queries with its first KV tile, where there is one."""
    buffer, slot = call.buffer(i), call.slot(done)

    pl.when(there)(lambda: plgpu.barrier_wait(refs.q_full.at[buffer]))
    _await_turn(refs, wg)

    def multiply(ref):
        plgpu.wgmma(ref, refs.q_ring.at[buffer, wg], refs.k_ring.at[slot].T)
        _pass_turn(refs, wg)
        return ref[...]

    return pl.run_scoped(multiply, WGMMAAccumulatorRef((ROWS, call.config.kv_tile), jnp.float32))


def _attend(call, refs, wg, i, item, carry):
    """One item, from its first scores to its rows of the output; `done` KV tiles came before it."""
    done, s = carry
    kv, buffer = jnp.int32(call.config.kv_tile), call.buffer(i)
    token, head, low, high = call.part(item, wg)
    position = item.position + token - item.token
    # KV tiles before `edge` lie on the window's edge, those before `inner` are seen whole and are not the last.
    edge = item.begin
    if call.sliding_window is not None:
        edge = lax.div(jnp.maximum(position + high - call.sliding_window, 0) + kv - 1, kv)
        edge = jnp.clip(edge, item.begin, item.end)
    inner = jnp.clip(lax.div(position + low + 1, kv), edge, jnp.maximum(item.end - 1, edge))

    @pl.when(item.begin == item.end)
    def _():
        plgpu.barrier_wait(refs.q_full.at[buffer])

    if not call.ahead:
        s = _first_scores(call, refs, wg, i, done, item.begin < item.end)
        pl.when(item.begin < item.end)(lambda: plgpu.barrier_arrive(refs.kv_free.at[call.slot(done)]))
    step = functools.partial(_step, call, refs, wg, i, item, position, done - item.begin)
    carry = (
        plgpu.layout_cast(jnp.zeros((ROWS, call.head_dim), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((ROWS,), LOW, jnp.float32), plgpu.Layout.WGMMA.reduce(1)),
        plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), plgpu.Layout.WGMMA),
        s,
    )
    end = item.end if call.ahead else jnp.maximum(item.end - 1, item.begin)
    edge, inner = jnp.minimum(edge, end), jnp.minimum(inner, end)
    if call.sliding_window is not None:
        carry = lax.fori_loop(item.begin, edge, functools.partial(step, masked=True), carry)
    carry = lax.fori_loop(edge, inner, functools.partial(step, masked=False), carry)
    carry = lax.fori_loop(inner, end, functools.partial(step, masked=True), carry)
    if not call.ahead:
        carry = lax.fori_loop(end, item.end, functools.partial(step, masked=True, last=True), carry)
    acc, top, total, s = carry
    total = total.sum(axis=1)

    some = total != 0  # NaN stays: a sick row must show
    safe = jnp.where(some, total, 1.0)
    value = (acc * lax.broadcast_in_dim(1.0 / safe, acc.shape, [0])).astype(call.dtype)
    lse = jnp.where(some, top + jnp.log2(safe), -jnp.inf) * (1 / LOG2_E)

    @pl.when((low == 0) & (high == ROWS))
    def _():
        refs.q_ring[buffer, wg] = value
        plgpu.commit_smem()

    @pl.when((low > 0) | (high < ROWS))  # TMA moves whole tiles
    def _():
        store_rows(refs.out, value, token, head, low, high, interpret=call.interpret)

    plgpu.barrier_arrive(refs.o_full.at[buffer])
    store_rows(refs.lse, lse, token, head, low, high, interpret=call.interpret)
    return done + item.end - item.begin, s


def _step(call, refs, wg, i, item, position, before, j, carry, *, masked, last=False):
    """One KV tile: the online softmax of its scores, in base 2, then the two products that wait for nobody.

    These are its weights times its values, and the scores of the next tile: of this item or of the next one.
    """
    acc, top, total, s = carry
    slot, start = call.slot(before + j + 1), j * call.config.kv_tile
    with jax.named_scope("softmax"):
        acc, top, total, p = _softmax(call, acc, top, total, s, position, start, masked)
    with jax.named_scope("tile"):
        plgpu.barrier_wait(refs.kv_full.at[slot])
    next_buffer = call.buffer(i)
    if masked:
        # Warpgroup 0 does it for both, before its turn.
        zero_dead(refs.v_ring.at[slot], start, item.dead_to, item.dead_from, mine=wg == 0)
        if call.ahead:
            leaves = j + 1 == item.end
            next_buffer = call.buffer(i + leaves.astype(jnp.int32))
            pl.when(leaves & item.more)(lambda: plgpu.barrier_wait(refs.q_full.at[next_buffer]))
    with jax.named_scope("turn"):
        _await_turn(refs, wg)
    queries, keys, values = refs.q_ring.at[next_buffer, wg], refs.k_ring.at[slot], refs.v_ring.at[slot]
    if call.interpret:  # has no operands in registers
        refs.weights[wg] = p
        plgpu.commit_smem()
        p = refs.weights.at[wg]

    def multiply(acc_ref, s_ref):
        if not call.interpret:
            acc_ref[...] = acc
        plgpu.wgmma(acc_ref, p, values)
        if not last:
            plgpu.wgmma(s_ref, queries, keys.T)
        _pass_turn(refs, wg)
        with jax.named_scope("products"):
            return acc_ref[...], s_ref[...]

    summed, s = pl.run_scoped(
        multiply, WGMMAAccumulatorRef(acc.shape, jnp.float32), WGMMAAccumulatorRef(s.shape, jnp.float32)
    )
    acc = acc + summed if call.interpret else summed
    if not last:
        plgpu.barrier_arrive(refs.kv_free.at[slot])
    return acc, top, total, s


def _softmax(call, acc, top, total, s, position, start, masked):
    """Online, in base 2: the old values scaled to the new maximum, and the weights of this tile."""
    factor = call.scale * LOG2_E
    if call.soft_cap is not None:
        s, factor = jnp.tanh(s * (call.scale / call.soft_cap)), call.soft_cap * LOG2_E
    elif call.scale <= 0:  # the largest score is no longer the largest product
        s, factor = s * factor, 1.0
    if masked:
        s = jnp.where(_seen(call, s.shape, position, start), s, -jnp.inf)
    new_top = jnp.maximum(top, s.max(axis=1) * factor)
    shrink = jnp.exp2(top - new_top)
    p = jnp.exp2(s * factor - lax.broadcast_in_dim(new_top, s.shape, [0]))
    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
    total = total * lax.broadcast_in_dim(shrink, total.shape, [0]) + _fold(p)
    return lax.optimization_barrier((acc, new_top, total, p.astype(call.dtype)))


def _fold(p):
    """Sums of every eighth column: each thread's own, what threads have in common is added up after the last tile."""
    parts = [p[:, c : c + COLUMNS] for c in range(0, p.shape[1], COLUMNS)]
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def _seen(call, shape, position, start):
    at = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + start
    query = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + position
    seen = at <= query
    return seen if call.sliding_window is None else seen & (at > query - call.sliding_window)
