"""Pallas' interpreter for GPU kernels, which looks for races: on a CPU, since on a GPU its threads wait for ever.

kernel body  --a thread a warpgroup-->  small programs of the default device, one an operation
"""

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

RACES = plgpu.InterpretGPUParams(detect_races=True)
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter needs a CPU")
by_warps = pytest.mark.skipif(
    jax.default_backend() == "cpu" and jax.__version_info__ < (0, 12),
    reason="the interpreter of JAX 0.11 wants all warps to have waited for a barrier that one of them waits for",
)
