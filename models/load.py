"""From a name or a path to a language model that answers: `models.load`.

    source --hub.resolve--> directory | .gguf | Orbax directory
                                |         |          |
                       safetensors names and layout  | our own names and layout
                                |         |          |
    Llama(config, init):  init("layers.3.qkv", shape) reads, fuses, casts and places one parameter at a time

Nothing larger than one parameter exists twice. On a mesh each device reads its own slice of each parameter.
"""

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from models import checkpoint, hosts, hub, sharding
from models.config import LlamaConfig
from models.gguf import open_gguf
from models.llama import Init, Llama, shard
from models.lm import LM
from models.tokenizer import check_fits, load_tokenizer
from models.weights import CheckpointError, TensorSource, check_tensors, expected_tensors, open_safetensors

DTYPES = ("float32", "bfloat16", "float16")


def load(
    source: str | os.PathLike = hub.DEFAULT_MODEL, *, dtype: str | jnp.dtype = "float32", mesh: Mesh | None = None
) -> LM:
    """A language model from a checkpoint, with its tokenizer where it has one.

    Args:
      source: a Hugging Face directory (safetensors), a `.gguf` file, a directory written by `paxattn convert`,
        a hub id `organisation/name[@revision]`, or "smollm2-135m".
      dtype: of parameters and cache: float32, bfloat16 or float16.
      mesh: of the devices that the model is to lie on; see `paxattn.make_mesh` and `models.sharding`.

    Raises:
      FileNotFoundError, models.weights.CheckpointError, models.config.ConfigError, models.sharding.MeshError: refused
        before anything is allocated, with what to do.
      ValueError: of several processes, this one found another configuration than the first did.
    """
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"dtype is {dtype.name}; choose one of {', '.join(DTYPES)}.")
    path = hub.resolve(source)
    tensors = None
    if checkpoint.is_checkpoint(path):
        raw = checkpoint.open_config(path)
        if "snapshot" in raw:
            raise CheckpointError(f"{path} holds no model but a snapshot; restore it with models.snapshot.restore.")
        config, tokenizer = LlamaConfig.from_dict(raw), load_tokenizer(path, None)
    elif path.suffix == ".gguf":
        tensors = open_gguf(path)
        config, tokenizer = tensors.config, load_tokenizer(path, tensors.metadata)
    else:
        config, tokenizer = read_config(path), load_tokenizer(path, None)
        tensors = open_safetensors(path)
        check_tensors(tensors, expected_tensors(config))  # `open_gguf` does it for its own
    if tokenizer is not None:
        check_fits(tokenizer, config.vocab_size)
    if mesh is not None:
        hosts.agree("model", config.to_dict())  # before the weights, which one host may read minutes later than another
    if tensors is None:
        init = _from_orbax(path, dtype, mesh)
    else:
        config = config if mesh is None else sharding.fit(config, mesh.shape["model"])
        init = _from_tensors(tensors, config, dtype, mesh)
    model = Llama(config, init)
    return LM(model if mesh is None else shard(model, mesh), tokenizer, str(source), mesh)


def read_config(path: Path) -> LlamaConfig:
    """config.json of a Hugging Face directory, with the eos ids of generation_config.json where it has them.

    Raises:
      CheckpointError: one of the two cannot be read.
      ConfigError: what it says cannot be used.
    """
    raw = _object(path / "config.json", "is this a model directory?")
    extra = path / "generation_config.json"
    eos = _object(extra, "fetch it again, or remove it.").get("eos_token_id") if extra.is_file() else None
    return LlamaConfig.from_dict(raw if eos is None else {**raw, "eos_token_id": eos})


def _object(path: Path, instead: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {instead}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}, must be a JSON object; {instead}")
    return found


def _from_orbax(path: Path, dtype: jnp.dtype, mesh: Mesh | None) -> Init:
    """Reads what `paxattn convert` wrote, which is in our layout already."""
    where = None if mesh is None else functools.partial(sharding.place, mesh)
    params = checkpoint.read(path, dtype=dtype, sharding=where)

    def init(name: str, shape: tuple[int, ...]) -> jax.Array:
        if name not in params or params[name].shape != shape:
            found = params[name].shape if name in params else "no such parameter"
            raise CheckpointError(f"{name} should have shape {shape}; found {found}. Convert the checkpoint again.")
        return params.pop(name)

    return init


class Parts(NamedTuple):
    """A parameter in our layout as views of the file's tensors, which lie next to each other along an axis."""

    views: list[np.ndarray]
    axis: int = 0

    def read(self, index: Any) -> np.ndarray:
        """A slice of it; no mesh cuts the axis of a parameter that has several views."""
        return np.ascontiguousarray(np.concatenate([view[index] for view in self.views], axis=self.axis))


def _from_tensors(source: TensorSource, config: LlamaConfig, dtype: jnp.dtype, mesh: Mesh | None) -> Init:
    """Reads Hugging Face tensors [out, in] into the fused parameters [in, out] of `models.llama`."""
    kv_heads = config.num_key_value_heads
    bar = tqdm(total=len(expected_tensors(config)), desc="load", unit="tensor", disable=not sys.stderr.isatty())

    def read(name: str) -> np.ndarray:
        bar.update()
        return source.read(name)

    def qkv(layer: str, kind: str) -> list[np.ndarray]:  # [K, n, D] or [K, n, D, E] each
        q, k, v = (read(f"{layer}.self_attn.{name}_proj.{kind}") for name in "qkv")
        q = q.reshape(kv_heads, -1, config.head_dim, *q.shape[1:])
        k, v = (part.reshape(-1, 1, config.head_dim, *part.shape[1:]) for part in (k, v))
        times = kv_heads // len(k)  # on a mesh with more devices than the file has KV heads
        return [q, k, v] if times == 1 else [q, np.repeat(k, times, axis=0), np.repeat(v, times, axis=0)]

    def gate_up(layer: str, kind: str) -> list[np.ndarray]:
        return [read(f"{layer}.mlp.{name}_proj.{kind}")[None] for name in ("gate", "up")]

    def turned(views: list[np.ndarray], axis: int) -> Parts:  # the last axis, which the product sums over, comes first
        return Parts([np.moveaxis(view, -1, 0) for view in views], axis)

    of_layer: dict[str, Callable[[str], Parts]] = {
        "attention_norm": lambda at: Parts([read(f"{at}.input_layernorm.weight")]),
        "qkv": lambda at: turned(qkv(at, "weight"), 2),
        "qkv_bias": lambda at: Parts(qkv(at, "bias"), 1),
        "out": lambda at: Parts([read(f"{at}.self_attn.o_proj.weight").T]),
        "out_bias": lambda at: Parts([read(f"{at}.self_attn.o_proj.bias")]),
        "mlp_norm": lambda at: Parts([read(f"{at}.post_attention_layernorm.weight")]),
        "gate_up": lambda at: turned(gate_up(at, "weight"), 1),
        "gate_up_bias": lambda at: Parts(gate_up(at, "bias")),
        "down": lambda at: Parts([read(f"{at}.mlp.down_proj.weight").T]),
        "down_bias": lambda at: Parts([read(f"{at}.mlp.down_proj.bias")]),
    }
    whole: dict[str, Callable[[], Parts]] = {
        "embed": lambda: Parts([read("model.embed_tokens.weight")]),
        "norm": lambda: Parts([read("model.norm.weight")]),
        "head": lambda: Parts([read("lm_head.weight").T]),
    }

    def init(name: str, shape: tuple[int, ...]) -> jax.Array:
        if name in whole:
            parts = whole[name]()
        else:
            _, index, part = name.split(".")
            parts = of_layer[part](f"model.layers.{index}")
        if mesh is None:
            value = parts.read((slice(None),) * len(shape))
            assert value.shape == shape, (name, value.shape, shape)
            return jnp.array(value, dtype)
        where = sharding.place(mesh, name, shape)
        return jax.make_array_from_callback(shape, where, lambda index: parts.read(index).astype(dtype))

    return init
