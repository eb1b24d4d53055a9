"""A whole state in a directory: saved in one process, gone on from in another, bit for bit.

    save     cache, page table, requests, keys, counters --> flat arrays (Orbax) + structure + whose cache it is
    restore  manifest checked -> the same model? -> the same state: branch from it as often as you like
             on the devices that it was saved on, or on others: see `models.recut`

Any state of paxattn can be saved: a `Cache`, a batch, a speculation, a beam search, a service, and tuples, lists and
dicts of them and of arrays; what could not come back as it was is refused before anything is written. The directory is
that of `models.checkpoint`, so a byte that changed is noticed before anything is read. Keys and values mean nothing to
another model: a fingerprint of its parameters says whose they are.
"""

import dataclasses
import hashlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import paxattn as pax
from models import checkpoint, sharding
from models.config import LlamaConfig
from models.recut import Layout, Move, SnapshotError
from models.weights import CheckpointError
from paxattn.checksum import checksum

_PACKAGE = "paxattn."
_PLAIN = (bool, int, float, str, type(None))
"""Types of static fields that JSON gives back as they were."""


def save(path: str | os.PathLike, state: Any, model: pax.Model) -> None:
    """Writes a new directory that holds all of `state`; nothing is overwritten.

    Args:
      path: the directory to make.
      state: a pytree of paxattn's structs, plain tuples, lists, dicts with strings as keys, and arrays. Those of NumPy
        come back as JAX arrays; one whose dtype JAX would change is refused.
      model: whose cache it is; only its fingerprint is stored.

    Raises:
      SnapshotError: there is something at `path`, the state holds what could not come back as it was, or is spread over
        processes. Nothing is written.
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
    except ValueError as error:
        raise SnapshotError(f"an array is of no dtype that Orbax stores ({error}); convert it.") from error


def restore(path: str | os.PathLike, model: pax.Model, mesh: Mesh | None = None) -> Any:
    """The state that was saved: the same tree, each array of the same shape, dtype and bits.

    Args:
      path: a directory that `save` wrote; it may have been moved or copied.
      model: the same model as was saved with: the same parameters, to the bit. On a mesh, as it lies there.
      mesh: where the state is to go on, as `paxattn.spread` wants it; its data axis must be what it was, one device
        being data=1. Each device reads its part.

    Raises:
      SnapshotError: files are missing or changed, it is no snapshot, another model's, has dtypes that are not enabled
        here, or does not fit the mesh.
      models.sharding.MeshError: the model does not.
    """
    try:
        config = checkpoint.open_config(Path(path))
        _check(config, path, model)
        move = Move(Layout(**config["layout"]), mesh, model)
        pools = {told["array"] for told, pool in _leaves(config["snapshot"]) if pool and "array" in told}
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
    dtypes = {told["dtype"] for told, _ in _leaves(config["snapshot"]) if "dtype" in told}
    if wide := sorted(dtype for dtype in dtypes if jax.dtypes.canonicalize_dtype(dtype) != dtype):
        raise SnapshotError(f"{path} holds {', '.join(wide)}, which JAX would cut here; enable jax_enable_x64.")


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
        sums.append(checksum(leaf))
    told += [str(digest.tolist()) for digest in jax.device_get(sums)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _leaves(told: Any, pool: bool = False) -> Iterator[tuple[dict[str, Any], bool]]:
    """What is said of each array of a node, and whether it is keys or values."""
    match told:
        case {"struct": str(where), "fields": dict(fields)}:
            children, pool = list(fields.values()), where == "paxattn.cache:KV"
        case {"tuple": list(children)} | {"list": list(children)}:
            pass
        case {"dict": dict(items)}:
            children = list(items.values())
        case {"key": str(), "data": data}:
            children = [data]
        case {"array": _} | {"empty": _}:
            yield told, pool
            return
        case _:
            return
    for child in children:
        yield from _leaves(child, pool)


def _describe(node: Any, name: str, arrays: dict[str, jax.Array]) -> Any:
    """What JSON can say about a node; its arrays go into `arrays` under names that tell their place."""
    if node is None:
        return None
    if isinstance(node, jax.Array | np.generic) or type(node) is np.ndarray:
        return _describe_array(node, name, arrays)
    if type(node) in (tuple, list):
        return {type(node).__name__: [_describe(item, f"{name}.{i}", arrays) for i, item in enumerate(node)]}
    if type(node) is dict:
        if odd := [key for key in node if type(key) is not str]:
            raise SnapshotError(f"{name} has the key {odd[0]!r}; the keys of a dict must be strings.")
        return {"dict": {key: _describe(value, f"{name}.{_quoted(key)}", arrays) for key, value in node.items()}}
    where = f"{type(node).__module__}:{type(node).__qualname__}"
    if not dataclasses.is_dataclass(node) or _class(where) is not type(node):
        raise SnapshotError(
            f"{name} is a {type(node).__name__}; a snapshot holds arrays and structs of paxattn, in plain tuples, "
            "lists and dicts."
        )
    children = {}
    for field in dataclasses.fields(node):
        value = children[field.name] = getattr(node, field.name)
        if not field.metadata.get("static"):
            children[field.name] = _describe(value, f"{name}.{field.name}", arrays)
        elif type(value) not in _PLAIN:
            raise SnapshotError(
                f"{name}.{field.name} is static and a {type(value).__name__}; of static fields only numbers, strings "
                "and None come back as they are. Leave it out."
            )
    return {"struct": where, "fields": children}


def _describe_array(node: Any, name: str, arrays: dict[str, jax.Array]) -> dict[str, Any]:
    if jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
        return {"key": str(jax.random.key_impl(node)), "data": _describe(jax.random.key_data(node), name, arrays)}
    try:
        array = jnp.asarray(node)
    except (TypeError, ValueError) as error:
        raise SnapshotError(f"{name} is of {node.dtype}, which JAX does not have; leave it out.") from error
    if array.dtype != node.dtype:
        raise SnapshotError(
            f"{name} is of {node.dtype}, which JAX would cut to {array.dtype}; convert it, or enable jax_enable_x64."
        )
    if not array.size:  # nothing for Orbax to store
        return {"empty": list(array.shape), "dtype": str(array.dtype)}
    arrays[name] = array
    return {"array": name, "dtype": str(array.dtype)}


def _quoted(key: str) -> str:
    """A key as a part of a name: no dot, so that {"a.b": ...} and {"a": {"b": ...}} have names of their own."""
    return quote(key, safe="", errors="surrogatepass").replace(".", "%2E")


def _rebuild(told: Any, arrays: dict[str, jax.Array]) -> Any:
    """The node that `_describe` described."""
    match told:
        case None:
            return None
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
    raise SnapshotError(f"the snapshot holds {told!r}, unknown here; restore it with the version that saved it.")


def _struct(where: str, fields: dict[str, Any], arrays: dict[str, jax.Array]) -> Any:
    cls = _class(where)
    known = {} if cls is None else {f.name: f.metadata.get("static") for f in dataclasses.fields(cls)}
    if cls is None or known.keys() != fields.keys():
        raise SnapshotError(
            f"the snapshot holds a {where} of {', '.join(fields)}; here it has {', '.join(known) or 'no such struct'}: "
            "restore it with the version of paxattn that saved it."
        )
    return cls(**{k: v if known[k] else _rebuild(v, arrays) for k, v in fields.items()})


def _class(where: str) -> Any:
    """The struct of paxattn of that module and name; None where there is none."""
    module, _, name = where.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if module.startswith(_PACKAGE) else None
    except (ImportError, AttributeError):
        return None
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None
