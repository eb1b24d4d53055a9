"""Paged attention for few queries a row, on Hopper: a persistent kernel that streams K and V at memory speed.

    SM  +-------------------------------------------------------------------------+
        | memory warpgroup     a warp a stream: keys, values of worker 0, of 1    |
        |                        TMA, page by page --> rings of K, V tiles        |
        | compute warpgroup 0  worker 0: S = Q K', online softmax, P V            |
        | compute warpgroup 1  worker 1: the same, on its own share of the tiles  |
        +-------------------------------------------------------------------------+

The queries of a tile that share a KV head, G a token, are the rows of one 64-row matrix product: while memory
is the limit 64 rows cost what 4 do, so verifying a few drafted tokens costs what decoding does. `schedule` deals
the shares. An item that one worker sees whole is written at once; the others leave normalised partial results
and log-sum-exps, which `merge` weighs. Dao et al. 2023 (Flash-Decoding), Shah et al. 2024 (FlashAttention-3).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.config import COMPUTE_REGISTERS, MEMORY_REGISTERS, KernelConfig, decode_config
from pallas_kernels.decode_compute import compute
from pallas_kernels.decode_memory import stream
from pallas_kernels.decode_walk import ROWS, Barriers, Call, Refs
from pallas_kernels.layouts import require_layouts
from pallas_kernels.merge import merge
from pallas_kernels.schedule import schedule
from pallas_kernels.tiles import query_tiles


@functools.partial(
    jax.jit, static_argnames=("scale", "sliding_window", "soft_cap", "max_queries", "config", "interpret")
)
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
    max_queries: int | None = None,
    config: KernelConfig | None = None,
    interpret=None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention`. A jit of its own: the layers of a model share one compiled kernel.

    Raises:
      NotImplementedError: a head size, block size, group or dtype that the kernel has no layout for.
    """
    require_layouts(q, k_pool)
    (num_tokens, heads, head_dim), kv_heads = q.shape, k_pool.shape[1]
    config = config or decode_config(head_dim, pages.shape[0], pages.shape[1] * k_pool.shape[2])
    group = heads // kv_heads
    tile = min(max_queries or max(num_tokens // pages.shape[0], 1), ROWS // group)
    tiles = query_tiles(num_tokens, tile, length, query_start)
    plan = schedule(
        tiles,
        kv_tile=config.kv_tile,
        kv_heads=kv_heads,
        workers=config.workers * config.num_sms,
        sliding_window=sliding_window,
        item_tiles=config.item_tiles,
    )
    used = tile * group
    packed = q if tile == 1 else q[tiles.token].reshape(-1, tile, heads, head_dim).swapaxes(1, 2)
    packed = packed.reshape(-1, kv_heads, used, head_dim)
    # A copy of 8 rows reads zeros past the end of fewer and writes nothing there; more come by eights. The interpreter
    # cannot read past an end.
    rows = -(-used // 8) * 8
    least = rows if interpret or used > 8 else max(used, 128 // head_dim)
    if least > used:
        packed = jnp.pad(packed, ((0, 0), (0, 0), (0, least - used), (0, 0)))
    call = Call(
        config=config,
        rows=rows,
        tile_size=tile,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=k_pool.shape[2],
        unit=math.gcd(k_pool.shape[2], config.kv_tile),
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        interpret=bool(interpret),
        dtype=q.dtype,
    )
    whole, partial = _attend(call, interpret, packed, k_pool, v_pool, pages, plan.tile, plan.share)
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


def _attend(call: Call, interpret, *operands):
    """((out, lse) of whole items, (out, lse) of partial ones, two a worker)."""
    q, config, sds = operands[0], call.config, jax.ShapeDtypeStruct
    parts = 2 * config.workers * config.num_sms
    out, lse, part, part_lse = plgpu.kernel(
        functools.partial(_entry, call),
        out_type=(
            sds(q.shape, q.dtype),
            sds((*q.shape[:2], call.rows), jnp.float32),
            sds((parts, 2, call.rows, call.head_dim), q.dtype),
            sds((parts, call.rows), jnp.float32),
        ),
        grid=(config.num_sms,),
        grid_names=("sm",),
        num_threads=config.workers + 1,
        thread_name="wg",
        kernel_name="paged_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(*operands)
    return (out, lse), (part, part_lse)


def _entry(call: Call, *refs) -> None:
    lanes, stages, kv_tile = call.config.workers, call.config.stages, call.config.kv_tile

    def tiled(*shape):
        transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM(shape, call.dtype, transforms=transforms)

    def barriers(q, k, v):
        counts = (q, 2), (k, stages), (v, stages)
        return Barriers(*(plgpu.Barrier(num_arrivals=a, num_barriers=lanes * n) for a, n in counts))

    pl.run_scoped(
        lambda *scratch: _body(call, Refs(*refs, *scratch)),
        tiled(lanes * 2, ROWS, call.head_dim),
        tiled(lanes * stages, kv_tile, call.head_dim),
        tiled(lanes * stages, kv_tile, call.head_dim),
        tiled(lanes, ROWS, kv_tile) if call.interpret else None,
        plgpu.SMEM((lanes, ROWS), jnp.float32),
        barriers(1, kv_tile // call.unit, kv_tile // call.unit),
        barriers(1, 1, 1),
        collective_axes="wg",
    )


def _body(call: Call, refs: Refs) -> None:
    thread, workers = lax.axis_index("wg"), call.config.workers

    @pl.when(thread == workers)
    def _():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        stream(call, refs)

    @pl.when(thread < workers)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        compute(call, refs, thread)
