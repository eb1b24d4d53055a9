"""x + delta and the norm of the sum, in one kernel: what a layer does between two matmuls.

    block t, 128 threads    x[t] + delta[t] --> total[t] --> mean of squares --> normed[t] = total[t] / rms * weight
    registers               | 0..7 | 8..15 | ... | E-8..E-1 | 0 | 0 |    8 neighbours each, zeros past the end

At a few rows the memory moved is nothing and a launch is everything: XLA makes three of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.layouts import DTYPES
from pallas_kernels.scalars import VECTOR


def fits(x: jax.Array, weight: jax.Array) -> bool:
    """Whether the kernel is made for these: 16-bit, rows of whole vectors. Only shapes and dtypes are looked at."""
    return x.dtype == weight.dtype and x.dtype.name in DTYPES and x.shape[-1] % VECTOR == 0


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def add_norm(x, delta, weight, *, eps: float, interpret=None) -> tuple[jax.Array, jax.Array]:
    """The sum x + delta [T, E], and its root-mean-square norm times weight: float32 inside, rounded where XLA rounds.

    Args:
      x: [T, E], bfloat16 or float16, E a multiple of 8.
      delta: [T, E] of the same dtype.
      weight: [E] of the same dtype.
      eps: added to the mean of squares.
      interpret: see `plgpu.kernel`.
    """
    (tokens, embed), unit = x.shape, VECTOR * 128
    width = -(-embed // unit) * unit
    load = functools.partial(_load, width=width, interpret=bool(interpret))
    store = functools.partial(_store, interpret=bool(interpret))

    def add_and_norm(x_ref, delta_ref, weight_ref, total_ref, normed_ref):
        token = lax.axis_index("token")
        weight = load(weight_ref, 0).astype(jnp.float32)  # asked for before the sum waits for all threads
        total = (load(x_ref, token).astype(jnp.float32) + load(delta_ref, token).astype(jnp.float32)).astype(x.dtype)
        store(total_ref, token, total)
        wide = total.astype(jnp.float32)
        rms = lax.rsqrt(jnp.sum(wide * wide) / embed + eps)
        normed = (wide * rms).astype(x.dtype).astype(jnp.float32) * weight
        store(normed_ref, token, normed.astype(x.dtype))

    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plgpu.kernel(
        add_and_norm,
        out_type=(like, like),
        grid=(tokens,),
        grid_names=("token",),
        num_threads=1,
        thread_name="wg",
        kernel_name="add_and_norm",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(x, delta, weight[None])


def _load(ref, row, *, width: int, interpret: bool):
    """[width]: ref[row], zeros past its end."""
    embed, dtype = ref.shape[1], ref.dtype
    if interpret:
        return jnp.pad(ref[row, :], (0, width - embed))
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=VECTOR)
    result = plgpu.ShapeDtypeStruct((width,), dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=result)
    def load(_, ref, row):
        index, vec = ir.IndexType.get(), ir.VectorType.get((VECTOR,), utils.dtype_to_ir_type(dtype))
        strided = fragmented_array.WGStridedFragLayout((width,), VECTOR)
        start, row = utils.c(0, index), arith.index_cast(index, row.registers.item())
        registers = []
        for place in strided.linear_thread_idxs():
            inside = arith.cmpi(arith.CmpIPredicate.ult, place, utils.c(embed, index))
            value = vector.load(vec, ref, [row, arith.select(inside, place, start)])
            registers.append(arith.select(inside, value, utils.c(0.0, vec)))
        return fragmented_array.FragmentedArray(
            _registers=np.array(registers, object), _layout=strided, _is_signed=None
        )

    return load(ref, jnp.asarray(row, jnp.int32))  # pyright: ignore[reportCallIssue]


def _store(ref, row, value, *, interpret: bool) -> None:
    """ref[row] = value, as far as the row goes."""
    embed = ref.shape[1]
    if interpret:
        ref[row, :] = value[:embed]
        return
    layout = plgpu.Layout.WG_STRIDED(value.shape, vec_size=VECTOR)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, plgpu.Layout.WG_SPLAT))
    def store(_, ref, value, row):
        index = ir.IndexType.get()
        row = arith.index_cast(index, row.registers.item())
        for place, register in zip(value.layout.linear_thread_idxs(), value.registers.flat, strict=True):
            with utils.when(arith.cmpi(arith.CmpIPredicate.ult, place, utils.c(embed, index))):
                vector.store(register, ref, [row, place])

    store(ref, value, jnp.asarray(row, jnp.int32))  # pyright: ignore[reportCallIssue]
