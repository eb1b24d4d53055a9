"""What a Llama is made of, read from a Hugging Face config.json and checked before anything is allocated.

config.json --from_dict--> LlamaConfig (frozen, hashable) --to_dict--> config.json
    |
    +-- a field that is neither known nor known to be harmless is refused by name, never ignored
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration that paxattn cannot honour; the message lists every reason."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: Su et al. 2021; llama3 scaling as in the Llama 3.1 release."""

    rope_type: str = "default"  # default, linear or llama3
    rope_theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches under their Hugging Face names. Hashable: a static field under jit."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    rope: Rope = Rope()

    def __post_init__(self):
        problems = [
            f"{name} is {value!r}, must be an integer in [1, {most}]"
            for name, most in _LARGEST.items()
            if type(value := getattr(self, name)) is not int or not 1 <= value <= most
        ]
        if not problems:
            if self.num_attention_heads % self.num_key_value_heads:
                problems.append(
                    f"num_attention_heads = {self.num_attention_heads} is no multiple of "
                    f"num_key_value_heads = {self.num_key_value_heads}"
                )
            if self.head_dim % 2:
                problems.append(f"head_dim is {self.head_dim}, must be even for rotary embedding")
            if self.num_parameters > _MOST_PARAMETERS:
                problems.append(
                    f"the sizes make {self.num_parameters:,} parameters, more than {_MOST_PARAMETERS:,}"
                )
        if not _is_number(self.rms_norm_eps) or not 0 < self.rms_norm_eps < 1:
            problems.append(f"rms_norm_eps is {self.rms_norm_eps!r}, must be in (0, 1)")
        if self.sliding_window is not None and (
            type(self.sliding_window) is not int or self.sliding_window < 1
        ):
            problems.append(f"sliding_window is {self.sliding_window!r}, must be null or at least 1")
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            if type(getattr(self, name)) is not bool:
                problems.append(f"{name} is {getattr(self, name)!r}, must be true or false")
        problems += _token_problems(self) + _rope_problems(self.rope)
        if problems:
            raise ConfigError("the model's configuration cannot be used: " + "; ".join(problems) + ".")

    @property
    def num_parameters(self) -> int:
        """Parameters in all, the embedding counted once where it is tied."""
        embed, heads, kv_heads, dim = (
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
        )
        attention = embed * (2 * heads + 2 * kv_heads) * dim + self.attention_bias * (
            (heads + 2 * kv_heads) * dim + embed
        )
        mlp = 3 * embed * self.intermediate_size + self.mlp_bias * (2 * self.intermediate_size + embed)
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * embed
        return tables + self.num_hidden_layers * (attention + mlp + 2 * embed) + embed

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a parsed config.json of model type llama or mistral, of transformers 4 or 5.

        Raises:
          ConfigError: unknown, missing or impossible fields, all listed at once.
        """
        kind = raw.get("model_type")
        if kind not in ("llama", "mistral"):
            raise ConfigError(f"model_type is {kind!r}; paxattn reads llama and mistral.")
        fixed = {name: wanted for name, wanted in _FIXED.items() if raw.get(name, wanted) != wanted}
        unknown = sorted(
            set(raw) - _FIELDS - _HARMLESS - set(_FIXED) - {"rope_theta", "rope_scaling", "rope_parameters"}
        )
        missing = sorted(_REQUIRED - set(raw))
        problems = [
            f"{name} is {raw[name]!r}, only {wanted!r} is implemented" for name, wanted in fixed.items()
        ]
        if unknown:
            problems.append(f"fields that would be ignored: {', '.join(unknown)}")
        if missing:
            problems.append(f"missing fields: {', '.join(missing)}")
        if problems:
            raise ConfigError("the model's configuration cannot be used: " + "; ".join(problems) + ".")
        values = {name: raw[name] for name in _FIELDS & set(raw)}
        heads = values["num_attention_heads"]
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = heads
        if values.get("head_dim") is None:
            if type(heads) is not int or heads < 1 or type(values["hidden_size"]) is not int:
                raise ConfigError(f"num_attention_heads is {heads!r}, hidden_size {values['hidden_size']!r}; "
                                  "both must be positive integers.")  # fmt: skip
            values["head_dim"] = values["hidden_size"] // heads
        eos = values.get("eos_token_id")
        values["eos_token_id"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        return LlamaConfig(**values, rope=_read_rope(raw))

    def to_dict(self) -> dict[str, Any]:
        """A config.json that `from_dict` and transformers read."""
        rope = {"rope_type": self.rope.rope_type, "rope_theta": self.rope.rope_theta}
        rope |= {name: getattr(self.rope, name) for name in _ROPE_FIELDS[self.rope.rope_type]}
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rope"}
        kind = "llama" if self.sliding_window is None else "mistral"
        if kind == "mistral":
            del kept["mlp_bias"], kept["attention_bias"]
        else:
            del kept["sliding_window"]
        eos = list(self.eos_token_id)
        return {
            "model_type": kind,
            "hidden_act": "silu",
            **kept,
            "eos_token_id": eos,
            "rope_parameters": rope,
        }


_LARGEST = {
    "vocab_size": 2**22,
    "hidden_size": 2**17,
    "intermediate_size": 2**19,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "max_position_embeddings": 2**27,
}
_MOST_PARAMETERS = 2 * 10**12
_FIELDS = {f.name for f in dataclasses.fields(LlamaConfig)} - {"rope"}
_REQUIRED = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "rms_norm_eps",
}  # fmt: skip
_FIXED = {"hidden_act": "silu", "pretraining_tp": 1, "rope_interleaved": False, "quantization_config": None}
# Of no effect on what the model computes at inference.
_HARMLESS = {
    "model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range",
    "attention_dropout", "pad_token_id", "_name_or_path", "is_llama_config", "transformers.js_config",
    "_attn_implementation_autoset", "output_attentions", "output_hidden_states",
}  # fmt: skip
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _token_problems(config: LlamaConfig) -> list[str]:
    ids = [*config.eos_token_id, *([] if config.bos_token_id is None else [config.bos_token_id])]
    return [
        f"bos or eos token id {token!r} is outside the vocabulary of {config.vocab_size!r}"
        for token in ids
        if type(token) is not int or type(config.vocab_size) is not int or not 0 <= token < config.vocab_size
    ]


def _rope_problems(rope: Rope) -> list[str]:
    if rope.rope_type not in _ROPE_FIELDS:
        return [f"rope_type is {rope.rope_type!r}, only {', '.join(_ROPE_FIELDS)} are implemented"]
    problems = [
        f"rope {name} is {getattr(rope, name)!r}, must be a number above 0"
        for name in ("rope_theta", *_ROPE_FIELDS[rope.rope_type])
        if not _is_number(getattr(rope, name)) or not 0 < getattr(rope, name) < float("inf")
    ]
    if not problems and rope.rope_type == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        problems.append("rope high_freq_factor must be above low_freq_factor")
    return problems


def _read_rope(raw: Mapping[str, Any]) -> Rope:
    """rope_parameters of transformers 5, or rope_theta and rope_scaling of older files."""
    settings = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"rope settings are {settings!r}, must be an object.")
    settings = dict(settings)
    settings.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    known = ("rope_theta", *_ROPE_FIELDS.get(kind, ()))
    unknown = sorted(set(settings) - set(known))
    if kind not in _ROPE_FIELDS or unknown:
        extra = f"; fields that would be ignored: {', '.join(unknown)}" if unknown else ""
        raise ConfigError(f"rope_type is {kind!r}, {', '.join(_ROPE_FIELDS)} are implemented{extra}.")
    missing = sorted(set(known) - set(settings))
    if missing:
        raise ConfigError(f"rope_type {kind!r} needs {', '.join(missing)}.")
    return Rope(rope_type=kind, **settings)
