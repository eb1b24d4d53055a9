"""What several test modules share: the default model's file, fetched once (93 MB), cached as for a user."""

import gc
import os
from pathlib import Path

# Tests compile far more than they compute: a third less to wait for. Set before JAX is, and for the command line too.
os.environ.setdefault("XLA_FLAGS", "--xla_llvm_disable_expensive_passes=true")

import jax
import pytest

from models import hub

# A GPU would otherwise multiply float32 as TF32, and no golden figure would hold.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF."""
    return hub.resolve(hub.DEFAULT_MODEL)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Frees a module's compiled programs: thousands in one process outgrow the memory maps that Linux allows."""
    yield
    jax.clear_caches()
    gc.collect()
