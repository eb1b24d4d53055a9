"""From a name or a path to a language model that answers: `models.load`.

    source --hub.resolve--> directory | .gguf | Orbax directory
                                |         |          |
                       safetensors names and layout  | our own names and layout
                                |         |          |
    Llama(config, init):  init("layers.3.qkv", shape) reads, fuses, casts and places one parameter at a time

Nothing larger than one parameter exists twice.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from models import checkpoint, hub
from models.config import LlamaConfig
from models.gguf import open_gguf
from models.llama import Init, Llama
from models.lm import LM
from models.tokenizer import check_fits, load_tokenizer
from models.weights import CheckpointError, TensorSource, check_tensors, expected_tensors, open_safetensors

DTYPES = ("float32", "bfloat16", "float16")


def load(source: str | os.PathLike = hub.DEFAULT_MODEL, *, dtype: str | jnp.dtype = "float32") -> LM:
    """A language model from a checkpoint, with its tokenizer where it has one.

    Args:
      source: a Hugging Face directory (safetensors), a `.gguf` file, a directory written by `paxattn convert`,
        a hub id `organisation/name[@revision]`, or "smollm2-135m".
      dtype: of parameters and cache: float32, bfloat16 or float16.

    Raises:
      FileNotFoundError, models.weights.CheckpointError, models.config.ConfigError: refused before anything is
        allocated, with what to do.
    """
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"dtype is {dtype.name}; choose one of {', '.join(DTYPES)}.")
    path = hub.resolve(source)
    if checkpoint.is_checkpoint(path):
        raw, params = checkpoint.load(path, dtype=dtype)
        config, tokenizer = LlamaConfig.from_dict(raw), load_tokenizer(path, None)
        init = _from_params(params)
    elif path.suffix == ".gguf":
        file = open_gguf(path)
        config, tokenizer = file.config, load_tokenizer(path, file.metadata)
        init = _from_tensors(file, config, dtype)
    else:
        config, tokenizer = read_config(path), load_tokenizer(path, None)
        tensors = open_safetensors(path)
        check_tensors(tensors, expected_tensors(config))  # `open_gguf` does it for its own
        init = _from_tensors(tensors, config, dtype)
    if tokenizer is not None:
        check_fits(tokenizer, config.vocab_size)
    return LM(Llama(config, init), tokenizer, str(source))


def read_config(path: Path) -> LlamaConfig:
    """config.json of a Hugging Face directory, with the eos ids of generation_config.json where it has them."""
    try:
        raw = json.loads((path / "config.json").read_text())
        extra = path / "generation_config.json"
        eos = json.loads(extra.read_text()).get("eos_token_id") if extra.is_file() else None
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise CheckpointError(f"{path} has no readable config.json ({error}); is it a model directory?") from error
    return LlamaConfig.from_dict(raw if eos is None else {**raw, "eos_token_id": eos})


def _from_params(params: dict[str, jax.Array]) -> Init:
    def init(name: str, shape: tuple[int, ...]) -> jax.Array:
        if name not in params or params[name].shape != shape:
            found = params[name].shape if name in params else "no such parameter"
            raise CheckpointError(f"{name} should have shape {shape}; found {found}. Convert the checkpoint again.")
        return params.pop(name)

    return init


def _from_tensors(source: TensorSource, config: LlamaConfig, dtype: jnp.dtype) -> Init:
    """Reads Hugging Face tensors [out, in] into the fused parameters [in, out] of `models.llama`."""
    heads = (config.num_key_value_heads, -1, config.head_dim)
    bar = tqdm(total=len(expected_tensors(config)), desc="load", unit="tensor", disable=not sys.stderr.isatty())

    def read(name: str) -> np.ndarray:
        bar.update()
        return source.read(name)

    def qkv(layer: str, kind: str) -> np.ndarray:  # [K, G + 2, D] or [K, G + 2, D, E]
        parts = [read(f"{layer}.self_attn.{name}_proj.{kind}") for name in "qkv"]
        return np.concatenate([part.reshape(*heads, *part.shape[1:]) for part in parts], axis=1)

    def gate_up(layer: str, kind: str) -> np.ndarray:
        return np.stack([read(f"{layer}.mlp.{name}_proj.{kind}") for name in ("gate", "up")])

    of_layer: dict[str, Callable[[str], np.ndarray]] = {
        "attention_norm": lambda at: read(f"{at}.input_layernorm.weight"),
        "qkv": lambda at: np.moveaxis(qkv(at, "weight"), -1, 0),
        "qkv_bias": lambda at: qkv(at, "bias"),
        "out": lambda at: read(f"{at}.self_attn.o_proj.weight").T,
        "out_bias": lambda at: read(f"{at}.self_attn.o_proj.bias"),
        "mlp_norm": lambda at: read(f"{at}.post_attention_layernorm.weight"),
        "gate_up": lambda at: np.moveaxis(gate_up(at, "weight"), -1, 0),
        "gate_up_bias": lambda at: gate_up(at, "bias"),
        "down": lambda at: read(f"{at}.mlp.down_proj.weight").T,
        "down_bias": lambda at: read(f"{at}.mlp.down_proj.bias"),
    }
    whole: dict[str, Callable[[], np.ndarray]] = {
        "embed": lambda: read("model.embed_tokens.weight"),
        "norm": lambda: read("model.norm.weight"),
        "head": lambda: read("lm_head.weight").T,
    }

    def init(name: str, shape: tuple[int, ...]) -> jax.Array:
        if name in whole:
            value = whole[name]()
        else:
            _, index, part = name.split(".")
            value = of_layer[part](f"model.layers.{index}")
        assert value.shape == shape, (name, value.shape, shape)
        return jnp.array(np.ascontiguousarray(value), dtype)

    return init
