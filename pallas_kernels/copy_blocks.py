"""Copies of whole blocks in all pools at once, in place: what copy-on-write asks for.

    source  [ 1 0 4 ]     program (1, i)    piece i of block 1 -> block 5, pool after pool
    target  [ 5 0 6 ]     programs (2, .)   NULL: read one number and end

Where nothing is to be copied every program ends at once: no condition that the host would have to read.
"""

import functools
import math
from collections.abc import Sequence

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.layouts import DTYPES

PIECE = 1024
"""Elements of a block that a program copies: 16 bytes a thread where they have 16 bits."""

AT_ONCE = 8
"""Pools that are read before the first of them is written."""


def fits(pools: Sequence[jax.Array]) -> bool:
    """Whether the kernel is made for these: alike, 16-bit, blocks of whole vectors. Only shapes and dtypes count."""
    kinds = {(p.shape, p.dtype.name) for p in pools}
    return len(kinds) == 1 and all(n in DTYPES and math.prod(s[1:]) % 256 == 0 for s, n in kinds)


@functools.partial(jax.jit, static_argnames=("null", "interpret"))
def copy_blocks(pools, source: jax.Array, target: jax.Array, *, null: int, interpret=None):
    """The pools with pool[target[i]] = pool[source[i]] wherever target[i] is not `null`.

    Args:
      pools: arrays [N, K, S, D] of one shape and dtype.
      source: int32 [B]; none of them is a target.
      target: int32 [B], distinct but for `null`.
      null: the target of rows that copy nothing.
      interpret: see `plgpu.kernel`.
    """
    shape, size = pools[0].shape, math.prod(pools[0].shape[1:])
    piece = math.gcd(size, PIECE)
    layout = plgpu.Layout.WG_STRIDED((piece,), vec_size=piece // 128)

    def copy(source_ref, target_ref, *pool_refs):
        row, part = lax.axis_index("row"), lax.axis_index("part")
        here, there = source_ref[row], target_ref[row]

        @pl.when(there != null)
        def _():
            at = pl.ds(part * piece, piece)
            for i in range(0, len(pool_refs), AT_ONCE):
                some = pool_refs[i : i + AT_ONCE]
                tiles = [plgpu.load(ref.at[here, at], layout=layout, optimized=False) for ref in some]
                for ref, tile in zip(some, tiles, strict=True):
                    ref[there, at] = tile

    refs = [jax.new_ref(pool.reshape(-1, size)) for pool in pools]
    plgpu.kernel(
        copy,
        out_type=(),
        grid=(target.size, size // piece),
        grid_names=("row", "part"),
        num_threads=1,
        thread_name="wg",
        kernel_name="copy_blocks",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,  # nothing that is written is read
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=interpret,
    )(source, target, *refs)
    return [jax.freeze(ref).reshape(shape) for ref in refs]
