"""Some rows of a register tile to packed memory: what TMA, which moves whole tiles, cannot do.

tile       | neighbour's | low ... high | neighbour's |
                           store_rows
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector


def store_rows(ref, value, token, head, low, high, *, interpret: bool) -> None:
    """ref[token + r, head] = value[r] for low <= r < high.

    Args:
      ref: [T, H] or [T, H, D] in global memory.
      value: [64] or [64, D] in the layout of a matrix product's rows.
      token: first row's place on the token axis.
      head: place on the head axis.
      low: first row that is stored.
      high: where storing ends.
      interpret: whether the kernel is interpreted.
    """
    if interpret:
        for r in range(value.shape[0]):

            @pl.when((low <= r) & (r < high))
            def _(r=r):
                ref[token + r, head] = value[r]

        return

    wgmma, scalar = plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT
    layout = wgmma if value.ndim == 2 else wgmma.reduce(1)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, scalar, scalar, scalar, scalar))
    def store(_, ref, value, *scalars):
        index = ir.IndexType.get()
        token, head, low, high = (arith.index_cast(index, s.registers.item()) for s in scalars)
        places = value.layout.thread_idxs(value.shape)
        for (row, *column), register in zip(places, value.registers.flat, strict=True):
            after_low = arith.cmpi(arith.CmpIPredicate.sge, row, low)
            before_high = arith.cmpi(arith.CmpIPredicate.slt, row, high)
            with utils.when(arith.andi(after_low, before_high)):
                vector.store(register, ref, [arith.addi(token, row), head, *column])

    store(ref, value, *(jnp.asarray(x, jnp.int32) for x in (token, head, low, high)))
