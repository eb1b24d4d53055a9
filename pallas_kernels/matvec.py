"""A row times a matrix, at the speed of memory: the products of a step that has one token.

    W [K, N]      columns of a block        a thread has 8 neighbours of every `rows`-th row, and asks for
                  | t0 | t1 |               UNROLL of them before it adds one
                  | t2 | t3 |
                  | ...     |  `rows`       sums: a thread's rows, a warp's threads by shuffles,
                  | t0 | t1 |               warps through shared memory --> y [N]; no block waits for another
                  | ...     |

XLA takes a row times fewer than ten million numbers for a reduction. It reads them at half of memory's speed, wants
some transposed, a copy of the weights, and of others writes all products to memory first, rounded to 16 bits.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, memref, scf, vector
from jaxlib.mlir.dialects import math as mlir_math

from pallas_kernels.layouts import DTYPES
from pallas_kernels.scalars import VECTOR, const, i32, less, place, times

UNROLL = 16
"""Vectors a thread waits for at once."""

LIMIT = 10_000_000
"""Numbers of a matrix from which on XLA multiplies it as one, at least as fast as this."""

WARP = 32


def fits(x: jax.Array, w: jax.Array) -> bool:
    """Whether the kernel is made for these: one row, 16-bit, whole vectors, a matrix that XLA takes for none.

    Looks at shapes and dtypes alone.
    """
    kind = x.dtype == w.dtype and x.dtype.name in DTYPES
    return kind and x.shape[0] == 1 and w.shape[-1] % VECTOR == 0 and math.prod(w.shape) < LIMIT


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one product, or of two whose results are multiplied: `ways`."""

    depth: int  # K
    width: int  # N
    ways: int

    @property
    def columns(self) -> int:
        """Of a block: enough blocks for all SMs, and rows that are not read by half a sector (32 bytes)."""
        return next(c for c in (32, 16, 8) if self.width % c == 0 and (c < 32 or self.width >= 2048))

    @property
    def threads(self) -> int:
        """Of a block: the more, the more is in flight and the longer the last sums take."""
        return 512 if self.depth >= 2048 else 256

    @property
    def lanes(self) -> int:
        """Threads that share a row."""
        return self.columns // VECTOR

    @property
    def rows(self) -> int:
        """Of a block at once."""
        return self.threads // self.lanes


@functools.partial(jax.jit, static_argnames=("gated", "interpret"))
def matvec(x, w, *, gated: bool = False, interpret=None) -> jax.Array:
    """A row [1, K] times a matrix [K, ...] -> [1, ...]: float32 inside, rounded once.

    Args:
      x: [1, K], bfloat16 or float16.
      w: [K, ...] of the same dtype, the last axis a multiple of 8.
      gated: w is [K, 2, N], a gate and what it lets through: silu(x gate) * (x up), [1, N].
      interpret: see `plgpu.kernel`.
    """
    depth, ways = w.shape[0], 2 if gated else 1
    sizes = Sizes(depth, math.prod(w.shape[1:]) // ways, ways)

    def body(x_ref, w_ref, y_ref, *scratch):
        block = lax.axis_index("block")
        if interpret:
            _interpreted(sizes, block, x_ref, w_ref, y_ref)
        else:
            _block(sizes, block, x_ref, w_ref, y_ref, *scratch)

    sums = plgpu.SMEM((ways, sizes.threads // WARP, sizes.columns), jnp.float32)
    y = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((1, sizes.width), x.dtype),
        scratch_types=() if interpret else (sums,),
        grid=(sizes.width // sizes.columns,),
        grid_names=("block",),
        num_threads=1 if interpret else sizes.threads // 128,
        thread_name="wg",
        kernel_name="matvec",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(x, w.reshape(depth, -1))
    return y if gated else y.reshape(1, *w.shape[1:])


def _interpreted(sizes: Sizes, block, x, w, y) -> None:
    """What a block writes, as arrays."""
    starts = [way * sizes.width + block * sizes.columns for way in range(sizes.ways)]
    row = x[0, :].astype(jnp.float32)[:, None]
    sums = [(row * w[:, pl.ds(start, sizes.columns)].astype(jnp.float32)).sum(axis=0) for start in starts]
    result = jax.nn.silu(sums[0]) * sums[1] if sizes.ways == 2 else sums[0]
    y[0, pl.ds(starts[0], sizes.columns)] = result.astype(y.dtype)


def _block(sizes: Sizes, block, x, w, y, sums) -> None:
    """A block's columns of the result."""
    dtype = y.dtype

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 4 + (plgpu.Layout.WG_SPLAT,))
    def run(_, x, w, y, sums, block):
        narrow = ir.VectorType.get((VECTOR,), utils.dtype_to_ir_type(dtype))
        wide = ir.VectorType.get((VECTOR,), ir.F32Type.get())
        thread = arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x))
        near = times(arith.remui(thread, const(sizes.lanes)), VECTOR)
        start = arith.addi(times(block.registers.item(), sizes.columns), near)
        columns = [place(arith.addi(start, const(way * sizes.width))) for way in range(sizes.ways)]

        def load(row):
            at = place(row)
            return [vector.load(narrow, w, [at, column]) for column in columns], memref.load(x, [place(const(0)), at])

        mine = _sums_of_a_thread(sizes, load, arith.divui(thread, const(sizes.lanes)), utils.c(0.0, wide))
        mine = [_sums_of_a_warp(sizes, each) for each in mine]
        with utils.when(less(arith.remui(thread, const(WARP)), sizes.lanes)):
            warp = place(arith.divui(thread, const(WARP)))
            for way, each in enumerate(mine):
                vector.store(each, sums, [place(const(way)), warp, place(near)])
        gpu.barrier()
        with utils.when(less(thread, sizes.lanes)):

            def total(way):
                at = [[place(const(n)) for n in (way, warp)] for warp in range(sizes.threads // WARP)]
                return functools.reduce(arith.addf, [vector.load(wide, sums, [*p, place(near)]) for p in at])

            result = total(0) if sizes.ways == 1 else arith.mulf(_silu(total(0)), total(1))
            vector.store(arith.truncf(narrow, result), y, [place(const(0)), columns[0]])

    run(x, w, y, sums, jnp.asarray(block, jnp.int32))  # pyright: ignore[reportCallIssue]


def _sums_of_a_thread(sizes: Sizes, load, first, zero) -> list:
    """A vector of sums a way, over rows first, first + rows .. of the matrix."""

    def add(accs, start, count, *, ragged=False):
        """Accs + `count` rows; the last one may lie past the end."""
        rows = [arith.addi(start, const(i * sizes.rows)) for i in range(count)]
        inside = less(rows[-1], sizes.depth)
        if ragged:
            rows[-1] = arith.select(inside, rows[-1], const(0))
        loaded = [load(row) for row in rows]
        for i, (vectors, weight) in enumerate(loaded):
            weight = arith.extf(ir.F32Type.get(), weight)
            if ragged and i == count - 1:
                weight = arith.select(inside, weight, utils.c(0.0, weight.type))
            weight = vector.broadcast(zero.type, weight)
            products = [arith.mulf(arith.extf(zero.type, v), weight) for v in vectors]
            accs = [arith.addf(acc, product) for acc, product in zip(accs, products, strict=True)]
        return accs

    count = UNROLL // sizes.ways
    step, accs = count * sizes.rows, [zero] * sizes.ways
    loops, left = divmod(sizes.depth, step)
    if loops:
        loop = scf.ForOp(const(0), const(loops), const(1), accs)
        with ir.InsertionPoint(loop.body):
            start = arith.addi(first, times(loop.induction_variable, step))
            scf.yield_(add(list(loop.inner_iter_args), start, count))
        accs = list(loop.results)
    if left:
        start = arith.addi(first, const(loops * step))
        accs = add(accs, start, -(-left // sizes.rows), ragged=left % sizes.rows > 0)
    return accs


def _sums_of_a_warp(sizes: Sizes, acc):
    """Acc over all threads of a warp that have the same columns."""
    parts, distance = _elements(acc), sizes.lanes
    while distance < WARP:
        parts = [arith.addf(part, utils.shfl_bfly(part, distance)) for part in parts]
        distance *= 2
    return vector.from_elements(acc.type, parts)


def _silu(x):
    decay = vector.from_elements(x.type, [mlir_math.exp(arith.negf(part)) for part in _elements(x)])
    return arith.divf(x, arith.addf(utils.c(1.0, x.type), decay))


def _elements(x) -> list:
    return [vector.extract(x, dynamic_position=[], static_position=[i]) for i in range(VECTOR)]
