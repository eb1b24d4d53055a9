"""Configurations as Hugging Face writes them are read, and written, without losing or ignoring anything."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import ConfigError, LlamaConfig, Rope
from models.load import read_config
from models.weights import CheckpointError, expected_tensors
from tests.paths import GOLDEN

LLAMA = {
    "model_type": "llama", "vocab_size": 384, "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "hidden_act": "silu", "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(**changes):
    return LlamaConfig.from_dict({**LLAMA, **changes})


def refused(raw):
    with pytest.raises(ConfigError) as error:
        LlamaConfig.from_dict(raw)
    return str(error.value)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama3_rope_tied"])
def test_golden_files(name):
    config = LlamaConfig.from_dict(json.loads((GOLDEN / name / "config.json").read_text()))
    assert (config.vocab_size, config.hidden_size, config.head_dim) == (384, 64, 16)
    assert config.tie_word_embeddings == (name == "tiny_llama3_rope_tied")
    assert config.rope.rope_type == ("llama3" if config.tie_word_embeddings else "default")
    assert {config: 1}[LlamaConfig.from_dict(config.to_dict())] == 1  # equal, and hashable


@pytest.mark.parametrize(
    "raw",
    [
        LLAMA,
        MISTRAL,
        LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 64}},
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)
def test_round_trip(raw):
    config = LlamaConfig.from_dict(raw)
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_transformers_and_we_read_each_other(kind):
    import transformers

    theirs = getattr(transformers, f"{kind}Config")(
        hidden_size=64, num_attention_heads=8, num_key_value_heads=2, vocab_size=99, num_hidden_layers=2
    )
    ours = LlamaConfig.from_dict(theirs.to_dict())
    again = type(theirs)(**{k: v for k, v in ours.to_dict().items() if k != "model_type"})
    assert ours.to_dict().items() <= (again.to_dict() | {"eos_token_id": [again.eos_token_id[0]]}).items()
    assert ours.head_dim == theirs.head_dim == 8
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 6}],
)
def test_parameters_are_the_sum_of_the_tensors(changes):
    config = read(**changes)
    assert config.num_parameters == sum(math.prod(shape) for shape in expected_tensors(config).values())


def test_what_a_file_leaves_out_is_what_transformers_takes():
    bare = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "head_dim", "eos_token_id")}
    config = LlamaConfig.from_dict(bare)
    assert (config.num_key_value_heads, config.head_dim, config.eos_token_id) == (8, 8, (2,))
    assert config.rope == Rope(rope_theta=10000.0)
    config = LlamaConfig.from_dict(bare | {"model_type": "mistral", "num_attention_heads": 16})
    assert (config.num_key_value_heads, config.sliding_window) == (8, 4096)
    assert LlamaConfig.from_dict(MISTRAL | {"sliding_window": None}).sliding_window is None


@pytest.mark.parametrize(("eos", "wanted"), [(7, (7,)), ([7, 9], (7, 9)), (None, ())])
def test_eos_may_be_one_many_or_none(eos, wanted):
    assert read(eos_token_id=eos).eos_token_id == wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"rope_theta": 5e5}, Rope(rope_theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(rope_theta=5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, Rope(rope_theta=5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0}}, Rope(rope_theta=5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope("linear", factor=2)),
        ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2}}, Rope("linear", factor=2)),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
            Rope("llama3", 5e5, 8.0, 1.0, 4.0, 64),
        ),
        ({"rope_scaling": LLAMA3}, Rope("llama3", 10000.0, 8.0, 1.0, 4.0, 512)),
    ],
)
def test_rope_of_old_and_new_files(changes, wanted):
    assert read(**changes).rope == wanted


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"type": ["linear"]}}, "['linear']"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}, "said twice"),
        ({"rope_scaling": [1]}, "[1]"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_theta": 1.0}}, "one object"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "said twice"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": float("nan")}, "nan"),
        ({"rope_theta": 10**400}, "rope_theta is 1"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "above low_freq_factor"),
    ],
)  # fmt: skip
def test_rope_that_is_not_computed_is_refused(changes, said):
    assert said in refused(LLAMA | changes)


def test_fields_that_would_be_ignored_are_refused_all_at_once():
    message = refused(LLAMA | {"logit_scale": 2.0, "attn_logit_softcapping": 50.0, "use_cache": True})
    assert "attn_logit_softcapping, logit_scale" in message
    assert "use_cache" not in message


def test_missing_fields_are_listed_all_at_once():
    message = refused({"model_type": "llama", "surplus": 1})
    required = ["hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
                "num_hidden_layers", "rms_norm_eps", "vocab_size"]  # fmt: skip
    assert f"missing fields: {', '.join(required)}" in message
    assert "surplus" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "qwen2"}, "'qwen2'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 2**22 + 1}, "[1, 4194304]"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": 2**18}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
        ({"num_hidden_layers": 2**13}, "num_hidden_layers"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads = 0"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": None}, "give head_dim"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"head_dim": 15}, "must be even"),
        ({"hidden_size": 2**17, "intermediate_size": 2**19, "num_hidden_layers": 2**12}, "parameters"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"bos_token_id": -1}, "-1"),
        ({"eos_token_id": [2, 384]}, "384"),
        ({"eos_token_id": True}, "True"),
        ({"eos_token_id": {"a": 1}}, "{'a': 1}"),
    ],
)
def test_what_cannot_be_is_refused(changes, said):
    assert said in refused(LLAMA | changes)


@pytest.mark.parametrize("broken", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, broken, text):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text(text if name == broken else json.dumps(LLAMA), "utf-8", "surrogateescape")
    with pytest.raises(CheckpointError, match=f"^{tmp_path / broken} "):
        read_config(tmp_path)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'config.json'} cannot be read.*a model directory"):
        read_config(tmp_path)


def test_no_object_at_all():
    assert "model_type is None" in refused([1, 2])


def test_several_impossible_sizes_are_one_message():
    message = refused(LLAMA | {"vocab_size": 0, "rms_norm_eps": 2, "rope_theta": -1})
    assert all(name in message for name in ("vocab_size", "rms_norm_eps", "rope_theta"))


def test_direct_construction_is_checked_too():
    sizes = {k: v for k, v in LLAMA.items() if k not in ("model_type", "hidden_act", "eos_token_id")}
    with pytest.raises(ConfigError, match="must be a tuple"):
        LlamaConfig(**sizes, eos_token_id=[2])
    window_and_bias = LlamaConfig(**sizes, sliding_window=4, mlp_bias=True)
    with pytest.raises(ConfigError, match="sliding_window = 4"):
        window_and_bias.to_dict()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(LLAMA3)), inner),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*LLAMA, "rope_scaling", "rope_parameters", "rope_theta"]), JSON, max_size=3))
def test_any_json_is_read_or_refused(changes):
    try:
        config = LlamaConfig.from_dict(MISTRAL | changes)
    except ConfigError:
        return
    assert LlamaConfig.from_dict(config.to_dict()) == config
