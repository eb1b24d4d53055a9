"""A whole state in a directory: saved in one process, gone on from in another, bit for bit.

    save     cache, page table, requests, keys, counters --> flat arrays (Orbax) + structure + whose cache it is
    restore  manifest checked -> the same model? -> the same state: branch from it as often as you like
             on the devices that it was saved on, or on others: see `models.recut`

Any state of paxattn can be saved: a `Cache`, a batch, a speculation, a beam search, a service, and tuples and dicts of
them and of arrays. The directory is that of `models.checkpoint`, so a byte that changed is noticed before anything is
read. Keys and values mean nothing to another model: a fingerprint of its parameters says whose they are.
"""

import dataclasses
import hashlib
import importlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import paxattn as pax
from models import checkpoint, sharding
from models.config import LlamaConfig
from models.recut import Layout, Move, SnapshotError
from models.weights import CheckpointError

_PACKAGE = "paxattn."


def save(path: str | os.PathLike, state: Any, model: pax.Model) -> None:
    """Writes a new directory that holds all of `state`; nothing is overwritten.

    Args:
      path: the directory to make.
      state: a pytree of paxattn's structs, tuples, lists, dicts and arrays.
      model: whose cache it is; only its fingerprint is stored.

    Raises:
      SnapshotError: there is something at `path`, the state holds what cannot be restored, or is spread over processes.
    """
    if jax.process_count() > 1:
        raise SnapshotError(f"{jax.process_count()} processes cannot write one snapshot; save it where there is one.")
    arrays: dict[str, jax.Array] = {}
    config = {"snapshot": _describe(state, "state", arrays), "model": fingerprint(model)}
    config["layout"] = dataclasses.asdict(Layout.of(state, model))
    try:
        checkpoint.save(Path(path), config, arrays)
    except CheckpointError as error:
        raise SnapshotError(str(error)) from error


def restore(path: str | os.PathLike, model: pax.Model, mesh: Mesh | None = None) -> Any:
    """The state that was saved, every bit of it.

    Args:
      path: a directory that `save` wrote; it may have been moved or copied.
      model: the same model as was saved with: the same parameters, to the bit. On a mesh, as it lies there.
      mesh: where the state is to go on, as `paxattn.spread` wants it; its data axis must be what it was, one device
        being data=1. Each device reads its part.

    Raises:
      SnapshotError: files are missing or changed, it is no snapshot, another model's, or does not fit the mesh.
      models.sharding.MeshError: the model does not.
    """
    try:
        config = checkpoint.open_config(Path(path))
        _check(config, path, model)
        move = Move(Layout(**config["layout"]), mesh, model)
        pools = _pools(config["snapshot"])
        arrays = checkpoint.read(Path(path), sharding=lambda name, shape: move.place(shape, name in pools))
    except CheckpointError as error:
        raise SnapshotError(str(error)) from error
    return move.finish(_rebuild(config["snapshot"], arrays))


def _check(config: dict[str, Any], path: str | os.PathLike, model: pax.Model) -> None:
    if "snapshot" not in config:
        raise SnapshotError(f"{path} holds no snapshot but a model; load it with models.load.")
    if config["model"] != fingerprint(model):
        raise SnapshotError(
            f"{path} was saved with another model ({config['model'][:12]}, this one is {fingerprint(model)[:12]}): "
            "its keys and values mean nothing here. Load the model that it was saved with, in the same dtype."
        )


def fingerprint(model: pax.Model) -> str:
    """A name for a model: equal parameters, shapes, dtypes and cache give equal names, on any machine and any mesh.

    One pass over the parameters where they lie; 64 bits of each leave the device. Of a Llama every query head counts as
    if it had a KV head of its own, so that KV heads repeated for a mesh change nothing.
    """
    spec, config, times = model.cache_spec, getattr(model, "config", None), 1
    if isinstance(config, LlamaConfig):
        heads = config.num_attention_heads
        times = heads // config.num_key_value_heads
        spec = dataclasses.replace(spec, num_kv_heads=heads)
        config = dataclasses.replace(config, num_key_value_heads=heads)
    told, sums = [repr(spec), repr(model.vocab_size), repr(config)], []
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        leaf = sharding.widen(jax.tree_util.keystr(path), leaf, times)
        told.append(f"{leaf.shape} {leaf.dtype}")
        sums.append(_checksum(leaf))
    told += [str(digest.tolist()) for digest in jax.device_get(sums)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """Two sums over the bits of an array, modulo 2 ** 32: of its elements, and of these weighted by their place."""
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(leaf.ndim)):  # not of a flattened copy, which a mesh would have to gather
        place += jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        stride *= leaf.shape[axis]
    place = place * jnp.uint32(2654435761) + 1
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * place, dtype=jnp.uint32)])


def _pools(told: Any) -> set[str]:
    """Names of the arrays that are keys and values."""
    if isinstance(told, dict) and told.get("struct") == "paxattn.cache:KV":
        return {array["array"] for array in told["fields"].values()}
    children = told.values() if isinstance(told, dict) else told if isinstance(told, list) else ()
    return set().union(*map(_pools, children))


def _describe(node: Any, name: str, arrays: dict[str, jax.Array]) -> Any:
    """What JSON can say about a node; its arrays go into `arrays` under names that tell their place."""
    if dataclasses.is_dataclass(node) and type(node).__module__.startswith(_PACKAGE):
        fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
        static = {f.name for f in dataclasses.fields(node) if f.metadata.get("static")}
        children = {k: v if k in static else _describe(v, f"{name}.{k}", arrays) for k, v in fields.items()}
        return {"struct": f"{type(node).__module__}:{type(node).__qualname__}", "fields": children}
    if isinstance(node, tuple | list):
        items = [_describe(item, f"{name}.{i}", arrays) for i, item in enumerate(node)]
        return {type(node).__name__: items}
    if isinstance(node, dict):
        return {"dict": {key: _describe(value, f"{name}.{key}", arrays) for key, value in node.items()}}
    if node is None:
        return None
    if not isinstance(node, jax.Array | np.ndarray | np.generic):
        raise SnapshotError(f"{name} is a {type(node).__name__}; a snapshot holds arrays and structs of paxattn only.")
    if isinstance(node, jax.Array) and jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
        return {"key": str(jax.random.key_impl(node)), "data": _describe(jax.random.key_data(node), name, arrays)}
    arrays[name] = array = jnp.asarray(node)
    if not array.size:  # nothing for Orbax to store
        return {"empty": list(arrays.pop(name).shape), "dtype": str(array.dtype)}
    return {"array": name}


def _rebuild(told: Any, arrays: dict[str, jax.Array]) -> Any:
    """The node that `_describe` described."""
    match told:
        case {"struct": str(where), "fields": dict(fields)}:
            return _struct(where, fields, arrays)
        case {"tuple": list(items)}:
            return tuple(_rebuild(item, arrays) for item in items)
        case {"list": list(items)}:
            return [_rebuild(item, arrays) for item in items]
        case {"dict": dict(items)}:
            return {key: _rebuild(value, arrays) for key, value in items.items()}
        case {"key": str(impl), "data": data}:
            return jax.random.wrap_key_data(_rebuild(data, arrays), impl=impl)
        case {"empty": list(shape), "dtype": str(dtype)}:
            return jnp.zeros(shape, dtype)
        case {"array": str(name)}:
            return arrays[name]
    return told


def _struct(where: str, fields: dict[str, Any], arrays: dict[str, jax.Array]) -> Any:
    module, _, name = where.partition(":")
    try:
        cls = getattr(importlib.import_module(module), name) if module.startswith(_PACKAGE) else None
        known = {f.name: f.metadata.get("static") for f in dataclasses.fields(cls)}  # type: ignore
    except (ImportError, AttributeError, TypeError):
        known = {}
    if known.keys() != fields.keys():
        raise SnapshotError(
            f"the snapshot holds a {where} of {', '.join(fields)}; here it has {', '.join(known) or 'no such struct'}: "
            "restore it with the version of paxattn that saved it."
        )
    return cls(**{k: v if known[k] else _rebuild(v, arrays) for k, v in fields.items()})  # type: ignore
