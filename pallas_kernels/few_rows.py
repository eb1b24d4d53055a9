"""A few rows times a matrix, at the speed of memory: the products of a decode step.

    W [K, N]          8 V columns of a block       a warp: 16 rows at a time, every `warps`-th of them
    rows 4 q .. 4 q + 3   | g = 0 | g = 1 | ... | g = 7 |      lane 4 g + q: V columns of 4 rows, straight from memory
                          | V     | V     |     |       |
    X [T, K]          lane 4 g + q: the same 4 columns of rows g, g + 8 ..

    sums: a warp's in registers, by products of 16 columns, 16 rows, 8 of x; warps' through shared memory --> y [T, N]

A sum does not mind its order, so rows of W stand in a product as they are read best: whole vectors a lane, and
columns 2 j and 2 j + 1 of each vector are product j. No block waits for another, and no second kernel adds up parts.

XLA takes a row times fewer than ten million numbers for a reduction. It reads them at half of memory's speed, wants
some transposed, a copy of the weights, and of others writes all products to memory first, rounded to 16 bits. Of more
rows it splits the products of small matrices in two kernels.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, scf, vector
from jaxlib.mlir.dialects import math as mlir_math

from pallas_kernels.layouts import DTYPES
from pallas_kernels.scalars import const, i32, less, place, split, times

ROWS = 32
"""Of x, at most."""

LIMITS = {1: 10_000_000, ROWS: 2_000_000}
"""For so many rows or fewer: numbers of a matrix from which on XLA is as fast in a step, or nothing was measured."""

WARP, GROUP, TILE, OCTET = 32, 4, 16, 8
"""Threads; lanes that share columns; rows of W, and of x, in a product."""


def fits(x: jax.Array, w: jax.Array) -> bool:
    """Whether the kernel is made for these: few rows, 16-bit, sides of whole products. Looks at shapes and dtypes."""
    kind = x.dtype == w.dtype and x.dtype.name in DTYPES
    sides = w.shape[0] % TILE == 0 and w.shape[-1] % TILE == 0
    limit = next((numbers for rows, numbers in LIMITS.items() if x.shape[0] <= rows), 0)
    return kind and sides and math.prod(w.shape) < limit


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one product, or of two whose results are multiplied: `ways`."""

    rows: int  # T
    depth: int  # K
    width: int  # N
    ways: int
    vector: int  # V: elements a lane reads at once
    warps: int  # of a block

    @property
    def octets(self) -> int:
        """Of rows of x."""
        return -(-self.rows // OCTET)

    @property
    def columns(self) -> int:
        """Of a block, each way."""
        return self.vector * WARP // GROUP

    @property
    def pairs(self) -> int:
        """Of sums that a lane has, each way: two columns of a row."""
        return self.octets * self.vector

    @property
    def unroll(self) -> int:
        """Tiles of W that a warp waits for at once."""
        return max(min(32 // self.vector, 8) // self.ways, 1)


def sizes_of(rows: int, depth: int, width: int, ways: int) -> Sizes:
    """The measured best. Warps share out the rows of W, so their number does not depend on those of x."""
    many = ways == 1 and width % 32 == 0 and width >= 64 * 32
    return Sizes(rows, depth, width, ways, vector=4 if many else 2, warps=16 if depth >= 2048 else 8)


@functools.partial(jax.jit, static_argnames=("gated", "sizes", "interpret"))
def few_rows(x, w, *, gated: bool = False, sizes: Sizes | None = None, interpret=None) -> jax.Array:
    """Rows [T, K] times a matrix [K, ...] -> [T, ...]: float32 inside, rounded once.

    Args:
      x: [T, K], bfloat16 or float16, T at most 32.
      w: [K, ...] of the same dtype, K and the last axis multiples of 16.
      gated: w is [K, 2, N], a gate and what it lets through: silu(x gate) * (x up), [T, N].
      sizes: in place of the measured best.
      interpret: see `plgpu.kernel`.
    """
    (rows, depth), ways = x.shape, 2 if gated else 1
    s = sizes or sizes_of(rows, depth, math.prod(w.shape[1:]) // ways, ways)

    def body(x_ref, w_ref, y_ref, *scratch):
        block = lax.axis_index("block")
        if interpret:
            _interpreted(s, block, x_ref, w_ref, y_ref)
        else:
            _block(s, block, x_ref, w_ref, y_ref, *scratch)

    sums = plgpu.SMEM((s.warps, s.ways, s.pairs, 2 * WARP), jnp.float32)
    y = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, s.width), x.dtype),
        scratch_types=() if interpret else (sums,),
        grid=(s.width // s.columns,),
        grid_names=("block",),
        num_threads=1 if interpret else s.warps // 4,
        thread_name="wg",
        kernel_name="few_rows",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(x, w.reshape(depth, -1))
    return y if gated else y.reshape(rows, *w.shape[1:])


def _interpreted(s: Sizes, block, x, w, y) -> None:
    """What a block writes, as arrays."""
    starts = [way * s.width + block * s.columns for way in range(s.ways)]
    wide = x[...].astype(jnp.float32)
    sums = [wide @ w[:, pl.ds(start, s.columns)].astype(jnp.float32) for start in starts]
    result = jax.nn.silu(sums[0]) * sums[1] if s.ways == 2 else sums[0]
    y[:, pl.ds(starts[0], s.columns)] = result.astype(y.dtype)


def _block(s: Sizes, block, x, w, y, sums) -> None:
    """A block's columns of the result."""
    dtype = y.dtype

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 4 + (plgpu.Layout.WG_SPLAT,))
    def run(_, x, w, y, sums, block):
        element = utils.dtype_to_ir_type(dtype)
        thread = arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x))
        warp, lane = split(thread, WARP)
        group, quad = split(lane, GROUP)
        start = times(block.registers.item(), s.columns)
        near = arith.addi(start, times(group, s.vector))

        def load(step):
            """A warp's tile of W [ways][4 rows], and that of X [octets]."""
            row = arith.addi(times(step, TILE), times(quad, 4))
            columns = [place(arith.addi(near, const(way * s.width))) for way in range(s.ways)]
            at = [place(arith.addi(row, const(i))) for i in range(4)]
            read = ir.VectorType.get((s.vector,), element)
            values = [[vector.load(read, w, [r, column]) for r in at] for column in columns]
            few = ir.VectorType.get((4,), element)
            pieces = []
            for octet in range(s.octets):
                token = arith.addi(group, const(OCTET * octet))
                inside = None if OCTET * (octet + 1) <= s.rows else less(token, s.rows)
                token = token if inside is None else arith.select(inside, token, const(0))
                piece = vector.load(few, x, [place(token), at[0]])
                pieces.append(piece if inside is None else arith.select(inside, piece, utils.c(0.0, few)))
            return values, pieces

        mine = _sums_of_a_warp(s, load, warp, str(element))
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        far = times(lane, 2)
        for way, octet, j in itertools.product(range(s.ways), range(s.octets), range(s.vector // 2)):
            sum_of = mine[way][octet][j]  # [2 columns][2 rows of x]
            for row in range(2):
                at = [place(warp), place(const(way)), place(const(octet * s.vector + 2 * j + row)), place(far)]
                vector.store(vector.from_elements(pair, [sum_of[row], sum_of[2 + row]]), sums, at)
        gpu.barrier()
        for first in range(0, s.pairs, s.warps):  # a warp adds up a pair of each lane
            which = arith.addi(warp, const(first))
            octet, rest = split(which, s.vector)
            j, row = split(rest, 2)
            token = arith.addi(times(octet, OCTET), arith.addi(times(quad, 2), row))
            with utils.when(arith.andi(less(which, s.pairs), less(token, s.rows))):

                def total(way, which=which):
                    parts = [[place(const(w)), place(const(way)), place(which), place(far)] for w in range(s.warps)]
                    return functools.reduce(arith.addf, [vector.load(pair, sums, at) for at in parts])

                result = total(0) if s.ways == 1 else arith.mulf(_silu(total(0)), total(1))
                rounded = arith.truncf(ir.VectorType.get((2,), element), result)
                vector.store(rounded, y, [place(token), place(arith.addi(near, times(j, 2)))])

    run(x, w, y, sums, jnp.asarray(block, jnp.int32))  # pyright: ignore[reportCallIssue]


def _sums_of_a_warp(s: Sizes, load, warp, element: str) -> list:
    """Sums over tiles warp, warp + warps .. of W: [ways][octets][V / 2] of four registers each."""

    def add(accs, start, count, *, ragged=False):
        """Accs + `count` tiles of W; the last one may lie past the end."""
        steps = [arith.addi(start, const(i * s.warps)) for i in range(count)]
        inside = less(steps[-1], s.depth // TILE)
        if ragged:
            steps[-1] = arith.select(inside, steps[-1], const(0))
        for i, (values, pieces) in enumerate([load(step) for step in steps]):
            if ragged and i == count - 1:
                pieces = [arith.select(inside, piece, utils.c(0.0, piece.type)) for piece in pieces]
            rights = [[_register(piece, piece, [c, c + 1]) for c in (0, 2)] for piece in pieces]
            for sums, vectors in zip(accs, values, strict=True):
                for j in range(s.vector // 2):
                    left = _columns(vectors, j)
                    for each, right in zip(sums, rights, strict=True):
                        each[j] = _product(each[j], left, right, element)
        return accs

    zero = utils.c(0.0, ir.F32Type.get())
    accs = [[[(zero,) * 4] * (s.vector // 2) for _ in range(s.octets)] for _ in range(s.ways)]
    flat, shape = jax.tree.flatten(accs)
    step = s.unroll * s.warps
    loops, left = divmod(s.depth // TILE, step)
    if loops:
        loop = scf.ForOp(const(0), const(loops), const(1), flat)
        with ir.InsertionPoint(loop.body):
            start = arith.addi(warp, times(loop.induction_variable, step))
            inner = jax.tree.unflatten(shape, list(loop.inner_iter_args))
            scf.yield_(jax.tree.leaves(add(inner, start, s.unroll)))
        accs = jax.tree.unflatten(shape, list(loop.results))
    if left:
        accs = add(accs, arith.addi(warp, const(loops * step)), -(-left // s.warps), ragged=left % s.warps > 0)
    return accs


def _columns(vectors, j: int) -> list:
    """Columns 2 j and 2 j + 1 of four rows of W as the four registers of a product's left operand."""
    width = vectors[0].type.shape[0]
    return [_register(vectors[i], vectors[i + 1], [c, width + c]) for i in (0, 2) for c in (2 * j, 2 * j + 1)]


def _register(a, b, which):
    return utils.bitcast(vector.shuffle(a, b, which), i32())


def _product(acc, left, right, element: str) -> tuple:
    """Acc + left [16, 16] times right [16, 8], by all threads of a warp."""
    ptx = f"mma.sync.aligned.m16n8k16.row.col.f32.{element}.{element}.f32 "
    ptx += "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    return tuple(utils.inline_ptx(ptx, *left, *right, *acc, result_types=[ir.F32Type.get()] * 4, convergent=True))


def _silu(x):
    count = x.type.shape[0]
    parts = [vector.extract(x, dynamic_position=[], static_position=[i]) for i in range(count)]
    decay = vector.from_elements(x.type, [mlir_math.exp(arith.negf(part)) for part in parts])
    return arith.divf(x, arith.addf(utils.c(1.0, x.type), decay))
