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
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            if type(getattr(self, name)) is not bool:
                problems.append(f"{name} is {getattr(self, name)!r}, must be true or false")
        if not problems:
            if self.num_attention_heads % self.num_key_value_heads:
                problems.append(
                    f"num_attention_heads = {self.num_attention_heads} is no multiple of "
                    f"num_key_value_heads = {self.num_key_value_heads}"
                )
            if self.head_dim % 2:
                problems.append(f"head_dim is {self.head_dim}, must be even for rotary embedding")
            if self.num_parameters > _MOST_PARAMETERS:
                problems.append(f"the sizes make {self.num_parameters:,} parameters, more than {_MOST_PARAMETERS:,}")
        if not _is_number(self.rms_norm_eps) or not 0 < self.rms_norm_eps < 1:
            problems.append(f"rms_norm_eps is {self.rms_norm_eps!r}, must be in (0, 1)")
        if self.sliding_window is not None and (type(self.sliding_window) is not int or self.sliding_window < 1):
            problems.append(f"sliding_window is {self.sliding_window!r}, must be null or at least 1")
        _raise_if(problems + _token_problems(self) + _rope_problems(self.rope))

    @property
    def num_parameters(self) -> int:
        """Parameters in all, the embedding counted once where it is tied."""
        embed, mlp_width = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = 2 * embed * (q + kv) + self.attention_bias * (q + 2 * kv + embed)
        mlp = 3 * embed * mlp_width + self.mlp_bias * (2 * mlp_width + embed)
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * embed
        return tables + self.num_hidden_layers * (attention + mlp + 2 * embed) + embed

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a parsed config.json of model type llama or mistral, of transformers 4 or 5.

        Raises:
          ConfigError: unknown, missing or impossible fields, all listed at once.
        """
        kind = raw.get("model_type") if isinstance(raw, Mapping) else None
        if kind not in ("llama", "mistral"):
            raise ConfigError(f"model_type is {kind!r}; paxattn reads llama and mistral.")
        raw = {**_HF_DEFAULTS[kind], **raw}
        fixed = _FIXED | _FIXED_OF[kind]
        unknown = sorted(set(raw) - _FIELDS - _HARMLESS - set(fixed) - _ROPE_FIELDS_OUTSIDE)
        missing = sorted(_REQUIRED - set(raw))
        problems = [
            f"{name} is {raw[name]!r}, only {wanted!r} is implemented for {kind}"
            for name, wanted in fixed.items()
            if raw.get(name, wanted) != wanted
        ]
        if unknown:
            problems.append(f"fields that would be ignored: {', '.join(unknown)}")
        if missing:
            problems.append(f"missing fields: {', '.join(missing)}")
        rope = _read_rope(raw, problems)
        _raise_if(problems)
        values = {name: raw[name] for name in _FIELDS & set(raw)}
        heads, width = values["num_attention_heads"], values["hidden_size"]
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = heads
        if values.get("head_dim") is None:
            values["head_dim"] = head_dim(width, heads)
        eos = values["eos_token_id"]
        values["eos_token_id"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        return LlamaConfig(**values, rope=rope)

    def to_dict(self) -> dict[str, Any]:
        """A config.json that `from_dict` and transformers read.

        Raises:
          ConfigError: a sliding window together with biases, which no Hugging Face model type has.
        """
        if self.sliding_window is not None and (self.attention_bias or self.mlp_bias):
            raise ConfigError(
                f"sliding_window = {self.sliding_window} with attention_bias or mlp_bias has no config.json: "
                "mistral has no biases, llama no window. Drop one of them to write this model."
            )
        rope = {"rope_type": self.rope.rope_type, "rope_theta": self.rope.rope_theta}
        rope |= {name: getattr(self.rope, name) for name in _ROPE_FIELDS[self.rope.rope_type]}
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rope"}
        kind = "llama" if self.sliding_window is None else "mistral"
        if kind == "mistral":
            del kept["mlp_bias"], kept["attention_bias"]
        else:
            del kept["sliding_window"]
        ends = {"eos_token_id": list(self.eos_token_id), "rope_parameters": rope}
        return {"model_type": kind, "hidden_act": "silu", **kept, **ends}


def head_dim(hidden_size: object, num_attention_heads: object) -> int:
    """The head size of a file that gives none: hidden_size / num_attention_heads, without a rest."""
    width, heads = hidden_size, num_attention_heads
    if type(width) is not int or type(heads) is not int or heads < 1 or width % heads:
        raise ConfigError(
            f"hidden_size = {width!r} cannot be cut into num_attention_heads = {heads!r} heads of one size; "
            "correct them, or give head_dim."
        )
    return width // heads


_LARGEST = {
    "vocab_size": 2**22, "hidden_size": 2**17, "intermediate_size": 2**19, "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**12,
    "max_position_embeddings": 2**27,
}  # fmt: skip
_MOST_PARAMETERS, _LARGEST_ROPE = 2 * 10**12, 1e12
_FIELDS = {f.name for f in dataclasses.fields(LlamaConfig)} - {"rope"}
_REQUIRED = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "rms_norm_eps",
}  # fmt: skip
# What transformers takes where a file is silent.
_HF_DEFAULTS = {
    "llama": {"num_key_value_heads": None, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4096},
}
_FIXED = {
    "hidden_act": "silu", "pretraining_tp": 1, "rope_interleaved": False, "quantization_config": None,
    "is_encoder_decoder": False, "chunk_size_feed_forward": 0,
}  # fmt: skip
_FIXED_OF = {"llama": {"sliding_window": None}, "mistral": {"attention_bias": False, "mlp_bias": False}}
# Of no effect on what the model computes at inference.
_HARMLESS = {
    "model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "pad_token_id", "initializer_range", "attention_dropout", "_name_or_path", "is_llama_config",
    "transformers.js_config", "_attn_implementation_autoset", "output_attentions",
    "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
_ROPE_FIELDS_OUTSIDE = {"rope_theta", "rope_scaling", "rope_parameters"}
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise ConfigError("the model's configuration cannot be used: " + "; ".join(problems) + ".")


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _token_problems(config: LlamaConfig) -> list[str]:
    if type(config.eos_token_id) is not tuple:
        return [f"eos_token_id is {config.eos_token_id!r}, must be a tuple of ids"]
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
        f"rope {name} is {getattr(rope, name)!r}, must be a number in (0, {_LARGEST_ROPE:g})"
        for name in ("rope_theta", *_ROPE_FIELDS[rope.rope_type])
        if not _is_number(getattr(rope, name)) or not 0 < getattr(rope, name) < _LARGEST_ROPE
    ]
    if not problems and rope.rope_type == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        problems.append("rope high_freq_factor must be above low_freq_factor")
    return problems


def _read_rope(raw: Mapping[str, Any], problems: list[str]) -> Rope:
    """rope_parameters of transformers 5, or rope_theta and rope_scaling of older files."""
    given = [raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name)]
    if any(one != given[0] for one in given) or not all(isinstance(one, Mapping) for one in given):
        problems.append(f"rope_parameters and rope_scaling must be one object, are {given}")
        return Rope()
    settings = dict(given[0]) if given else {}
    thetas = [settings.pop("rope_theta", None), raw.get("rope_theta")]
    thetas = [theta for theta in thetas if theta is not None] or [10000.0]
    kinds = [settings.pop(name) for name in ("rope_type", "type") if name in settings]
    for name, found in (("rope_theta", thetas), ("rope_type", kinds)):
        if found[1:] and found[0] != found[1]:
            problems.append(f"{name} is said twice, as {found[0]!r} and as {found[1]!r}")
    kind = kinds[0] if kinds else "default"
    if kind not in tuple(_ROPE_FIELDS):
        problems.append(f"rope_type is {kind!r}, only {', '.join(_ROPE_FIELDS)} are implemented")
        return Rope()
    if kind == "llama3":
        settings.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    if settings.get("partial_rotary_factor") == 1:
        del settings["partial_rotary_factor"]
    known = set(_ROPE_FIELDS[kind])
    if unknown := sorted(set(settings) - known):
        problems.append(f"rope settings that would be ignored with rope_type {kind!r}: {', '.join(unknown)}")
    if missing := sorted(known - set(settings)):
        problems.append(f"rope_type {kind!r} needs {', '.join(missing)}")
    return Rope(kind, thetas[0], **{name: settings[name] for name in known & set(settings)})
