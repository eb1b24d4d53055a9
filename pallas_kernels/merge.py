"""Weighs the partial results of a split item by their log-sum-exps: one small kernel after `decode`.

    workers   | 3          | 4          | 5          |       item b: partials of 3, 4 and 5
    items     |--a--|------------b-----------|---c---|       the border of 3 and 4, the first inside b, merges them

Only the items that a border splits are touched; they are written in place among the whole ones.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOW = -1e30
"""Where a running maximum starts: finite, so that a run without a visible key gives exp(-inf - LOW) = 0."""

AHEAD = 4
"""Partial results that are read at once."""


def merge(whole, partial, share: jax.Array, *, used: int, interpret=None) -> tuple[jax.Array, jax.Array]:
    """Completes `whole` with the split items.

    Args:
      whole: out [n, K, rows, D] and lse [n, K, 8 or more], of which split items hold anything.
      partial: out [2 * workers, 2, rows, D], high and low half, and lse [2 * workers, 8 or more].
      share: of the schedule, [workers + 1, 3].
      used: rows that count.
      interpret: see `plgpu.kernel`.
    """
    (out, lse), (part, part_lse) = whole, partial
    num_tiles, kv_heads, rows, head_dim = out.shape
    workers = share.shape[0] - 1
    chunk = max(head_dim, 128)  # elements a block merges: one row, or two of 64
    per = chunk // head_dim
    blocks = max(used // per, 1)
    layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=chunk // 128)

    def body(out_ref, lse_ref, part_ref, part_lse_ref, share_ref):
        border, block = lax.axis_index("border"), lax.axis_index("block")
        first, skip = share_ref[border, 0], share_ref[border, 1]
        item, rest, splits = (share_ref[border + 1, i] for i in range(3))

        def spread(scalars):
            lane = plgpu.broadcasted_iota(jnp.int32, (chunk,), 0, layout=layout)
            return scalars[0] if per == 1 else jnp.where(lane < head_dim, scalars[0], scalars[1])

        def part_of(i, row):
            """Slot of the item's i-th partial result, and its log-sum-exp; past the last: the first, at weight 0."""
            slot = jnp.where((i == 0) | (i > splits), 2 * border + jnp.minimum(item - first, 1), 2 * (border + i))
            return slot, [jnp.where(i <= splits, part_lse_ref[slot, row + r], -jnp.inf) for r in range(per)]

        def value_of(slot, row):
            halves = [part_ref.at[slot, half, pl.ds(row * head_dim, chunk)] for half in range(2)]
            high, low = (plgpu.load(x, layout=layout, optimized=False).astype(jnp.float32) for x in halves)
            return high + low

        def weigh(row):
            def some_parts(step, carry):  # AHEAD at once, so that their loads wait for memory together
                acc, high, total = carry
                slots, lses = zip(*(part_of(step * AHEAD + i, row) for i in range(AHEAD)), strict=True)
                values = [value_of(slot, row) for slot in slots]
                new = [functools.reduce(jnp.maximum, column) for column in zip(high, *lses, strict=True)]
                shrink = [jnp.exp(a - b) for a, b in zip(high, new, strict=True)]
                acc, total = acc * spread(shrink), [t * s for t, s in zip(total, shrink, strict=True)]
                for value, lse in zip(values, lses, strict=True):
                    weight = [jnp.exp(a - b) for a, b in zip(lse, new, strict=True)]
                    acc, total = acc + value * spread(weight), [t + w for t, w in zip(total, weight, strict=True)]
                return acc, tuple(new), tuple(total)

            start = plgpu.layout_cast(jnp.zeros((chunk,), jnp.float32), layout)
            carry = start, (jnp.float32(LOW),) * per, (jnp.float32(0),) * per
            acc, high, total = lax.fori_loop(0, lax.div(splits, jnp.int32(AHEAD)) + 1, some_parts, carry)
            some = [t != 0 for t in total]
            safe = [jnp.where(s, t, 1.0) for s, t in zip(some, total, strict=True)]
            tile, head = lax.div(item, jnp.int32(kv_heads)), lax.rem(item, jnp.int32(kv_heads))
            acc = acc * spread([1.0 / s for s in safe])
            out_ref[tile, head, pl.ds(row * head_dim, chunk)] = acc.astype(out_ref.dtype)
            for r in range(per):
                lse_ref[tile, head, row + r] = jnp.where(some[r], high[r] + jnp.log(safe[r]), -jnp.inf)

        @pl.when((rest > 0) & ((first < item) | ((first == item) & (skip == 0))))
        def _():
            weigh(block * per)
            if used > per and used % per:  # one row is left: the last block takes it together with the one before
                pl.when(block == blocks - 1)(lambda: weigh(used - per))

    out_ref = jax.new_ref(out.reshape(num_tiles, kv_heads, rows * head_dim))
    lse_ref = jax.new_ref(lse)
    plgpu.kernel(
        body,
        out_type=(),
        grid=(workers, blocks),
        grid_names=("border", "block"),
        num_threads=1,
        thread_name="wg",
        kernel_name="merge_partials",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(out_ref, lse_ref, part.reshape(*part.shape[:2], -1), part_lse, share)
    return jax.freeze(out_ref).reshape(out.shape), jax.freeze(lse_ref)
