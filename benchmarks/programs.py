"""Programs compiled ahead and side by side: XLA takes long for one and leaves most cores of a GPU's host idle.

    shapes of the model and of a run, no arrays -> lowered one by one -> threads compile -> called with arrays

What compilation times on the GPU it times under a lock, so programs compiled together choose as they would alone.
"""

from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

import models


def maker(config: models.LlamaConfig, dtype: str):
    """What makes a model of random weights from a key, to be jitted."""
    return lambda key: models.random_llama(config, key, dtype)


def model_shapes(config: models.LlamaConfig, dtype: str):
    """The model of `maker` without its arrays."""
    return jax.eval_shape(maker(config, dtype), jax.random.key(0))


def lower_maker(config: models.LlamaConfig, dtype: str) -> jax.stages.Lowered:
    """The program that makes a model from a key."""
    return jax.jit(maker(config, dtype)).lower(jax.random.key(0))


def ids(rows: int, width: int) -> jax.ShapeDtypeStruct:
    """The shape of so many prompts."""
    return jax.ShapeDtypeStruct((rows, width), jnp.int32)


def number() -> jax.ShapeDtypeStruct:
    """The shape of an int32 scalar."""
    return jax.ShapeDtypeStruct((), jnp.int32)


def side_by_side[Name: Hashable](
    lower: Mapping[Name, Callable[[], jax.stages.Lowered]],
) -> dict[Name, jax.stages.Compiled]:
    """Lowers one after the other, as Python does one thing at a time, and compiles in threads."""
    with ThreadPoolExecutor(16) as pool:
        compiling = {name: pool.submit(make().compile) for name, make in lower.items()}
        return {name: future.result() for name, future in compiling.items()}
