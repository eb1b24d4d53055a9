"""The kernels for Hopper: on such a GPU against the definition, elsewhere interpreted and lowered.

a GPU      every case of HOPPER_CASES                 here    the real bodies, interpreted, races looked for
anywhere   every shape lowers to code for sm_90               (TINY_CASES: an interpreter takes seconds a case)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import config, decode, mosaic, paged_attention, prefill
from pallas_kernels.cases import CASES, HOPPER_CASES, TINY_CASES, make
from pallas_kernels.config import KernelConfig, PrefillConfig, decode_config, prefill_config, with_sizes, without_sizes
from tests.pallas_kernels.interpreter import RACES, by_warps, on_cpu
from tests.pallas_kernels.test_paged_attention import by_hand, error

TOLERANCE = 1e-2  # bf16, of the worst query; typically 2e-3
on_hopper = pytest.mark.skipif(not mosaic.on_hopper(), reason="needs a Hopper GPU")


def arrays_of(case, dtype=ml_dtypes.bfloat16):
    return make(case, dtype=dtype)


def worst(out, want):
    """The largest error of a query that sees something."""
    return np.max([error(got, ref) for got, ref in zip(out, want, strict=True) if ref.any()])  # max() loses a NaN


def check(case, arrays, out, lse):
    """Out and lse against float64 on the same rounded inputs; idle queries give 0 and -inf."""
    want_out, want_lse = by_hand(case, arrays)
    assert worst(out, want_out) < TOLERANCE
    assert not np.asarray(out, float)[~want_out.any(axis=(1, 2))].any()
    fed = np.isfinite(want_lse)
    assert (np.isfinite(lse) == fed).all()
    np.testing.assert_allclose(np.asarray(lse)[fed], want_lse[fed], atol=1e-4)


@pytest.fixture
def few_programs(monkeypatch):
    """Two programs a kernel instead of one for each of 132 processors."""
    monkeypatch.setattr(decode, "decode_config", lambda *_: KernelConfig(num_sms=2))
    monkeypatch.setattr(prefill, "prefill_config", lambda _: PrefillConfig(programs=2))
    decode.paged_attention.clear_cache()


@on_cpu
@by_warps
@pytest.mark.parametrize("case", TINY_CASES.values(), ids=TINY_CASES.keys())
@pytest.mark.usefixtures("few_programs")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN is multiplied, and masked
def test_the_real_body_interpreted(case):
    arrays = arrays_of(case)
    out, lse = mosaic.run(*map(jnp.asarray, arrays), interpret=RACES, **case.all_options)
    check(case, arrays, out, lse)


@on_hopper
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", HOPPER_CASES.values(), ids=HOPPER_CASES.keys())
def test_equals_the_definition(case, dtype):
    arrays = arrays_of(case, dtype)
    call = functools.partial(paged_attention, implementation="mosaic")
    out, lse = jax.jit(functools.partial(call, max_queries=case.max_queries, **case.options))(*arrays)
    check(case, arrays, out, lse)


@by_warps
@pytest.mark.parametrize("count", [1, 2])
def test_how_many_sizes_the_last_copies_have_does_not_show(count):
    """Fewer read more dead tokens, which are NaN here and weigh nothing."""
    case, rest, few = HOPPER_CASES["decode-block-128"], {}, {}
    if not mosaic.on_hopper():
        case, rest, few = TINY_CASES["decode-soft-cap"], {"interpret": RACES}, {"num_sms": 2}
    run = functools.partial(mosaic.run, **case.all_options | rest)
    arrays = [*map(jnp.asarray, arrays_of(case))]
    got, want = (run(*arrays, sizes={"tail_sizes": n, **few}) for n in (count, 8))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_tolerance_rejects():
    case = HOPPER_CASES["decode-block-8"]
    arrays = arrays_of(case)
    zeroed = arrays._replace(k_pool=np.nan_to_num(arrays.k_pool), v_pool=np.nan_to_num(arrays.v_pool))
    want, _ = by_hand(case, arrays)
    pages = arrays.pages.copy()
    pages[4, 7] = pages[4, 8]
    for wrong in (
        np.zeros_like(want),
        by_hand(case, zeroed._replace(v_pool=zeroed.k_pool))[0],
        by_hand(case, zeroed._replace(pages=pages))[0],
        by_hand(case, zeroed._replace(length=np.maximum(arrays.length - 1, 1)))[0],
    ):
        assert worst(wrong, want) > 2 * TOLERANCE


def lowered(case, dtype=jnp.bfloat16, **more):
    """The call as a program for an H100, made without one."""
    arrays = [jax.ShapeDtypeStruct(a.shape, dtype if a.ndim > 2 else a.dtype) for a in arrays_of(case)]
    call = jax.jit(functools.partial(mosaic.run, **case.all_options | more))
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=None)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=h100)):
        return call.trace(*arrays).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("case", HOPPER_CASES.values(), ids=HOPPER_CASES.keys())
def test_lowers_for_an_h100(case):
    assert "mosaic_gpu" in lowered(case).as_text()


def test_half_precision_lowers_too():
    assert "f16" in lowered(HOPPER_CASES["decode"], jnp.float16).as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 80}, "head size is 80, must be one of 64, 128, 256"),
        ({"block_size": 4}, "block_size is 4, must be a multiple of 8"),
        ({"heads": 130}, "65 query heads share a KV head, at most 64 may"),
    ],
)
def test_what_it_cannot_do_is_said(monkeypatch, change, message):
    monkeypatch.setattr(mosaic, "on_hopper", lambda: True)
    case = TINY_CASES["decode"]
    arrays = arrays_of(type(case)(**{**vars(case), **change}))
    with pytest.raises(NotImplementedError, match=message):
        paged_attention(*arrays, implementation="mosaic")


def test_other_dtypes_are_refused(monkeypatch):
    monkeypatch.setattr(mosaic, "on_hopper", lambda: True)
    with pytest.raises(NotImplementedError, match="float32 and float32, must both be bfloat16"):
        paged_attention(*arrays_of(TINY_CASES["decode"], np.float32), implementation="mosaic")


@pytest.mark.skipif(mosaic.on_hopper(), reason="here it runs")
def test_asked_for_by_name_it_raises_where_it_cannot_run():
    with pytest.raises(NotImplementedError, match='not a Hopper GPU; "xla" and "auto" run'):
        paged_attention(*make(CASES["decode"]), implementation="mosaic")


def test_sizes_stand_in_the_name(monkeypatch):
    """Those named replace the measured best of a call; the others stay."""
    sizes = {"kv_tile": 128, "prefill_stages": 4}
    assert without_sizes(with_sizes("auto", **sizes)) == ("mosaic", sizes)
    assert without_sizes("auto(kv_tile=128, prefill_stages=4)") == ("mosaic", sizes)
    assert without_sizes("xla") == ("xla", {})
    seen = []

    def spy(q, *_, config=None, **__):
        seen.append(config)
        return q, q[..., 0]

    monkeypatch.setattr(mosaic, "on_hopper", lambda: True)
    monkeypatch.setattr(decode, "paged_attention", spy)
    monkeypatch.setattr(prefill, "paged_attention", spy)
    arrays = arrays_of(HOPPER_CASES["decode-block-8"])
    few = decode_config(arrays.q.shape[2], arrays.pages.shape[0], arrays.pages.shape[1] * arrays.k_pool.shape[2])
    many = prefill_config(arrays.q.shape[2])
    few, many = dataclasses.replace(few, stages=3), dataclasses.replace(many, stages=4, kv_tile=64)
    for most, wanted in ((1, [few]), (None, [many, few])):  # decode alone; prefill, then decode
        for name, configs in (
            ("mosaic", [None] * len(wanted)),
            ("mosaic(stages=3, prefill_stages=4, prefill_kv_tile=64)", wanted),
        ):
            paged_attention(*map(jnp.asarray, arrays), implementation=name, max_queries=most)
            assert seen == configs
            seen.clear()


@pytest.mark.parametrize(("name", "message"), [
    (
        "mosaic(tile=64)",
        "unknown sizes tile; mosaic has kv_tile, stages, workers, num_sms, item_tiles, tail_sizes, prefill_kv_tile",
    ),
    ("mosaic(kv_tile=96)", "kv_tile is 96, must be a multiple of 64, at most 256"),
    ("mosaic(kv_tile=320)", "kv_tile is 320"),
    ("mosaic(workers=3)", "workers is 3, must be at most 2"),
    ("mosaic(stages=0)", "stages is 0, must be an integer of at least 1"),
    ("mosaic(prefill_kv_tile=96)", "kv_tile is 96, must be a multiple of 64"),
    ("mosaic(prefill_compute_registers=248)", r"compute_registers is 248, must be a multiple of 8 in 168\.\.240"),
    ("mosaic(kv_tile)", "must have the form"),
    ("xla(kv_tile=64)", "'xla' has none"),
])  # fmt: skip
def test_sizes_that_there_are_none_of_are_refused(name, message):
    arrays = arrays_of(HOPPER_CASES["decode-block-8"])
    with pytest.raises(ValueError, match=message):
        paged_attention(*map(jnp.asarray, arrays), implementation=name)


@pytest.mark.parametrize(("case", "sizes"), [
    ("decode", {"workers": 1, "kv_tile": 64, "stages": 6}),
    ("decode-head-256", {"kv_tile": 64, "stages": 3}),
    ("prefill-last-token", {"prefill_stages": 3}),
])  # fmt: skip
def test_sizes_that_shared_memory_cannot_hold_are_refused(case, sizes):
    """When the program is lowered; one stage less is fine."""
    fewer = {name: value - name.endswith("stages") for name, value in sizes.items()}
    assert "mosaic_gpu" in lowered(HOPPER_CASES[case], sizes=fewer).as_text()
    with pytest.raises(ValueError, match=r"(?i)shared memory"):
        lowered(HOPPER_CASES[case], sizes=sizes)


def test_as_many_programs_as_the_device_has_multiprocessors(monkeypatch):
    monkeypatch.setattr(config, "multiprocessors", lambda: 114)
    assert [decode_config(size, rows, 4096).num_sms for size in (64, 256) for rows in (1, 64)] == [114] * 4
    assert [prefill_config(size).programs for size in (64, 256)] == [114] * 2
