"""Programs compiled ahead and side by side: XLA takes long for one and leaves most cores of a GPU's host idle.

    shapes of the model and of a run, no arrays -> lowered one by one -> threads compile -> called with arrays

What compilation times on the GPU it times under a lock, yet on a busy host less well: XLA then warns that a delay timed
out, and may choose another product than a program compiled alone gets. Fewer threads are quieter, and take longer.
"""

from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

import models
import paxattn as pax


def maker(config: models.LlamaConfig, dtype: str, mesh: Mesh | None = None):
    """What makes a model of random weights from a key, to be jitted."""
    return lambda key: models.random_llama(config, key, dtype, mesh)


def make(program: jax.stages.Compiled, mesh: Mesh | None = None) -> pax.Model:
    """The model that the compiled program of `lower_maker` gives, packed where there is no mesh."""
    model = jax.block_until_ready(program(jax.random.key(0)))
    return pax.pack(model) if mesh is None else model


def model_shapes(config: models.LlamaConfig, dtype: str, mesh: Mesh | None = None) -> pax.Model:
    """The model of `make` without its arrays; on a mesh with where they lie."""
    model = jax.eval_shape(maker(config, dtype, mesh), jax.random.key(0))
    if mesh is None:
        return pax.pack(model)
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        model,
        model.specs("model", mesh.shape["model"]),
    )


def lower_maker(config: models.LlamaConfig, dtype: str, mesh: Mesh | None = None) -> jax.stages.Lowered:
    """The program that makes a model from a key."""
    return jax.jit(maker(config, dtype, mesh)).lower(jax.random.key(0))


def ids(rows: int, width: int) -> jax.ShapeDtypeStruct:
    """The shape of so many prompts."""
    return jax.ShapeDtypeStruct((rows, width), jnp.int32)


def number() -> jax.ShapeDtypeStruct:
    """The shape of an int32 scalar."""
    return jax.ShapeDtypeStruct((), jnp.int32)


def side_by_side[Name: Hashable](
    lower: Mapping[Name, Callable[[], jax.stages.Lowered]], threads: int = 16
) -> dict[Name, jax.stages.Compiled]:
    """Lowers one after the other, as Python does one thing at a time, and compiles in threads."""
    with ThreadPoolExecutor(threads) as pool:
        compiling = {name: pool.submit(make().compile) for name, make in lower.items()}
        return {name: future.result() for name, future in compiling.items()}
