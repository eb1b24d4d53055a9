"""The prefill kernel without a GPU: its body interpreted, with race detection, and lowered for an H100."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import prefill, prefill_memory, reference
from pallas_kernels.cases import Case, make
from pallas_kernels.config import PrefillConfig
from pallas_kernels.prefill_plan import plan_tiles
from tests.pallas_kernels.interpreter import RACES, on_cpu

SMALL = Case((70, 9), (70, 3), heads=2, kv_heads=1, head_dim=64, block_size=8, idle=5)
CASES = {
    "ragged, idle tokens, blocks of 8": (SMALL, PrefillConfig(kv_tile=64, programs=2)),
    "chunks, odd group": (
        Case((150, 33, 90), (20, 1, 70), heads=1, kv_heads=1, head_dim=64, block_size=16),
        PrefillConfig(kv_tile=64, programs=2, query_stages=1),
    ),
    "window, soft cap, blocks across tiles": (
        Case((200, 5), (100, 5), heads=2, kv_heads=1, head_dim=64, block_size=24, sliding_window=40, soft_cap=2.0),
        PrefillConfig(kv_tile=64, programs=None),
    ),
}


def attention(implementation, case, **options):
    scale = case.head_dim**-0.5
    options |= {"scale": scale, "sliding_window": case.sliding_window, "soft_cap": case.soft_cap}
    return functools.partial(implementation.paged_attention, **options)


def error(got, want):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@on_cpu
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # NaN in slots that nobody sees
@pytest.mark.parametrize(("case", "config"), CASES.values(), ids=CASES.keys())
def test_equals_the_reference(case, config):
    arrays = make(case, dtype=jnp.bfloat16)
    out, lse = jax.jit(attention(prefill, case, config=config, interpret=RACES))(*arrays)
    want_out, want_lse = jax.jit(attention(reference, case))(*arrays)
    assert error(out, want_out) < 5e-3
    fed = np.isfinite(want_lse)
    assert (np.isfinite(lse) == fed).all()
    assert error(lse[fed], want_lse[fed]) < 1e-5
    short = jax.jit(attention(reference, case))(*arrays._replace(length=arrays.length - 1))[0]
    assert error(np.nan_to_num(np.asarray(short, np.float32)), want_out) > 5e-2, (
        "the tolerance must reject results of one token less"
    )


@on_cpu
@pytest.mark.parametrize("late", ["stream_queries", "stream_keys", "stream_values"])
def test_whichever_copies_are_late(late, monkeypatch):
    whole, free_slot = getattr(prefill, late), prefill_memory._free_slot

    def slept(slot):
        time.sleep(0.2)  # longer than the interpreter takes to reach a wait, on a busy machine too
        return slot

    def slow_slot(*args):
        return jax.pure_callback(slept, jax.ShapeDtypeStruct((), jnp.int32), free_slot(*args))

    def slow(call, refs):
        with monkeypatch.context() as patch:
            patch.setattr(prefill_memory, "_free_slot", slow_slot)
            return whole(call, refs)

    case = Case((260, 330), (4, 6), heads=2, kv_heads=1, head_dim=64, block_size=16)
    arrays = make(case, dtype=jnp.bfloat16)
    monkeypatch.setattr(prefill, late, slow)
    monkeypatch.setattr(prefill, "paged_attention", prefill.paged_attention.__wrapped__)  # not what was traced before
    config = PrefillConfig(kv_tile=64, programs=1)
    out, _ = jax.jit(attention(prefill, case, config=config, interpret=RACES))(*arrays)
    assert error(out, jax.jit(attention(reference, case))(*arrays)[0]) < 5e-3


def lower(num_tokens=1000, heads=8, kv_heads=2, head_dim=128, block_size=16, dtype=jnp.bfloat16, **options):
    sds = jax.ShapeDtypeStruct
    pool, rows = sds((65, kv_heads, block_size, head_dim), dtype), 3
    arguments = (
        sds((num_tokens, heads, head_dim), dtype), pool, pool, sds((rows, 64), jnp.int32), sds((rows,), jnp.int32),
        sds((rows + 1,), jnp.int32),
    )  # fmt: skip
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=None)
    function = functools.partial(prefill.paged_attention, scale=head_dim**-0.5, **options)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


LOWERED = {
    "head size 64, odd group": {"head_dim": 64, "heads": 9, "kv_heads": 3},
    "head size 128": {},
    "head size 256": {"head_dim": 256},
    "block size 8": {"block_size": 8},
    "block size 64": {"block_size": 64},
    "block size 128": {"block_size": 128},
    "block size 256, float16": {"block_size": 256, "dtype": jnp.float16},
    "tokens no multiple of 8": {"num_tokens": 1001},
    "window and soft cap": {"sliding_window": 100, "soft_cap": 30.0},
    "one head a KV head": {"heads": 2},
    "small tiles": {"config": PrefillConfig(kv_tile=64, stages=4)},
    "tiles of 192": {"config": PrefillConfig(kv_tile=192, stages=1)},
    "a program an item": {"config": PrefillConfig(programs=None)},
}


@pytest.mark.parametrize("options", LOWERED.values(), ids=LOWERED.keys())
def test_lowers_for_an_h100(options):
    assert "mosaic_gpu" in lower(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 96}, "head size is 96, must be one of 64, 128, 256"),
        ({"block_size": 12}, "block_size is 12, must be a multiple of 8"),
        ({"dtype": jnp.float32}, "float32 and float32, must both be bfloat16 or both float16"),
    ],
)
def test_what_has_no_layout_is_refused(options, message):
    with pytest.raises(NotImplementedError, match=message):
        lower(**options)


@pytest.mark.parametrize("tile", [64, 128])
def test_every_query_is_in_one_tile(tile):
    rng = np.random.default_rng(0)
    for _ in range(8):
        count = rng.integers(0, 150, size=5) * rng.integers(0, 2, size=5)
        length = count + rng.integers(0, 300, size=5) * (count > 0)
        start = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
        tokens = 800
        plan = plan_tiles(
            tokens, length.astype(np.int32), start, tile=tile, kv_tile=128, sliding_window=None
        )  # fmt: skip
        tiles = np.asarray(plan.tile)[: int(plan.live[0])]
        seen = np.zeros(tokens, int)
        for token, low, high, position, row, begin, end, _, dead_from in tiles:
            assert token % 8 == 0
            own = np.arange(token + low, token + high)
            seen[own] += 1
            if end:
                assert (own >= start[row]).all()
                assert (own < start[row + 1]).all()
                assert dead_from == length[row]
                assert position + low == length[row] - count[row] + own[0] - start[row]
                assert begin == 0
                assert end == (position + high - 1) // 128 + 1
            else:
                assert (own >= start[-1]).all()
        assert (seen == 1).all()
        work = tiles[:, 6] - tiles[:, 5]
        assert (np.diff(work) <= 0).all()
