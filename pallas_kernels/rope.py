"""Rotary position embedding, and with it the way of new keys and values into their pools, in one kernel.

    qkv [T, K, G + 2, D]   | q .. q | k | v |          a thread turns 8 pairs: 8 neighbours of a head's first half
                             |  turn  |   |            and the 8 of its second half that belong to them
                             v        v   v
                             q'    pools, at the token's block and slot; those of an idle token nowhere

A head [x1 | x2] turned by the angle position * frequency is [x1 cos - x2 sin | x2 cos + x1 sin] (Su et al. 2021; in
halves, as Hugging Face stores them). XLA makes three launches of this, and at a few rows a launch is all it costs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, vector

from pallas_kernels.layouts import DTYPES
from pallas_kernels.scalars import VECTOR, const, equal, i32, less, place, split, times


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns heads [T, n, D] by their tokens' angles: cosine and sine, float32 [T, 1, D / 2]."""
    cos, sin = angles
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def fits(q: jax.Array, k_pool: jax.Array) -> bool:
    """Whether `turn_and_write` is made for these: 16-bit, halves of whole vectors. Looks at shapes and dtypes alone."""
    return q.dtype == k_pool.dtype and q.dtype.name in DTYPES and q.shape[-1] % (2 * VECTOR) == 0


@functools.partial(jax.jit, static_argnames=("interpret",))
def turn_and_write(q, k, v, angles, k_pool, v_pool, block, slot, query_start, *, interpret=None):
    """`apply_rope` of q and k, and the writing of k and v: (q [T, H, D], k_pool, v_pool), the pools in place.

    Args:
      q: [T, H, D], not turned.
      k: [T, K, D], not turned.
      v: [T, K, D]; where q, k and v are cut from one product [T, K, G + 2, D], XLA passes that and copies nothing.
      angles: cosine and sine, float32 [T, 1, D / 2].
      k_pool: [N, K, S, D].
      v_pool: [N, K, S, D].
      block: int32 [T] where each token goes.
      slot: int32 [T] its place there.
      query_start: int32 [B + 1]; tokens from query_start[B] on are idle: turned, but not written.
      interpret: see `plgpu.kernel`.
    """
    (tokens, _, head_dim), kv_heads = q.shape, k.shape[1]
    qkv = jnp.concatenate([q.reshape(tokens, kv_heads, -1, head_dim), k[:, :, None], v[:, :, None]], axis=2)
    tasks = kv_heads * qkv.shape[2] * head_dim // (2 * VECTOR)
    turn = _turn_interpreted if interpret else _turn

    def turn_and_write_kernel(qkv_ref, cos_ref, sin_ref, block_ref, slot_ref, query_start_ref, k_ref, v_ref, q_ref):
        token, part = lax.axis_index("token"), lax.axis_index("part")
        live = token < query_start_ref[query_start.size - 1]
        turn(qkv_ref, cos_ref, sin_ref, q_ref, k_ref, v_ref, token, part, block_ref[token], slot_ref[token], live)

    k_ref, v_ref = jax.new_ref(k_pool), jax.new_ref(v_pool)
    q = plgpu.kernel(
        turn_and_write_kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(1 if interpret else -(-tasks // 128), tokens),
        grid_names=("part", "token"),
        num_threads=1,
        thread_name="wg",
        kernel_name="rope_and_write",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(qkv, *angles, block, slot, query_start, k_ref, v_ref)
    return q, jax.freeze(k_ref), jax.freeze(v_ref)


def _turn_interpreted(qkv, cos, sin, q, k_pool, v_pool, token, part, block, slot, live) -> None:
    """All heads of a token, as arrays."""
    kv_heads, group = qkv.shape[1], qkv.shape[2] - 2
    angles = cos[token, 0, :], sin[token, 0, :]
    for kv_head in range(kv_heads):
        for head in range(group):
            q[token, kv_head * group + head, :] = apply_rope(qkv[token, kv_head, head, :], angles)

        @pl.when(live)
        def _(kv_head=kv_head):
            k_pool[block, kv_head, slot, :] = apply_rope(qkv[token, kv_head, group, :], angles)
            v_pool[block, kv_head, slot, :] = qkv[token, kv_head, group + 1, :]


def _turn(qkv, cos, sin, q, k_pool, v_pool, *scalars) -> None:
    """A thread's 8 pairs: of head `head` (queries, key, value) of KV head `kv_head`, from column `column` on."""
    _, _, width, head_dim = qkv.shape
    half, group, dtype = head_dim // 2, width - 2, qkv.dtype
    tasks = qkv.shape[1] * width * half // VECTOR

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 6 + (plgpu.Layout.WG_SPLAT,) * 5)
    def turn(_, qkv, cos, sin, q, k_pool, v_pool, *scalars):
        token, part, block, slot, live = (s.registers.item() for s in scalars)
        thread = arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x))
        task = arith.addi(times(part, 128), thread)

        def load(ref, *at, dtype):
            return vector.load(ir.VectorType.get((VECTOR,), dtype), ref, [place(n) for n in at])

        with utils.when(less(task, tasks)):
            rest, column = split(task, half // VECTOR)
            kv_head, head = split(rest, width)
            column = times(column, VECTOR)
            columns = column, arith.addi(column, const(half))
            narrow, wide = utils.dtype_to_ir_type(dtype), ir.VectorType.get((VECTOR,), ir.F32Type.get())
            pair = [load(qkv, token, kv_head, head, c, dtype=narrow) for c in columns]
            zero = const(0)
            c, s = (load(ref, token, zero, column, dtype=ir.F32Type.get()) for ref in (cos, sin))
            low, high = (arith.extf(wide, x) for x in pair)
            turned = (
                arith.subf(arith.mulf(low, c), arith.mulf(high, s)),
                arith.addf(arith.mulf(high, c), arith.mulf(low, s)),
            )
            turned = [arith.truncf(x.type, t) for x, t in zip(pair, turned, strict=True)]

            def put(ref, values, *at):
                for value, c in zip(values, columns, strict=True):
                    vector.store(value, ref, [place(n) for n in (*at, c)])

            with utils.when(less(head, group)):
                put(q, turned, token, arith.addi(times(kv_head, group), head))
            with utils.when(arith.andi(live, equal(head, group))):
                put(k_pool, turned, block, kv_head, slot)
            with utils.when(arith.andi(live, equal(head, group + 1))):
                put(v_pool, pair, block, kv_head, slot)

    turn(qkv, cos, sin, q, k_pool, v_pool, *scalars)
