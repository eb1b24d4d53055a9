"""How a Llama lies on a mesh: which way each parameter is cut, in one table.

    [E, K, G + 2, D]  qkv by KV head   ──> attention of own heads ──> out [H D, E] by row    ──> all-reduce
    [E, 2, F]         gate, up by column ──> ──────────────────────> down [F, E] by row     ──> all-reduce
    [V, E], [E, V]    embedding and head by token of the vocabulary

Fewer KV heads than devices: each is repeated, so that every device has one, with a share of its query heads. That is
the same function; the repeated heads cost their part of the cache again.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.config import LlamaConfig

CUT = {
    "embed": 0,
    "qkv": 1,
    "qkv_bias": 0,
    "out": 0,
    "gate_up": 2,
    "gate_up_bias": 1,
    "down": 0,
    "head": 1,
}
"""Dimension of each parameter that is cut over the model axis; all others are whole on every device."""


class MeshError(ValueError):
    """A model that does not fit a mesh; the message lists every reason."""


def spec(name: str, axis: str = "model") -> P:
    """Of a parameter by its name ("layers.3.qkv") or its path in the tree."""
    (part,) = [word for word in re.findall(r"\w+", name) if word in CUT] or [None]
    return P() if part is None else P(*[None] * CUT[part], axis)


def place(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter lies; whole on every device while it has too few KV heads to be cut."""
    where = NamedSharding(mesh, spec(name))
    cut = CUT.get(name.rpartition(".")[2])
    return where if cut is None or shape[cut] % mesh.shape["model"] == 0 else NamedSharding(mesh, P())


def fit(config: LlamaConfig, devices: int) -> LlamaConfig:
    """The configuration with KV heads enough for each of the devices of a model group.

    Raises:
      MeshError: heads, MLP or vocabulary cannot be cut into that many equal parts.
    """
    kv_heads = config.num_key_value_heads
    problems = [
        f"{name} = {size} is no multiple of it"
        for name in ("num_attention_heads", "intermediate_size", "vocab_size")
        if (size := getattr(config, name)) % devices
    ]
    if max(devices, kv_heads) % min(devices, kv_heads):
        problems.append(f"num_key_value_heads = {kv_heads} is neither a multiple nor a divisor of it")
    if problems:
        raise MeshError(
            f"the model cannot be cut over model={devices} devices: {'; '.join(problems)}. Choose a smaller model "
            "axis, and use what is left of the devices on the data axis."
        )
    return dataclasses.replace(config, num_key_value_heads=max(devices, kv_heads))


def part(config: LlamaConfig, devices: int) -> LlamaConfig:
    """What one of the devices has of it; the vocabulary stays that of the whole."""
    if fit(config, devices) != config:
        raise MeshError(f"{config.num_key_value_heads} KV heads on model={devices} devices: `models.shard` it first.")
    cut = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    return dataclasses.replace(config, **{name: getattr(config, name) // devices for name in cut})


def repeat_heads(qkv: jax.Array, times: int) -> jax.Array:
    """[..., K, G + 2, D] with each KV head repeated and its query heads dealt to the copies: the same attention."""
    *lead, kv_heads, width, dim = qkv.shape
    q = qkv[..., :-2, :].reshape(*lead, kv_heads * times, (width - 2) // times, dim)
    return jnp.concatenate([q, jnp.repeat(qkv[..., -2:, :], times, axis=-3)], axis=-2)


def widen(name: str, array: jax.Array, times: int) -> jax.Array:
    """A parameter by its name or path, its KV heads repeated if it has any."""
    return repeat_heads(array, times) if times > 1 and re.search(r"\bqkv(_bias)?\b", name) else array


def put(name: str, array: jax.Array, mesh: Mesh, times: int = 1) -> jax.Array:
    """A parameter, its KV heads repeated, where it lies on the mesh; nothing moves if it is there already."""
    array = widen(name, array, times)
    where = place(mesh, name, array.shape)
    if array.sharding.is_equivalent_to(where, array.ndim):
        return array
    if not array.is_fully_addressable or isinstance(array.sharding, NamedSharding):
        return jax.jit(lambda x: x, out_shardings=where)(array)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])
