"""Paged attention for many queries a row, on Hopper: one warpgroup multiplies while another exponentiates.

    SM  +---------------------------------------------------------------------------+
        | memory warpgroup       warps: queries in, keys in, values in, results out |
        |                    TMA, page by page --> rings of tiles in shared memory  |
        | compute warpgroup 0:   S = Q K' | softmax  | P V, Q K' | softmax  | P V    |
        | compute warpgroup 1:            | P V, Q K' | softmax  | P V, Q K' | ...   |
        +---------------------------------------------------------------------------+

A warpgroup holds 64 queries of one head; the two take two heads of one KV head (64 queries more where the group is
odd), so both read the same keys and values, which come as their products are issued: values with the next tile's keys.
They take turns. Work items, (query tile, heads), are dealt heaviest first to one resident program an SM, so that the
next item's loads run under the last one's products. Dao et al. 2022 (tiling), Shah et al. 2024 (warp specialisation,
turns).

Query tiles start at multiples of 8 of the token axis: TMA then reads and writes the packed tokens where they are, and
nothing is gathered, padded or copied around the kernel. Rows of a tile that belong to a neighbour are computed and
not written.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.config import PrefillConfig, prefill_config
from pallas_kernels.layouts import require_layouts
from pallas_kernels.prefill_compute import compute
from pallas_kernels.prefill_memory import stream_keys, stream_queries, stream_results, stream_values
from pallas_kernels.prefill_plan import plan_tiles
from pallas_kernels.prefill_walk import ROWS, Call, Refs


@functools.partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap", "least", "config", "interpret"))
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
    least: int = 1,
    config: PrefillConfig | None = None,
    interpret=None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention`; rows of fewer than `least` queries are left out, their output is anything.

    Raises:
      NotImplementedError: a head size, block size, group or dtype that the kernel has no layout for.
    """
    require_layouts(q, k_pool)
    (num_tokens, heads, head_dim), (_, kv_heads, block_size, _) = q.shape, k_pool.shape
    config = config or prefill_config(head_dim)
    paired = heads // kv_heads % 2 == 0
    # TMA reads and writes rows by eights; interpret mode knows no reads past the end.
    spare = -num_tokens % (128 if interpret else 8)
    q = jnp.pad(q, ((0, spare), (0, 0), (0, 0))) if spare else q
    plan = plan_tiles(
        q.shape[0],
        length,
        query_start,
        tile=ROWS if paired else 2 * ROWS,
        kv_tile=config.kv_tile,
        sliding_window=sliding_window,
        least=least,
    )
    call = Call(
        config, heads, head_dim, heads // kv_heads, block_size, pages.shape[1], paired, scale, sliding_window, soft_cap,
        bool(interpret), q.dtype,
    )  # fmt: skip
    out, lse = plgpu.kernel(
        functools.partial(_entry, call),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:2], jnp.float32),
        ),
        grid=(config.programs or plan.tile.shape[0] * call.units,),
        grid_names=("program",),
        num_threads=3,
        thread_name="wg",
        kernel_name="paged_prefill",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(q, k_pool, v_pool, pages, plan.tile, plan.live)
    return out[:num_tokens], lse[:num_tokens]


def _entry(call, *refs):
    config, kv = call.config, call.config.kv_tile
    copies, stages, query_stages = kv // call.copy, config.stages, config.query_stages

    def tiled(*shape):
        transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM(shape, call.dtype, transforms=transforms)

    def barriers(arrivals, count):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    pl.run_scoped(
        lambda *scratch: _body(call, Refs(*refs, *scratch)),
        tiled(query_stages, 2, ROWS, call.head_dim),
        tiled(stages, kv, call.head_dim),
        tiled(stages, kv, call.head_dim),
        tiled(2, ROWS, kv) if call.interpret else None,
        barriers(2, query_stages),
        barriers(2 * copies, stages),
        barriers(1, query_stages),
        barriers(2, stages),
        barriers(2, query_stages),
        barriers(1, 2),
        collective_axes="wg",
    )


def _body(call, refs: Refs):
    wg = lax.axis_index("wg")

    @pl.when(wg == 2)
    def _():
        plgpu.set_max_registers(call.config.memory_registers, action="decrease")

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(lambda: stream_queries(call, refs))
            pl.when(warp == 1)(lambda: stream_keys(call, refs))
            pl.when(warp == 2)(lambda: stream_values(call, refs))
            pl.when(warp == 3)(lambda: stream_results(call, refs))

    @pl.when(wg < 2)
    def _():
        plgpu.set_max_registers(call.config.compute_registers, action="increase")
        compute(call, refs, wg)
