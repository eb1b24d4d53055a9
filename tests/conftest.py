"""What several test modules share: the default model's file, fetched once (93 MB), cached as for a user."""

import gc
import os
from pathlib import Path

from tests.paths import CACHE

# Tests compile far more than they compute: cheaper code, and no program twice, in whichever process it is wanted.
# Set before JAX is, and for the command line too.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_gpu_autotune_level=0",
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest

from models import hub

# A GPU would otherwise multiply float32 as TF32, and no golden figure would hold.
jax.config.update("jax_default_matmul_precision", "highest")


LONGEST = ("test_docs", "test_golden", "test_lm", "test_beams", "test_mesh", "test_notebooks", "test_cli")
"""Modules that take minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first, so that no worker is left alone with one at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


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
