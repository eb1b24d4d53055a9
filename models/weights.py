"""Tensors of a checkpoint by name, read one at a time from safetensors files that were checked first.

    directory/ model.safetensors            header ---- check ----> tensors: name -> shape, dtype
               model.safetensors.index.json   data ---- read(name) -> numpy, one tensor in memory

Nothing is unpickled, and no byte of data is touched before the header holds together.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from models.config import LlamaConfig


class CheckpointError(ValueError):
    """Files that cannot be used; the message names what is wrong and what to do."""


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str


class TensorSource(Protocol):
    """Tensors under their Hugging Face names and in Hugging Face's layout."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of each tensor."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor's values, in a float dtype."""
        ...


DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_HEADER = 100_000_000
_MAX_DIMENSIONS = 8
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


class _Place(NamedTuple):
    path: Path
    info: TensorInfo
    offset: int


class Safetensors:
    """A `TensorSource` over one or several safetensors files; the format is github.com/huggingface/safetensors."""

    def __init__(self, places: Mapping[str, _Place]):
        self._places = places
        self.tensors = {name: place.info for name, place in places.items()}

    def read(self, name: str) -> np.ndarray:
        """A view of the mapped file; nothing is copied."""
        path, info, offset = self._places[name]
        return np.memmap(path, DTYPES[info.dtype], "r", offset, info.shape)


def open_safetensors(directory: Path) -> Safetensors:
    """The tensors of a Hugging Face directory, one file or sharded.

    Raises:
      CheckpointError: no safetensors, an index that lies, or a file whose header does not hold together.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; name the one that holds model.safetensors.")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return Safetensors(_read_index(index))
    if (directory / "model.safetensors").is_file():
        return Safetensors(_read_header(directory / "model.safetensors"))
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{directory} holds only pickle files ({', '.join(pickles)}), which can run code when read; convert "
            "them with transformers: model.save_pretrained(..., safe_serialization=True)."
        )
    raise CheckpointError(
        f"{directory} has neither model.safetensors nor model.safetensors.index.json; name a directory that does."
    )


def _read_index(index: Path) -> dict[str, _Place]:
    try:
        weight_map = json.loads(index.read_text("utf-8"), object_pairs_hook=_refuse_twice)["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index with a weight_map ({error!r}); fetch it again.") from error
    places: dict[str, _Place] = {}
    for file in files:
        path = _beside(index, file)
        for name, place in _read_header(path).items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{file} holds {name}, which {index.name} puts into {weight_map.get(name)}; fetch both again."
                )
            places[name] = place
    absent = sorted(set(weight_map) - set(places))
    if absent:
        raise CheckpointError(f"{index} lists tensors that no shard holds: {', '.join(absent)}; fetch all again.")
    return places


def _beside(index: Path, file: str) -> Path:
    """The shard that an index names: a safetensors file in the index's own folder, and nothing else."""
    if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
        raise CheckpointError(f"{index} names {file!r}; every shard must be a .safetensors file beside it.")
    path = index.parent / file
    try:
        target = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # absent, no file name at all, a loop of links
        raise CheckpointError(f"{index} names {file!r}, which is not there; fetch the missing shard.") from error
    folders = [index.parent.resolve()]
    if folders[0].parent.name == "snapshots":  # the hub's cache: snapshots/<commit>/x links to blobs/<hash>
        folders.append(folders[0].parent.parent / "blobs")
    if target.parent not in folders:
        raise CheckpointError(f"{index} names {file!r}, a link to {target} outside its folder; put the file there.")
    return path


def _refuse_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"a name occurs twice among {sorted(names)[:4]}...")
    return dict(pairs)


def _read_header(path: Path) -> dict[str, _Place]:
    """Header of one file, with every offset, size and dtype checked against the file."""

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(f"{path} is damaged or no safetensors file: {reason}. Fetch it again.")

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise refuse(f"a header of {length} bytes does not fit a file of {size} (limit {_MAX_HEADER})")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_refuse_twice)
        except (ValueError, RecursionError) as error:
            raise refuse(f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise refuse("its header is no object")
    header.pop("__metadata__", None)
    places, spans = {}, []
    for name, entry in header.items():
        try:
            info = TensorInfo(tuple(entry["shape"]), entry["dtype"])
            begin, end = entry["data_offsets"]
            sane = all(type(n) is int and n >= 0 for n in (*info.shape, begin, end))
            sane = sane and 0 not in info.shape and len(info.shape) <= _MAX_DIMENSIONS
        except (KeyError, TypeError, ValueError) as error:
            raise refuse(f"the entry of {name} is malformed ({error!r})") from error
        if info.dtype not in tuple(DTYPES):
            raise refuse(f"{name} has dtype {info.dtype!r}, only {', '.join(DTYPES)} are read")
        if not sane or end - begin != math.prod(info.shape) * DTYPES[info.dtype].itemsize:
            raise refuse(
                f"{name} of shape {list(info.shape)} {info.dtype} is empty, has more than {_MAX_DIMENSIONS} "
                f"dimensions, or does not fill bytes {begin} to {end}"
            )
        spans.append((begin, end, name))
        places[name] = _Place(path, info, 8 + length + begin)
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise refuse(f"{name} begins at byte {begin}, the tensor before it ends at {at}")
        at = end
    if 8 + length + at != size:
        raise refuse(f"its tensors end at byte {8 + length + at}, the file has {size}")
    return places


def expected_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors, as Hugging Face stores them: [out, in]."""
    embed, mlp = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = {"q_proj": (q, embed), "k_proj": (kv, embed), "v_proj": (kv, embed), "o_proj": (embed, q)}
    feed = {"gate_proj": (mlp, embed), "up_proj": (mlp, embed), "down_proj": (embed, mlp)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, embed),
        "model.norm.weight": (embed,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, embed)
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (embed,)
        for group, parts, bias in (
            ("self_attn", attention, config.attention_bias),
            ("mlp", feed, config.mlp_bias),
        ):
            for name, shape in parts.items():
                shapes[f"{at}.{group}.{name}.weight"] = shape
                if bias:
                    shapes[f"{at}.{group}.{name}.bias"] = shape[:1]
    return shapes


def check_tensors(source: TensorSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a source that lacks tensors, has others, or has them in other shapes; lists them all at once."""
    found = {name: info.shape for name, info in source.tensors.items()}
    extra = {name for name in set(found) - set(expected) if not name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" not in expected:
        extra.discard("lm_head.weight")  # tied: a copy of the embedding
    wrong = [
        f"{name} is {list(found[name])}, should be {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{label}: {', '.join(sorted(names))}"
        for label, names in (
            ("missing", set(expected) - set(found)),
            ("unexpected", extra),
            ("wrong shape", wrong),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            "the tensors do not fit the configuration; "
            + "; ".join(problems)
            + ". Take the config.json and the weights of one model."
        )
