"""The small kernels of a step: add and norm, rope and write, few rows times a matrix, copies of blocks.

anywhere    the bodies, interpreted, races looked for; every shape lowers to code for sm_90, pools aliased
a Hopper    the real kernels: rope and copies to the bit, a norm and a product to the rounding of one sum

Each against its XLA definition, products against float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import models
import paxattn as pax
from models.config import LlamaConfig
from models.layers import rms_norm
from pallas_kernels import mosaic
from pallas_kernels.add_norm import add_norm
from pallas_kernels.copy_blocks import copy_blocks
from pallas_kernels.few_rows import LIMITS, ROWS, few_rows, fits
from pallas_kernels.rope import apply_rope, turn_and_write
from tests.pallas_kernels.interpreter import RACES, on_cpu

on_hopper = pytest.mark.skipif(not mosaic.on_hopper(), reason="needs a Hopper GPU")
real = pytest.param(None, marks=on_hopper, id="real")
interpreted = pytest.param(RACES, marks=on_cpu, id="interpreted")

ROPE_SHAPES = {  # tokens, KV heads, query heads of each, head size, block size
    "tiny": (5, 2, 3, 64, 8),
    "135M": (32, 3, 3, 64, 16),
    "1B": (300, 8, 4, 64, 16),
    "8B": (32, 8, 4, 128, 16),
    "mqa-256": (9, 1, 8, 256, 128),
}
NORM_SHAPES = {"narrow": (3, 64), "135M": (3, 576), "1B": (32, 2048), "8B": (32, 4096), "long": (5, 1088)}

PRODUCT_SHAPES = {  # of the matrix; [K, 2, N] with a gate
    "one product": (16, 16),
    "ragged": (304, 80),
    "ragged-gate": (304, 2, 80),
    "135M-qkv": (576, 3, 5, 64),
    "135M-gate": (576, 2, 1536),
    "135M-down": (1536, 576),
    "1B-qkv": (2048, 8, 6, 64),
    "1B-out": (2048, 2048),
    "long": (2992, 2064),
    "long-gate": (2048, 2, 2048),
}


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def written(tokens, kv_heads, group, head_dim, block_size):
    """Arguments of `turn_and_write`; the last two tokens are idle, and their block and slot belong to others."""
    blocks = tokens // block_size + 2
    place = np.random.default_rng(0).permutation((blocks - 1) * block_size)[:tokens]
    place[-2:] = place[:2]
    qkv = normal(0, tokens, kv_heads, group + 2, head_dim)
    q = qkv[:, :, :-2].reshape(tokens, kv_heads * group, head_dim)
    turn = 100 * normal(1, tokens, 1, head_dim // 2, dtype=jnp.float32)
    pool = jnp.full((blocks, kv_heads, block_size, head_dim), jnp.nan, jnp.bfloat16)
    at = place // block_size + 1, place % block_size, [0, 1, tokens - 2]
    angles = jnp.cos(turn), jnp.sin(turn)
    return q, qkv[:, :, -2], qkv[:, :, -1], angles, pool, pool + 0, *(jnp.asarray(x, jnp.int32) for x in at)


@jax.jit
def written_by_xla(q, k, v, angles, k_pool, v_pool, block, slot, query_start):
    block = jnp.where(jnp.arange(block.size) < query_start[-1], block, k_pool.shape[0])
    k_pool, v_pool = (
        pool.at[block, :, slot].set(new, mode="drop") for pool, new in ((k_pool, apply_rope(k, angles)), (v_pool, v))
    )
    return apply_rope(q, angles), k_pool, v_pool


def same(got, want):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(g, np.float32), np.asarray(w, np.float32))


@pytest.mark.parametrize(
    ("interpret", "shape"),
    [
        pytest.param(RACES, "tiny", marks=on_cpu, id="interpreted"),
        *(pytest.param(None, s, marks=on_hopper) for s in ROPE_SHAPES),
    ],
)
def test_turn_and_write_is_rope_and_write(interpret, shape):
    given = written(*ROPE_SHAPES[shape])
    want = written_by_xla(*given)
    same(jax.jit(functools.partial(turn_and_write, interpret=interpret))(*given), want)


@pytest.mark.parametrize(
    ("interpret", "shape"),
    [
        *(pytest.param(RACES, s, marks=on_cpu, id=f"interpreted-{s}") for s in ("narrow", "135M", "long")),
        *(pytest.param(None, s, marks=on_hopper) for s in NORM_SHAPES),
    ],
)
def test_add_norm_is_add_and_norm(interpret, shape):
    x, delta, weight = normal(0, *NORM_SHAPES[shape]), normal(1, *NORM_SHAPES[shape]), normal(2, NORM_SHAPES[shape][1])
    total, normed = add_norm(x, delta, weight, eps=1e-2, interpret=interpret)
    same([total], [x + delta])
    got, want = np.asarray(normed, np.float32), np.asarray(rms_norm(x + delta, weight, 1e-2), np.float32)
    np.testing.assert_allclose(got, want, rtol=2**-6)  # a sum in another order may round the other way, twice
    assert interpret or (got == want).mean() > 0.99  # compiled for a GPU, an interpreted body skips roundings


def by_hand(x, w, gate):
    """The product in float64, gated if it has a gate."""
    x, w = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w))
    y = np.tensordot(x, w, 1)
    return y[:, 0] / (1 + np.exp(-y[:, 0])) * y[:, 1] if gate else y


@pytest.mark.parametrize(
    ("interpret", "shape", "dtype", "rows"),
    [
        *(
            pytest.param(RACES, s, jnp.bfloat16, n, marks=on_cpu, id=f"interpreted-{s}-{n}")
            for s, n in (("one product", 1), ("ragged", 5), ("ragged-gate", 17))
        ),
        *(
            pytest.param(None, s, d, n, marks=on_hopper)
            for s in PRODUCT_SHAPES
            for d in (jnp.bfloat16, jnp.float16)
            for n in (1, 5, 16, 25, 32)
        ),
    ],
)
def test_few_rows_is_a_product(interpret, shape, dtype, rows):
    gate, shape = shape.endswith("gate"), PRODUCT_SHAPES[shape]
    x, w = normal(0, rows, shape[0], dtype=dtype), normal(1, *shape, dtype=dtype) * dtype(shape[0] ** -0.5)
    assert fits(x[:1], w)
    y, want = few_rows(x, w, gated=gate, interpret=interpret), by_hand(x, w, gate)
    assert y.shape == want.shape
    unit = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=unit, atol=1e-5)  # rounded once
    for row in (0, -1):  # and no row of the matrix less, for any of x
        less = by_hand(x.at[:, row].set(0), w, gate)
        assert not np.isclose(np.asarray(y, np.float64), less, rtol=unit, atol=1e-5).reshape(rows, -1).all(axis=1).any()


@on_hopper
@pytest.mark.parametrize("shape", PRODUCT_SHAPES.keys())
def test_a_row_times_a_matrix_is_the_same_bits_in_any_company(shape):
    gate, shape = shape.endswith("gate"), PRODUCT_SHAPES[shape]
    x, w = normal(0, 32, shape[0]), normal(1, *shape)
    together = np.asarray(few_rows(x, w, gated=gate), np.float32)
    for rows in (slice(0, 1), slice(31, 32), slice(7, 12), slice(3, 20)):
        np.testing.assert_array_equal(np.asarray(few_rows(x[rows], w, gated=gate), np.float32), together[rows])


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("shape", PRODUCT_SHAPES.keys())
def test_few_rows_lowers(shape, rows):
    call = functools.partial(few_rows, gated=shape.endswith("gate"))
    assert "mosaic_gpu" in lowered(call, normal(0, rows, PRODUCT_SHAPES[shape][0]), normal(1, *PRODUCT_SHAPES[shape]))


@pytest.mark.parametrize(
    ("x", "w"),
    [
        ((33, 64), (64, 64)),  # more rows than few
        ((1, 64), (64, 24)),  # half a product
        ((1, 72), (72, 64)),
        ((1, 2560), (2560, LIMITS[1] // 2560 // 16 * 16 + 16)),  # XLA's own are as fast
        ((2, 2560), (2560, LIMITS[ROWS] // 2560 // 16 * 16 + 16)),
    ],
)
def test_few_rows_is_not_for_all(x, w):
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (x, w))
    assert not fits(x, w)
    assert not fits(jax.ShapeDtypeStruct((1, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32))


@pytest.mark.parametrize("interpret", [interpreted, real])
def test_copy_blocks_copies_what_has_a_target(interpret):
    pools = [normal(i, 7, 2, 8, 64) for i in range(10)]
    source, target = jnp.array([1, 3, 0, 4]), jnp.array([5, 0, 0, 6])
    want = [pool.at[target[::3]].set(pool[source[::3]]) for pool in pools]
    same(copy_blocks(pools, source, target, null=0, interpret=interpret), want)


def lowered(call, *given):
    """The call as a program for an H100, made without one."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=None)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=h100)):
        return jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("shape", ROPE_SHAPES.values(), ids=ROPE_SHAPES.keys())
def test_turn_and_write_lowers_in_place(shape):
    assert lowered(turn_and_write, *written(*shape)).count("output_operand_alias<") == 2


@pytest.mark.parametrize("shape", NORM_SHAPES.values(), ids=NORM_SHAPES.keys())
def test_add_norm_lowers(shape):
    x = normal(0, *shape)
    assert "mosaic_gpu" in lowered(functools.partial(add_norm, eps=1e-5), x, x, x[0])


@pytest.mark.parametrize("layers", [1, 32])
def test_copy_blocks_lowers_in_place(layers):
    ids = jnp.zeros(4, jnp.int32)
    text = lowered(functools.partial(copy_blocks, null=0), 2 * layers * [normal(0, 7, 2, 8, 64)], ids, ids)
    assert text.count("output_operand_alias<") == 2 * layers


@on_hopper
def test_no_pool_is_copied():
    pools, ids = [jnp.zeros((1000, 8, 16, 64), jnp.bfloat16) for _ in range(2)], jnp.zeros(4, jnp.int32)
    given = written(*ROPE_SHAPES["1B"])
    for program in (
        jax.jit(turn_and_write, donate_argnums=(4, 5)).lower(*given[:4], *pools, *given[6:]),
        jax.jit(functools.partial(copy_blocks, null=0), donate_argnums=0).lower(pools, ids, ids),
    ):
        assert program.compile().memory_analysis().temp_size_in_bytes < pools[0].nbytes / 2


CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=64, rms_norm_eps=1e-5, max_position_embeddings=64,
)  # fmt: skip


def kernels_of_a_step(attention, *, rows=2):
    """Which kernels of Mosaic a step of a small model has: add and norm, rope and write, products, any."""
    jax.clear_caches()
    model = models.random_llama(CONFIG, jax.random.key(0), "bfloat16")
    cache = pax.Cache.create(
        model.cache_spec, num_blocks=1 + 2 * rows, block_size=8, max_num_seqs=rows, max_model_len=16
    )

    def step(model, cache, count, tokens):
        cache, plan, _ = pax.extend(cache, count, budget=rows, attention=attention)
        return model(tokens, plan, cache.layers)

    ones = jnp.ones(rows, jnp.int32)
    lowered_once = lowered(step, model, cache, ones, ones)
    names = "call @add_norm", "call @turn_and_write", "call @few_rows", "mosaic_gpu"
    return tuple(name in lowered_once for name in names)


def test_a_name_decides_about_the_small_kernels_too(monkeypatch):
    here = mosaic.on_hopper()
    assert kernels_of_a_step("auto") == (here, here, here, here)
    monkeypatch.setattr(mosaic, "on_hopper", lambda: True)
    assert kernels_of_a_step("auto") == (True, True, True, True)
    assert kernels_of_a_step("auto", rows=40) == (True, True, False, True)
    assert kernels_of_a_step("xla") == (False, False, False, False)
