"""GGUF files of llama architecture as a `TensorSource` with Hugging Face's names and layout.

    magic | version | counts | metadata: llama.*, tokenizer.ggml.* | tensor infos | data
                 \\______ walked once, every count and offset checked ______/     read(name): dequantise,
                                                                                 undo the q/k permutation

The format: ggml's docs/gguf.md. Converters store q and k with the halves of each head interleaved; Hugging
Face's layout is put back.
"""

import itertools
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from models.config import ConfigError, LlamaConfig, Rope
from models.weights import CheckpointError, TensorInfo

_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_TYPES = {
    getattr(gguf.GGMLQuantizationType, name)
    for name in [
        "F32",
        "F16",
        "BF16",
        "Q8_0",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
    ]
}
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    size: int


class GGUFFile:
    """One file: its metadata, its configuration, and its tensors under Hugging Face names."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], stored: Mapping[str, _Tensor]):
        self.path, self.metadata = path, metadata
        self.config = _config(metadata, stored)
        self._stored = {_hugging_face_name(name): tensor for name, tensor in stored.items()}
        self.tensors = {name: TensorInfo(t.shape, t.kind.name) for name, t in self._stored.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor dequantised to float32 (16-bit types keep theirs), q and k in Hugging Face's order."""
        tensor = self._stored[name]
        raw = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.size,))
        rows = raw.reshape(*tensor.shape[:-1], -1)
        if tensor.kind == gguf.GGMLQuantizationType.F32:
            values = rows.view(np.float32)
        elif tensor.kind == gguf.GGMLQuantizationType.F16:
            values = rows.view(np.float16)
        else:
            values = gguf.quants.dequantize(rows, tensor.kind)
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }.get(name.split(".")[-2])
        if heads is None:
            return values
        # [heads, D/2, 2, ...] as stored -> [heads, 2, D/2, ...]
        return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def open_gguf(path: Path) -> GGUFFile:
    """Opens a GGUF file; its data is read tensor by tensor.

    Raises:
      CheckpointError: damaged, of another architecture, or with tensor types that are not read.
      ConfigError: sizes that cannot be.
    """
    metadata, stored = _Walk(path).all()
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path} is of architecture {architecture!r}; paxattn reads llama.")
    return GGUFFile(path, metadata, stored)


class _Walk:
    """One pass over the header. Counts are believed only as far as the file reaches."""

    def __init__(self, path: Path):
        self.path, self.at = path, 0
        self.size = path.stat().st_size
        self.data = np.memmap(path, np.uint8, "r") if self.size else np.zeros(0, np.uint8)

    def refuse(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged or no GGUF file: {reason}. Fetch it again.")

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise self.refuse(f"{count} bytes at {self.at} reach past its end at {self.size}")
        self.at += count
        return self.data[self.at - count : self.at].tobytes()

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > 2:
            raise self.refuse(f"a value has the unknown type {kind}")
        kind, count = self.scalar("<I"), self.scalar("<Q")
        least = struct.calcsize(_SCALARS[kind]) if kind in _SCALARS else 8
        if count * least > self.size - self.at:
            raise self.refuse(f"an array of {count} values does not fit the file")
        if kind in _SCALARS:
            code = _SCALARS[kind].lstrip("<")
            return list(struct.unpack(f"<{count}{code}", self.take(count * least)))
        return [self.value(kind, depth + 1) for _ in range(count)]

    def all(self) -> tuple[dict[str, Any], dict[str, _Tensor]]:
        if self.take(4) != b"GGUF":
            raise self.refuse("it does not begin with GGUF")
        version = self.scalar("<I")
        if version not in (2, 3):
            raise self.refuse(f"its version is {version}, 2 and 3 are read")
        tensors, keys = self.scalar("<Q"), self.scalar("<Q")
        if (tensors + keys) * 12 > self.size:
            raise self.refuse(f"{tensors} tensors and {keys} keys do not fit {self.size} bytes")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = self.text()
            if name in metadata:
                raise self.refuse(f"the key {name!r} occurs twice")
            metadata[name] = self.value(self.scalar("<I"))
        infos = [self.info() for _ in range(tensors)]
        align = metadata.get("general.alignment", 32)
        if type(align) is not int or align < 1:
            raise self.refuse(f"its alignment is {align!r}")
        return metadata, self.placed(infos, -(-self.at // align) * align, align)

    def info(self) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        name, dims = self.text(), self.scalar("<I")
        if not 1 <= dims <= 4:
            raise self.refuse(f"{name} has {dims} dimensions")
        shape = tuple(reversed([self.scalar("<Q") for _ in range(dims)]))
        kind = self.scalar("<I")
        if kind not in {int(t) for t in _TYPES}:
            known = ", ".join(sorted(t.name for t in _TYPES))
            raise CheckpointError(f"{self.path}: {name} has tensor type {kind}; {known} are read.")
        return name, shape, gguf.GGMLQuantizationType(kind), self.scalar("<Q")

    def placed(self, infos, base: int, align: int) -> dict[str, _Tensor]:
        stored: dict[str, _Tensor] = {}
        for name, shape, kind, offset in infos:
            block, width = gguf.GGML_QUANT_SIZES[kind]
            if 0 in shape or shape[-1] % block or offset % align:
                raise self.refuse(f"{name} of shape {list(shape)} at {offset} is misaligned for {kind.name}")
            size = math.prod(shape) // block * width
            if base + offset + size > self.size:
                raise self.refuse(f"{name} ends at byte {base + offset + size}, the file at {self.size}")
            if name in stored:
                raise self.refuse(f"the tensor {name!r} occurs twice")
            stored[name] = _Tensor(shape, kind, base + offset, size)
        spans = sorted((t.offset, t.offset + t.size, name) for name, t in stored.items())
        for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
            if begin < end:
                raise self.refuse(f"{first} and {second} overlap")
        return stored


def _hugging_face_name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _PARTS:
        return f"model.layers.{parts[1]}.{_PARTS[parts[2]]}.{parts[3]}"
    return name  # unknown: `check_tensors` refuses it by this name


def _config(metadata: Mapping[str, Any], stored: Mapping[str, _Tensor]) -> LlamaConfig:
    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"llama.{key}", default)

    heads, width, layers = get("attention.head_count"), get("embedding_length"), get("block_count")
    missing = [
        key
        for key in ("attention.head_count", "embedding_length", "block_count", "feed_forward_length", "context_length",
                    "attention.layer_norm_rms_epsilon")
        if get(key) is None
    ]  # fmt: skip
    if missing or "token_embd.weight" not in stored:
        raise ConfigError(f"the GGUF metadata lacks llama.{', llama.'.join(missing) or '* (no token_embd.weight)'}.")
    if type(heads) is not int or heads < 1 or type(width) is not int:
        raise ConfigError(f"llama.attention.head_count is {heads!r}, embedding_length {width!r}; both must be >= 1.")
    dim = get("attention.key_length", width // heads)
    if get("rope.dimension_count", dim) != dim or get("attention.value_length", dim) != dim:
        raise ConfigError("rotary embedding over a part of the head, or values of another size, are not implemented.")
    if "rope_freqs.weight" in stored:
        raise ConfigError("rope_freqs.weight holds llama3 factors without their settings; use the safetensors files.")
    scaling = get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ConfigError(f"llama.rope.scaling.type is {scaling!r}; none and linear are implemented.")
    theta = get("rope.freq_base", 10000.0)
    rope = Rope(rope_theta=theta)
    if scaling == "linear":
        rope = Rope("linear", theta, get("rope.scaling.factor", 1.0))
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    return LlamaConfig(
        vocab_size=stored["token_embd.weight"].shape[0],
        hidden_size=width,
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", heads),
        head_dim=dim,
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=get("context_length"),
        attention_bias="blk.0.attn_q.bias" in stored,
        mlp_bias="blk.0.ffn_gate.bias" in stored,
        tie_word_embeddings="output.weight" not in stored,
        bos_token_id=bos,
        eos_token_id=() if eos is None else (eos,),
        rope=rope,
    )
