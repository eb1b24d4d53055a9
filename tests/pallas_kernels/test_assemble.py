"""What ptxas says of the kernels, read; and asked, where JAX has its CUDA plugin."""

import importlib.util

import pytest

from pallas_kernels.assemble import Assembled, AssemblerError, assemble, problem, read

PLUGIN = any(importlib.util.find_spec(name) for name in ("jax_cuda13_plugin", "jax_cuda12_plugin"))
SAID = """
case decode
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the function 'paged_decode_mosaic_gpu_kernel'
ptxas info    : Compiling entry function 'paged_decode_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for paged_decode_mosaic_gpu_kernel
    264 bytes stack frame, 612 bytes spill stores, 556 bytes spill loads
ptxas info    : Used 208 registers, used 16 barriers, 264 bytes cumulative stack size, 1 bytes smem
ptxas info    : Compiling entry function 'merge_partials_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 2 barriers
case verify
ptxas info    : Compiling entry function 'paged_decode_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


def test_what_it_says_is_read_kernel_by_kernel():
    assert read(SAID + SAID) == [
        Assembled("decode", "paged_decode", 208, 1168, True),
        Assembled("decode", "merge_partials", 40, 0, False),
        Assembled("verify", "paged_decode", 168, 0, False),
    ]


def test_unknown_cases_are_refused():
    with pytest.raises(KeyError, match=r"no case nothing; there are decode, "):
        assemble(["nothing"])


def test_a_case_that_fails_is_named():
    assert "case verify does not compile for an H100:" in str(problem(SAID + "ValueError: shared memory is full\n"))
    assert "shared memory is full" in str(problem(SAID + "ValueError: shared memory is full\n"))
    assert "It needs its CUDA plugin" in str(problem("RuntimeError: no topology\n"))


@pytest.mark.skipif(PLUGIN, reason="JAX has its CUDA plugin here")
def test_without_the_plugin_it_says_what_to_install():
    with pytest.raises(AssemblerError, match="pip install --no-deps jax-cuda13-plugin=="):
        assemble(["decode"])


@pytest.mark.skipif(not PLUGIN, reason="needs JAX's CUDA plugin: make assemble")
def test_no_products_are_serialized():
    kernels = {(k.case, k.kernel): k for k in assemble(["decode-512-rows", "prefill", "prefill-soft-cap"])}
    assert not any(k.serialized for k in kernels.values())
    assert {kernel for _, kernel in kernels} == {"paged_decode", "merge_partials", "paged_prefill"}
    assert kernels["decode-512-rows", "paged_decode"].spilled == 0
    assert kernels["prefill", "paged_prefill"].spilled <= 16
