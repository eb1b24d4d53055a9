"""Paged attention for few queries a row, on Hopper: a persistent kernel that streams K and V at memory speed.

    SM  +----------------------------------------------------------------+
        | worker 0:  memory warpgroup --TMA, page by page--> ring of     |
        |                                  K, V tiles in shared memory   |
        |            compute warpgroup: S = Q K', online softmax, P V    |
        | worker 1:  the same, on its own share                          |
        +----------------------------------------------------------------+

The queries of a tile that share a KV head, G a token, are the rows of one 64-row matrix product: while memory
is the limit 64 rows cost what 4 do, so verifying a few drafted tokens costs what decoding does. `schedule` deals
the shares. An item that one worker sees whole is written at once; the others leave normalised partial results
and log-sum-exps, which `merge` weighs. Dao et al. 2023 (Flash-Decoding), Shah et al. 2024 (FlashAttention-3).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.config import KernelConfig, decode_config
from pallas_kernels.merge import LOW, merge
from pallas_kernels.schedule import Schedule, schedule
from pallas_kernels.tiles import query_tiles

ROWS = 64
"""Rows of a warpgroup's matrix product: queries of a tile times query heads of a KV head, at most."""
WGMMA = plgpu.Layout.WGMMA
PER_ROW = WGMMA.reduce(1)


@functools.partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap", "config", "interpret"))
def paged_attention(
    q,
    k_pool,
    v_pool,
    pages,
    length,
    query_start,
    *,
    scale,
    sliding_window=None,
    soft_cap=None,
    config: KernelConfig | None = None,
    interpret=None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention`. A jit of its own: the layers of a model share one compiled kernel."""
    (num_tokens, heads, head_dim), kv_heads = q.shape, k_pool.shape[1]
    config = config or decode_config(head_dim)
    group = heads // kv_heads
    tile = min(max(num_tokens // pages.shape[0], 1), max(ROWS // group, 1))
    tiles = query_tiles(num_tokens, tile, length, query_start)
    plan = schedule(
        tiles,
        kv_tile=config.kv_tile,
        kv_heads=kv_heads,
        workers=config.workers * config.num_sms,
        sliding_window=sliding_window,
    )
    used = tile * group
    packed = q if tile == 1 else q[tiles.index].reshape(-1, tile, heads, head_dim).swapaxes(1, 2)
    packed = packed.reshape(-1, kv_heads, used, head_dim)
    # A copy of 8 rows reads zeros past the end of `used` rows and writes nothing there; the interpreter cannot.
    least = -(-used // 8) * 8 if interpret else max(used, 128 // head_dim)
    if least > used:
        packed = jnp.pad(packed, ((0, 0), (0, 0), (0, least - used), (0, 0)))
    build = functools.partial(_attend, tile_size=tile, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap)
    whole, partial = build(packed, k_pool, v_pool, pages, plan, config=config, interpret=interpret)
    out, lse = merge(whole, partial, plan.share, used=used, interpret=interpret)

    def unpack(x):  # [n, K, G * tile, ...] -> [T, H, ...]
        x = x[:, :, :used].reshape(x.shape[0], heads, tile, *x.shape[3:]).swapaxes(1, 2)
        x = x.reshape(x.shape[0] * tile, heads, *x.shape[3:])
        return x if tile == 1 else x[tiles.place]

    out, lse = unpack(out), unpack(lse)
    if tile > 1:
        live = jnp.arange(num_tokens) < query_start[-1]
        return jnp.where(live[:, None, None], out, 0), jnp.where(live[:, None], lse, -jnp.inf)
    return out, lse


class Refs(NamedTuple):
    """Global memory of the kernel."""

    q: jax.Array  # [n, K, rows, D]
    k: jax.Array  # [N, K, S, D]
    v: jax.Array
    pages: jax.Array
    tile: jax.Array  # of the schedule
    share: jax.Array
    out: jax.Array  # [n, K, rows, D]
    lse: jax.Array  # [n, K, 8 or more]
    part: jax.Array  # [2 * workers, 2, rows, D]: a result in two halves, high and low bits
    part_lse: jax.Array  # [2 * workers, 8 or more]


def _attend(q, k_pool, v_pool, pages, plan: Schedule, *, tile_size, scale, sliding_window, soft_cap, config, interpret):
    """((out, lse) of whole items, (out, lse) of partial ones, two a worker)."""
    num_tiles, kv_heads, least, head_dim = q.shape
    rows = -(-least // 8) * 8
    block_size = k_pool.shape[2]
    kv_tile, stages, lanes = config.kv_tile, config.stages, config.workers
    unit = math.gcd(block_size, kv_tile)  # tokens a copy: never across a page
    copies = kv_tile // unit
    last_page = pages.shape[1] - 1
    log2e = math.log2(math.e)

    def body(refs: Refs, rings, full, free):
        q_ring, k_ring, v_ring, p_smem, lse_smem = rings
        thread = lax.axis_index("wg")
        lane = lax.rem(thread, lanes)
        worker = lax.axis_index("sm") * lanes + lane

        def items(look, carry):
            """Runs look(i, tile, head, j0, j1, carry) over the items of this worker's share: KV tiles [j0, j1)."""
            first, skip = refs.share[worker, 0], refs.share[worker, 1]
            end, rest = refs.share[worker + 1, 0], refs.share[worker + 1, 1]

            def each(i, carry):
                item = first + i
                tile = lax.div(item, jnp.int32(kv_heads))
                j0 = jnp.where(i == 0, skip, 0)
                j1 = jnp.where(item == end, rest, refs.tile[tile, 2])
                return look(i, tile, lax.rem(item, jnp.int32(kv_heads)), j0, j1, carry)

            return lax.fori_loop(0, end - first + (rest > 0).astype(jnp.int32), each, carry)

        def some_rows(i):  # a start that is 0 at run time only: the copy may reach past the end
            return pl.ds(lax.rem(i, jnp.int32(1)), rows)

        @pl.when(thread >= lanes)
        def _memory():
            plgpu.set_max_registers(40, action="decrease")

            def fetch(i, tile, head, j0, j1, done):
                buffer = lane * 2 + lax.rem(i, jnp.int32(2))

                @pl.when(i >= 2)
                def _():
                    plgpu.barrier_wait(free.q.at[buffer])

                plgpu.copy_gmem_to_smem(
                    refs.q.at[tile, head, some_rows(i)], q_ring.at[buffer, pl.ds(0, rows)], full.q.at[buffer]
                )
                row, begin = refs.tile[tile, 0], refs.tile[tile, 1]

                def one(j, done):
                    slot = lane * stages + lax.rem(done, jnp.int32(stages))
                    tokens = [(begin + j) * kv_tile + u * unit for u in range(copies)]
                    at_page = [jnp.minimum(lax.div(t, jnp.int32(block_size)), last_page) for t in tokens]
                    ids = [refs.pages[row, p] for p in at_page]
                    for pool, ring, landed, taken in (
                        (refs.k, k_ring, full.k, free.k),
                        (refs.v, v_ring, full.v, free.v),
                    ):

                        @pl.when(done >= stages)
                        def _(taken=taken):
                            plgpu.barrier_wait(taken.at[slot])

                        for u, (t, page) in enumerate(zip(tokens, ids, strict=True)):
                            at = pl.ds(pl.multiple_of(lax.rem(t, jnp.int32(block_size)), unit), unit)
                            plgpu.copy_gmem_to_smem(
                                pool.at[page, head, at], ring.at[slot, pl.ds(u * unit, unit)], landed.at[slot]
                            )
                    return done + 1

                return lax.fori_loop(j0, j1, one, done)

            items(fetch, jnp.int32(0))

        @pl.when(thread < lanes)
        def _compute():
            plgpu.set_max_registers(208, action="increase")

            def attend(i, tile, head, j0, j1, done):
                buffer = lane * 2 + lax.rem(i, jnp.int32(2))
                queries = q_ring.at[buffer]
                begin, count = refs.tile[tile, 1], refs.tile[tile, 2]
                first, last = refs.tile[tile, 3], refs.tile[tile, 4]
                plgpu.barrier_wait(full.q.at[buffer])

                def look(j, carry, masked):
                    acc, high, total = carry
                    slot = lane * stages + lax.rem(done + j - j0, jnp.int32(stages))
                    start = (begin + j) * kv_tile
                    plgpu.barrier_wait(full.k.at[slot])

                    def scores(ref):
                        plgpu.wgmma(ref, queries, k_ring.at[slot].T)
                        return ref[...]

                    s = pl.run_scoped(scores, plgpu.ACC((ROWS, kv_tile), jnp.float32))
                    plgpu.barrier_arrive(free.k.at[slot])
                    if soft_cap is None:
                        s = s * (scale * log2e)
                    else:
                        s = jnp.tanh(s * (scale / soft_cap)) * (soft_cap * log2e)
                    if masked:
                        s = jnp.where(_seen(s.shape, start, first, last, tile_size, sliding_window), s, -jnp.inf)
                    new_high = jnp.maximum(high, s.max(axis=1))
                    shrink = jnp.exp2(high - new_high)
                    p = jnp.exp2(s - lax.broadcast_in_dim(new_high, s.shape, [0]))
                    total = total * shrink + p.sum(axis=1)
                    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
                    p = p.astype(q.dtype)

                    plgpu.barrier_wait(full.v.at[slot])
                    if masked:
                        _zero_unseen(v_ring.at[slot], start, first, last, sliding_window)
                    if interpret:  # it knows neither P in registers nor a started accumulator
                        p_smem[lane] = p
                        plgpu.commit_smem()

                        def weigh_anew(ref):
                            plgpu.wgmma(ref, p_smem.at[lane], v_ring.at[slot])
                            return ref[...]

                        acc = acc + pl.run_scoped(weigh_anew, plgpu.ACC(acc.shape, jnp.float32))
                    else:

                        def weigh(ref):
                            plgpu.wgmma(ref, p, v_ring.at[slot])

                        acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
                    plgpu.barrier_arrive(free.v.at[slot])
                    return acc, new_high, total

                carry = (
                    plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), WGMMA),
                    plgpu.layout_cast(jnp.full((ROWS,), LOW, jnp.float32), PER_ROW),
                    plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW),
                )
                # Every query sees the KV tiles in [edge, full) whole.
                full_end = jnp.clip(lax.div(first + 1, jnp.int32(kv_tile)) - begin, j0, j1)
                edge = j0
                if sliding_window is not None:
                    outside = jnp.maximum(last - sliding_window + 1, 0) + kv_tile - 1
                    edge = jnp.clip(lax.div(outside, jnp.int32(kv_tile)) - begin, j0, j1)
                    full_end = jnp.maximum(full_end, edge)
                    carry = lax.fori_loop(j0, edge, functools.partial(look, masked=True), carry)
                carry = lax.fori_loop(edge, full_end, functools.partial(look, masked=False), carry)
                acc, high, total = lax.fori_loop(full_end, j1, functools.partial(look, masked=True), carry)

                some = total != 0  # NaN stays: a sick row must show
                safe = jnp.where(some, total, 1.0)
                acc = acc * lax.broadcast_in_dim(1.0 / safe, acc.shape, [0])
                # The queries of this item are done with: their buffer stages the result.
                value = acc.astype(q.dtype)
                queries[...] = value
                lse_smem[lane] = jnp.where(some, high + jnp.log2(safe), -jnp.inf) * math.log(2)
                plgpu.commit_smem()
                whole = (j0 == 0) & (j1 == count)
                mine, mine_lse = queries.at[pl.ds(0, rows)], lse_smem.at[lane, pl.ds(0, rows)]

                @pl.when(whole)
                def _():
                    plgpu.copy_smem_to_gmem(mine, refs.out.at[tile, head, some_rows(i)])
                    plgpu.copy_smem_to_gmem(mine_lse, refs.lse.at[tile, head])

                @pl.when(~whole)
                def _():
                    part = 2 * worker + jnp.minimum(i, 1)
                    plgpu.copy_smem_to_gmem(mine, refs.part.at[part, 0])
                    plgpu.copy_smem_to_gmem(mine_lse, refs.part_lse.at[part])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    queries[...] = (acc - value.astype(jnp.float32)).astype(q.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(mine, refs.part.at[part, 1])

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(free.q.at[buffer])
                return done + j1 - j0

            items(attend, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    def tiled(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))

    def barriers(arrivals):
        return Rings(*(plgpu.Barrier(num_arrivals=a, num_barriers=lanes * n) for a, n in arrivals))

    def kernel(*refs):
        pl.run_scoped(
            functools.partial(body, Refs(*refs)),
            (
                tiled(lanes * 2, ROWS, head_dim),
                tiled(lanes * stages, kv_tile, head_dim),
                tiled(lanes * stages, kv_tile, head_dim),
                tiled(lanes, ROWS, kv_tile) if interpret else None,
                plgpu.SMEM((lanes, ROWS), jnp.float32),
            ),
            barriers([(1, 2), (copies, stages), (copies, stages)]),
            barriers([(1, 2), (1, stages), (1, stages)]),
            collective_axes="wg",
        )

    sds, parts = jax.ShapeDtypeStruct, 2 * lanes * config.num_sms
    out, lse, part, part_lse = plgpu.kernel(
        kernel,
        out_type=(
            sds(q.shape, q.dtype),
            sds((num_tiles, kv_heads, rows), jnp.float32),
            sds((parts, 2, rows, head_dim), q.dtype),
            sds((parts, rows), jnp.float32),
        ),
        grid=(config.num_sms,),
        grid_names=("sm",),
        num_threads=2 * lanes,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(q, k_pool, v_pool, pages, plan.tile, plan.share)
    return (out, lse), (part, part_lse)


class Rings(NamedTuple):
    """Barriers of the queries' buffers and of the K and V rings."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


def _seen(shape, start, first, last, tile_size: int, sliding_window: int | None):
    """Which of a KV tile's positions (columns) each row may see; row r is query r % tile_size."""
    at = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA) + start
    position = last
    if tile_size > 1:
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)
        position = jnp.minimum(first + lax.rem(row, jnp.int32(tile_size)), last)
    seen = at <= position
    return seen if sliding_window is None else seen & (at > position - sliding_window)


def _zero_unseen(values, start, first, last, sliding_window: int | None) -> None:
    """0 * NaN is NaN: rows of a V tile that no query sees are zeroed in shared memory."""
    token = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=WGMMA) + start
    live = token <= last
    if sliding_window is not None:
        live &= token > first - sliding_window
    v = plgpu.layout_cast(values[...], WGMMA)
    values[...] = jnp.where(live, v, jnp.zeros_like(v))
    plgpu.commit_smem()
