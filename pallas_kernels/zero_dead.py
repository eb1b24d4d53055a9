"""0 * NaN is NaN: values of slots that are nobody's are zeroed in shared memory before anything is multiplied by them.

tile of values    start | dead ... dead_to | seen by some query | dead_from ... dead |
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WGMMA = plgpu.Layout.WGMMA


def zero_dead(values, start, dead_to, dead_from, *, mine=True) -> None:
    """Zeroes values[s - start] for start <= s < dead_to and for s >= dead_from, a part of 64 x 64 after the other.

    Args:
      values: [a multiple of 64, a multiple of 64] in shared memory.
      start: the first row's slot.
      dead_to: slots before it are dead.
      dead_from: so are slots from it on.
      mine: whether this warpgroup has to do it.
    """
    rows, columns = values.shape

    @pl.when(mine & ((start + rows > dead_from) | (start < dead_to)))
    def _():
        for r in range(0, rows, 64):
            for c in range(0, columns, 64):
                part = values.at[pl.ds(r, 64), pl.ds(c, 64)]
                slot = plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=WGMMA) + (start + r)
                value = plgpu.layout_cast(part[...], WGMMA)
                seen = (slot >= dead_to) & (slot < dead_from)
                part[...] = jnp.where(seen, value, jnp.zeros_like(value))
        plgpu.commit_smem()
