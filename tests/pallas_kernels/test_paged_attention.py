"""Every implementation of paged attention against a float64 loop, on the shared cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import IMPLEMENTATIONS, paged_attention, reference
from pallas_kernels.cases import CASES, make

ANYWHERE = [name for name in IMPLEMENTATIONS if name != "mosaic"]  # that one: test_mosaic.py
TOLERANCE = 1e-5  # float32; `test_the_tolerance_rejects` shows what it catches


def by_hand(case, arrays):
    """The definition once more, in float64, token by token, and only over slots that a row holds."""
    q, k_pool, v_pool, pages, length, query_start = (np.asarray(a) for a in arrays)
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    scale = q.shape[2] ** -0.5 if case.scale is None else case.scale
    group = q.shape[1] // k_pool.shape[1]
    for b in range(len(length)):
        at = np.arange(length[b])
        keys = k_pool[pages[b, at // case.block_size], :, at % case.block_size].astype(float)
        values = v_pool[pages[b, at // case.block_size], :, at % case.block_size].astype(float)
        for t in range(query_start[b], query_start[b + 1]):
            position = length[b] - query_start[b + 1] + t
            first = 0 if case.sliding_window is None else max(0, position - case.sliding_window + 1)
            for h in range(q.shape[1]):
                score = keys[first : position + 1, h // group] @ q[t, h].astype(float) * scale
                if case.soft_cap is not None:
                    score = case.soft_cap * np.tanh(score / case.soft_cap)
                high = score.max()
                weight = np.exp(score - high)
                lse[t, h] = high + np.log(weight.sum())
                out[t, h] = weight @ values[first : position + 1, h // group] / weight.sum()
    return out, lse


def error(got, want):
    return np.linalg.norm(np.asarray(got, float) - want) / max(np.linalg.norm(want), 1e-30)


@functools.partial(jax.jit, static_argnames=("name", "options"))
def call(arrays, name, options):
    return paged_attention(*arrays, implementation=name, **dict(options))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", ANYWHERE)
def test_equals_the_definition(name, case):
    arrays = make(case)
    out, lse = call(arrays, name, tuple(case.options.items()))
    want_out, want_lse = by_hand(case, arrays)
    assert error(out, want_out) < TOLERANCE
    fed = np.isfinite(want_lse)
    assert (np.isfinite(lse) == fed).all()
    assert error(np.asarray(lse)[fed], want_lse[fed]) < TOLERANCE


def faults(arrays, want):
    """Results that a wide tolerance would let pass."""
    yield "zeros", np.zeros_like(want)
    yield "values from keys", by_hand(CASES["decode-block-16"], arrays._replace(v_pool=arrays.k_pool))[0]
    pages = arrays.pages.copy()
    pages[0, 3] = pages[0, 4]
    yield "one wrong page", by_hand(CASES["decode-block-16"], arrays._replace(pages=pages))[0]
    yield "one token short", by_hand(CASES["decode-block-16"], arrays._replace(length=arrays.length - 1))[0]


def test_the_tolerance_rejects():
    case = CASES["decode-block-16"]
    arrays = make(case)
    arrays = arrays._replace(length=np.maximum(arrays.length, 2))
    arrays = arrays._replace(k_pool=np.nan_to_num(arrays.k_pool), v_pool=np.nan_to_num(arrays.v_pool))
    want, _ = by_hand(case, arrays)
    for fault, wrong in faults(arrays, want):
        assert error(wrong, want) > 100 * TOLERANCE, fault


def test_block_names_are_unobservable():
    arrays = make(CASES["mixed"])
    order = np.random.default_rng(3).permutation(len(arrays.k_pool) - 1) + 1
    order = np.concatenate([[0], order])
    renamed = arrays._replace(
        k_pool=arrays.k_pool[np.argsort(order)],
        v_pool=arrays.v_pool[np.argsort(order)],
        pages=order[arrays.pages].astype(np.int32),
    )
    for name in ANYWHERE:
        for a, b in zip(call(arrays, name, ()), call(renamed, name, ()), strict=True):
            np.testing.assert_array_equal(a, b)


def test_xla_makes_no_dense_copy():
    """Temporaries stay far below the [B, P * S] copy that a gather of everything would be."""
    rows, pages, kv_heads, size, dim = 8, 256, 2, 16, 32
    sds = jax.ShapeDtypeStruct
    pool = sds((rows * pages + 1, kv_heads, size, dim), np.float32)
    arguments = (
        sds((rows, 4, dim), np.float32), pool, pool, sds((rows, pages), np.int32), sds((rows,), np.int32),
        sds((rows + 1,), np.int32),
    )  # fmt: skip

    def temporaries(name):
        lowered = jax.jit(lambda *a: paged_attention(*a, implementation=name)).lower(*arguments)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    dense = rows * pages * size * kv_heads * dim * 4
    assert temporaries("xla") < dense / 4
    assert temporaries("reference") > dense, "the measure must see a dense copy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((3, 4))}, "q has shape"),
        ({"q": np.zeros((4, 4, 8), np.float32)}, "head size of q"),
        ({"q": np.zeros((4, 5, 16), np.float32)}, "5 query heads are no multiple of 2"),
        ({"k_pool": np.zeros((3, 2, 4), np.float32)}, "k_pool has shape"),
        ({"v_pool": np.zeros((3, 2, 4, 16), np.float32)}, "differ"),
        ({"pages": np.zeros(3, np.int32)}, "pages has shape"),
        ({"length": np.zeros(3, np.int32)}, "length has shape"),
        ({"query_start": np.zeros(4, np.int32)}, "query_start has shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(*make(CASES["decode"])._replace(**change))


def test_options_out_of_range_are_refused():
    arrays = make(CASES["decode"])
    with pytest.raises(ValueError, match="'flash' is unknown; choose one of auto, reference, xla, mosaic"):
        paged_attention(*arrays, implementation="flash")
    with pytest.raises(ValueError, match="sliding_window is 0"):
        paged_attention(*arrays, sliding_window=0)
    with pytest.raises(ValueError, match="soft_cap is 0"):
        paged_attention(*arrays, soft_cap=0.0)


def test_a_name_means_its_latest_function(monkeypatch):
    """What is compiled knows an implementation by its name."""
    arrays = make(CASES["decode"])
    monkeypatch.setitem(IMPLEMENTATIONS, "mine", reference.paged_attention)
    run = jax.jit(functools.partial(paged_attention, implementation="mine"))
    first, _ = run(*arrays)
    IMPLEMENTATIONS["mine"] = lambda q, *_, **__: (jnp.zeros_like(q), jnp.zeros(q.shape[:2]))
    assert first.any()
    assert not run(*arrays)[0].any()
