"""GGUF files of llama architecture as a `TensorSource` with Hugging Face's names and layout.

    magic | version | counts | metadata: llama.*, tokenizer.ggml.* | tensor infos | data
    '----------- walked once, each count, length and offset checked -------------'  read(name): dequantise,
                 metadata[key]: decoded when asked for                              undo the q/k permutation

The format: ggml's docs/gguf.md. Converters store the two halves of each q and k head interleaved; Hugging Face's
order is put back. The walk also gives the tensors' places: a second parser could disagree with the one that
checked. `gguf.GGUFReader` is the referee in the tests; with 49,152 tokens it takes 2 s to the walk's 0.1.
"""

import copy
import dataclasses
import itertools
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind

from models.config import ConfigError, LlamaConfig, Rope, head_dim
from models.weights import CheckpointError, TensorInfo, check_tensors, expected_tensors

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {Kind.F32: np.dtype("<f4"), Kind.F16: np.dtype("<f2"), Kind.BF16: np.dtype(ml_dtypes.bfloat16)}
_PACKED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_KINDS = {int(kind): kind for kind in (*_PLAIN, *(Kind[name] for name in _PACKED))}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PARTS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
# Keys under `llama.`: needed, read where present, allowed at one value only, of no effect. Others are refused.
_REQUIRED = ("attention.head_count", "attention.layer_norm_rms_epsilon", "block_count", "context_length",
             "embedding_length", "feed_forward_length")  # fmt: skip
_READ = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window",
         "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
         "rope.scaling.original_context_length", "vocab_size")  # fmt: skip
_FIXED = {"expert_count": 0, "expert_used_count": 0, "use_parallel_residual": False, "attention.causal": True}
_HARMLESS = ("rope.scaling.finetuned", "tensor_data_layout")


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    kind: Kind
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """One file: its metadata, its configuration, and its tensors under Hugging Face names."""

    path: Path
    metadata: Mapping[str, Any]
    config: LlamaConfig
    _stored: Mapping[str, _Tensor]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape [out, in] and ggml's name of the type, such as Q4_1, by Hugging Face name."""
        return {name: TensorInfo(tensor.shape, tensor.kind.name) for name, tensor in self._stored.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor's values: float16 and bfloat16 as they are, everything else as float32."""
        values = _values(self.path, self._stored[name])
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        if (part := name.split(".")[-2]) not in heads:
            return values
        # [heads, D/2, 2, ...] as stored -> [heads, 2, D/2, ...]
        return values.reshape(heads[part], -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def open_gguf(path: Path) -> GGUFFile:
    """Opens a GGUF file; its data is read tensor by tensor.

    Raises:
      CheckpointError: damaged, of another architecture, or with tensors that are not read or do not fit.
      ConfigError: settings that are missing, impossible, or would be ignored.
    """
    metadata, stored = _Walk(path).header()
    architecture, parts = metadata.get("general.architecture"), metadata.get("split.count", 1)
    if architecture != "llama":
        raise CheckpointError(f"{path} is of architecture {architecture!r}; paxattn reads llama.")
    if parts not in (0, 1):
        raise CheckpointError(f"{path} is one of {parts} parts; join them with llama-gguf-split --merge.")
    factors = stored.pop("rope_freqs.weight", None)
    rope_factors = None if factors is None else _values(path, factors).astype(np.float64).ravel()
    config = _config(metadata, stored, rope_factors)
    file = GGUFFile(path, metadata, config, {_hugging_face_name(name): t for name, t in stored.items()})
    check_tensors(file, expected_tensors(config))
    return file


def _values(path: Path, tensor: _Tensor) -> np.ndarray:
    raw = np.memmap(path, np.uint8, "r", tensor.offset, (tensor.size,))
    rows = np.asarray(raw).reshape(*tensor.shape[:-1], -1)
    if tensor.kind in _PLAIN:
        return rows.view(_PLAIN[tensor.kind])
    with np.errstate(all="ignore"):  # what a damaged scale gives is data, as it is in the other types
        return gguf.quants.dequantize(rows, tensor.kind)


class _Walk:
    """A place in the file. Counts are believed only as far as the file reaches."""

    def __init__(self, path: Path):
        self.path, self.at, self.size = path, 0, path.stat().st_size
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    def refuse(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged or no GGUF file: {reason}. Fetch it again.")

    def skip(self, count: int) -> int:
        """Moves on by `count` bytes; returns where they begin."""
        if count > self.size - self.at:
            raise self.refuse(f"{count} bytes at {self.at} reach past its end at {self.size}")
        self.at += count
        return self.at - count

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        begin = self.skip(struct.calcsize(code) * count)
        return struct.unpack_from(f"<{count}{code}", self.data, begin)

    def text(self) -> str:
        begin = self.skip(*self.numbers("Q"))
        try:
            return self.data[begin : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.refuse(f"the text at {begin} is no UTF-8 ({error})") from error

    def value(self, kind: int, *, keep: bool) -> Any:
        """One metadata value; unless it is to be kept, only its extent is checked."""
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text() if keep else self.skip(*self.numbers("Q"))
        if kind != _ARRAY:
            raise self.refuse(f"a value at {self.at} has type {kind}, which does not exist")
        (kind, count) = (*self.numbers("I"), *self.numbers("Q"))
        if kind != _STRING and kind not in _SCALARS:
            raise self.refuse(f"an array at {self.at} holds values of type {kind}; numbers and texts are read")
        width = struct.calcsize(_SCALARS.get(kind, "Q"))  # a text has at least its length
        if count * width > self.size - self.at:
            raise self.refuse(f"an array of {count} values at {self.at} reaches past its end at {self.size}")
        if kind == _STRING:
            items = (self.value(_STRING, keep=keep) for _ in range(count))
            return list(items) if keep else sum(0 for _ in items)
        return list(self.numbers(_SCALARS[kind], count)) if keep else self.skip(count * width)

    def header(self) -> tuple["_Metadata", dict[str, _Tensor]]:
        if self.data[:4] != b"GGUF":
            raise self.refuse("it does not begin with GGUF")
        self.skip(4)
        version, tensors, keys = (*self.numbers("I"), *self.numbers("Q", 2))
        if version not in (2, 3):
            raise self.refuse(f"its version is {version}; 2 and 3, little-endian, are read")
        if tensors * 32 + keys * 13 > self.size:  # what the shortest of them take
            raise self.refuse(f"{tensors} tensors and {keys} keys do not fit {self.size} bytes")
        places: dict[str, tuple[int, int]] = {}
        for _ in range(keys):
            name, kind = self.text(), *self.numbers("I")
            if name in places:
                raise self.refuse(f"the key {name!r} occurs twice")
            places[name] = (kind, self.at)
            self.value(kind, keep=False)
        infos = [self.info() for _ in range(tensors)]
        metadata, end = _Metadata(self, places), self.at
        align = metadata.get("general.alignment", 32)
        if type(align) is not int or align < 1 or align & (align - 1):
            raise self.refuse(f"its alignment is {align!r}, must be a power of two")
        return metadata, self.placed(infos, -(-end // align) * align, align)

    def info(self) -> tuple[str, tuple[int, ...], Kind, int]:
        name, dims = self.text(), *self.numbers("I")
        if not 1 <= dims <= 4:
            raise self.refuse(f"{name} has {dims} dimensions, must have 1 to 4")
        shape = tuple(reversed(self.numbers("Q", dims)))
        kind, offset = (*self.numbers("I"), *self.numbers("Q"))
        if kind not in _KINDS:
            label = Kind(kind).name if kind in Kind else kind
            known = ", ".join(kind.name for kind in _KINDS.values())
            raise CheckpointError(f"{self.path}: {name} has tensor type {label}; {known} are read.")
        return name, shape, _KINDS[kind], offset

    def placed(self, infos: list[tuple[str, tuple[int, ...], Kind, int]], base: int, align: int):
        stored: dict[str, _Tensor] = {}
        for name, shape, kind, offset in infos:
            block, width = gguf.GGML_QUANT_SIZES[kind]
            if 0 in shape or shape[-1] % block or offset % align:
                raise self.refuse(
                    f"{name} of shape {list(shape)} at {offset} is empty, or no whole blocks of {block}, or not at "
                    f"a multiple of {align}"
                )
            size = math.prod(shape) // block * width
            if base + offset + size > self.size:
                raise self.refuse(f"{name} ends at byte {base + offset + size}, the file at {self.size}")
            if name in stored:
                raise self.refuse(f"the tensor {name!r} occurs twice")
            stored[name] = _Tensor(shape, kind, base + offset, size)
        spans = sorted((t.offset, t.offset + t.size, name) for name, t in stored.items())
        for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
            if begin < end:
                raise self.refuse(f"{first} and {second} overlap at byte {begin}")
        return stored


class _Metadata(Mapping[str, Any]):
    """Keys to values as Python has them, each decoded anew when asked for."""

    def __init__(self, walk: _Walk, places: Mapping[str, tuple[int, int]]):
        self._walk, self._places = walk, places

    def __getitem__(self, key: str) -> Any:
        walk = copy.copy(self._walk)  # a place of its own
        kind, walk.at = self._places[key]
        return walk.value(kind, keep=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _hugging_face_name(name: str) -> str:
    match name.split("."):
        case ["blk", layer, part, kind] if part in _PARTS:
            return f"model.layers.{layer}.{_PARTS[part]}.{kind}"
    return _WHOLE.get(name, f"{name} (in the file)")  # which `check_tensors` refuses


def _config(metadata: Mapping[str, Any], stored: Mapping[str, _Tensor], factors: np.ndarray | None) -> LlamaConfig:
    own = {key.removeprefix("llama."): metadata[key] for key in metadata if key.startswith("llama.")}
    missing = [f"llama.{key}" for key in _REQUIRED if key not in own]
    missing += [] if "token_embd.weight" in stored else ["token_embd.weight"]
    unknown = [f"llama.{key}" for key in own if key not in (*_REQUIRED, *_READ, *_FIXED, *_HARMLESS)]
    problems = [f"missing: {', '.join(missing)}"] * bool(missing)
    problems += [f"settings that would be ignored: {', '.join(unknown)}"] * bool(unknown)
    if problems:
        raise ConfigError(f"the GGUF file's configuration cannot be used: {'; '.join(problems)}.")
    heads, width, vocab = own["attention.head_count"], own["embedding_length"], stored["token_embd.weight"].shape[0]
    size = own["attention.key_length"] if "attention.key_length" in own else head_dim(width, heads)
    alike = {"attention.value_length": size, "rope.dimension_count": size, "vocab_size": vocab}
    for key, wanted in (_FIXED | alike).items():
        if own.get(key, wanted) != wanted:
            raise ConfigError(f"llama.{key} is {own[key]!r}; only {wanted!r} is implemented for this model.")
    ends = (metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom"))  # of text, turn, message
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=own["feed_forward_length"],
        num_hidden_layers=own["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=own.get("attention.head_count_kv", heads),
        head_dim=size,
        rms_norm_eps=own["attention.layer_norm_rms_epsilon"],
        max_position_embeddings=own["context_length"],
        attention_bias="blk.0.attn_q.bias" in stored,
        mlp_bias="blk.0.ffn_gate.bias" in stored,
        tie_word_embeddings="output.weight" not in stored,
        sliding_window=own.get("attention.sliding_window"),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=tuple(dict.fromkeys(end for end in ends if end is not None)),
        rope=_rope(own, size, factors),
    )


def _rope(own: Mapping[str, Any], size: int, factors: np.ndarray | None) -> Rope:
    theta = own.get("rope.freq_base", 10000.0)
    # llama.cpp takes a factor without a type for linear.
    scaling = own.get("rope.scaling.type", "linear" if "rope.scaling.factor" in own else "none")
    if scaling not in ("none", "linear") or (scaling == "linear" and factors is not None):
        extra = " and rope_freqs.weight" * (factors is not None)
        raise ConfigError(f"llama.rope.scaling.type is {scaling!r}{extra}; none, or linear alone, is implemented.")
    if factors is None:
        factor = own.get("rope.scaling.factor", 0.0)  # 0 is refused
        return Rope("linear", theta, factor) if scaling == "linear" else Rope("default", theta)
    if (factors == 1).all():
        return Rope("default", theta)
    # Converters write the divisors of llama3 scaling, not its settings: take the release's and check each divisor.
    original = own.get("rope.scaling.original_context_length", 8192)
    rope = Rope("llama3", theta, float(factors.max()), 1.0, 4.0, original)
    if not (type(theta) is float and theta > 0 and type(original) is int and factors.size * 2 == size):
        wanted = np.nan
    else:
        turns = original * np.power(theta, -np.arange(0, size, 2) / size) / (2 * math.pi)
        blend = np.clip((turns - 1) / 3, 0, 1)
        wanted = 1 / (blend + (1 - blend) / rope.factor)
    if not np.allclose(factors, wanted, rtol=1e-5, atol=0):
        raise ConfigError(
            f"rope_freqs.weight is not llama3 scaling with factor {rope.factor:g}, low_freq_factor 1, high_freq_factor "
            f"4 and original_max_position_embeddings {original}; use the model's safetensors files."
        )
    return rope
