"""GGUF: what the gguf package writes is read back in Hugging Face's layout; whatever is damaged is refused.

Two ways to make a file: `write` goes through gguf.GGUFWriter, `raw` puts together any bytes at all.
"""

import json
import math
import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from models.cli import main
from models.config import ConfigError, Rope
from models.gguf import open_gguf
from models.load import read_config
from models.weights import CheckpointError, expected_tensors, open_safetensors
from tests.paths import GOLDEN

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
SIZES = {
    "vocab_size": 12, "context_length": 64, "embedding_length": 8, "block_count": 1, "feed_forward_length": 10,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 6, "attention.value_length": 6,
    "rope.dimension_count": 6, "rope.freq_base": 5e5, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


def ggml_name(name):
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def interleaved(x, heads):
    """Rows of a head, first half then second half, as converters write them: 0, D/2, 1, D/2 + 1, ..."""
    dim = len(x) // heads
    order = np.arange(dim).reshape(2, dim // 2).T.ravel()
    return x.reshape(heads, dim, -1)[:, order].reshape(x.shape)


def stored(tensors, config):
    """Hugging Face's tensors under ggml's names, q and k interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    of = {name: heads.get(name.split(".")[-2]) for name in tensors}
    return {ggml_name(n): interleaved(x, of[n]) if of[n] else x for n, x in tensors.items()}


def write(path, own, tensors, metadata=None, kinds=None, architecture="llama"):
    """A file with metadata `llama.*` from `own`; `kinds` says which tensors are given as packed bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    metadata = {f"llama.{key}": value for key, value in own.items()} | (metadata or {})
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, x in tensors.items():
        writer.add_tensor(name, x, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small(path, own=None, extra=None, without=(), metadata=None):
    """A one-layer model of ones: `own` and `extra` change its settings and its tensors."""
    settings = {k: v for k, v in (SIZES | (own or {})).items() if v is not None}
    shapes = {
        "token_embd.weight": (12, 8), "output_norm.weight": (8,), "output.weight": (12, 8),
        "blk.0.attn_norm.weight": (8,), "blk.0.ffn_norm.weight": (8,), "blk.0.attn_q.weight": (24, 8),
        "blk.0.attn_k.weight": (12, 8), "blk.0.attn_v.weight": (12, 8), "blk.0.attn_output.weight": (8, 24),
        "blk.0.ffn_gate.weight": (10, 8), "blk.0.ffn_up.weight": (10, 8), "blk.0.ffn_down.weight": (8, 10),
    }  # fmt: skip
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items() if name not in without}
    return write(path, settings, tensors | (extra or {}), metadata)


def refused(path, error=CheckpointError):
    with pytest.raises(error) as caught:
        open_gguf(path)
    return str(caught.value)


def settings_of(config):
    return {
        "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads, "attention.key_length": config.head_dim,
        "rope.freq_base": config.rope.rope_theta, "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }  # fmt: skip


def divisors(theta, dim, factor, original):
    """What converters write for llama3 scaling, from its definition by wavelengths (Llama 3.1, scalar by scalar)."""
    result = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (i / dim)
        if wavelength < original / 4:
            result.append(1.0)
        elif wavelength > original:
            result.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama3_rope_tied"])
def test_golden_model_comes_back(tmp_path, name):
    source, wanted = open_safetensors(GOLDEN / name), read_config(GOLDEN / name)
    tensors = {tensor: source.read(tensor) for tensor in expected_tensors(wanted)}
    own, extra = settings_of(wanted), {}
    if wanted.rope.rope_type == "llama3":
        extra = {"rope_freqs.weight": divisors(wanted.rope.rope_theta, wanted.head_dim, 8.0, 64)}
        own |= {"rope.scaling.original_context_length": 64}
    ends = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    file = open_gguf(write(tmp_path / "x.gguf", own, stored(tensors, wanted) | extra, ends))
    assert file.config.rms_norm_eps == pytest.approx(wanted.rms_norm_eps)  # the file has it in float32
    assert file.config.to_dict() | {"rms_norm_eps": 0} == wanted.to_dict() | {"rms_norm_eps": 0}
    assert set(file.tensors) == set(tensors)
    for tensor, value in tensors.items():
        assert file.tensors[tensor].shape == value.shape
        np.testing.assert_array_equal(file.read(tensor), value)


def test_an_answer_ends_with_a_text_a_turn_or_a_message(tmp_path):
    """By the ids that the file names for each, after a conversion too."""
    source, wanted = open_safetensors(GOLDEN / "tiny_llama"), read_config(GOLDEN / "tiny_llama")
    tensors = {tensor: source.read(tensor) for tensor in expected_tensors(wanted)}
    golden = json.loads((GOLDEN / "tiny_llama" / "expected.json").read_text())
    prompts, greedy = golden["prompts"][:2], golden["greedy"][:2]
    ends = [1, greedy[0][3], greedy[1][5]]
    named = {f"tokenizer.ggml.{name}_token_id": end for name, end in zip(("eos", "eot", "eom"), ends, strict=True)}
    path = write(tmp_path / "x.gguf", settings_of(wanted), stored(tensors, wanted), named)
    assert main(["convert", str(path), str(tmp_path / "out"), "--json"]) == 0
    cut = [next(i for i, token in enumerate(tokens) if token in ends) + 1 for tokens in greedy]
    assert max(cut) < 7
    for where in (path, tmp_path / "out"):
        lm = models.load(where)
        assert lm.model.config.eos_token_id == tuple(ends)
        answers = lm.generate(prompts, max_new_tokens=20).outputs
        assert [a.token_ids for a in answers] == [t[:n] for t, n in zip(greedy, cut, strict=True)]
        assert {a.finish_reason for a in answers} == {"stop"}


def test_an_id_that_ends_all_of_them_is_one(tmp_path):
    named = {f"tokenizer.ggml.{name}_token_id": end for name, end in (("eos", 2), ("eot", 2), ("eom", 3))}
    assert open_gguf(small(tmp_path / "x.gguf", metadata=named)).config.eos_token_id == (2, 3)


def test_biases_are_permuted_too(tmp_path):
    bias = {"q": np.arange(24), "k": np.arange(12), "v": np.arange(12), "output": np.arange(8)}
    bias = {part: value.astype(np.float32) for part, value in bias.items()}
    kept = {"q": interleaved(bias["q"], 4), "k": interleaved(bias["k"], 2)}
    extra = {f"blk.0.attn_{part}.bias": value for part, value in (bias | kept).items()}
    extra |= {f"blk.0.ffn_{part}.bias": np.ones(n, np.float32) for part, n in (("gate", 10), ("up", 10), ("down", 8))}
    file = open_gguf(small(tmp_path / "x.gguf", extra=extra))
    assert file.config.attention_bias
    assert file.config.mlp_bias
    for part, value in bias.items():
        name = f"model.layers.0.self_attn.{part[0]}_proj.bias"
        np.testing.assert_array_equal(file.read(name), value)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_types_that_gguf_writes(tmp_path, kind):
    value = np.random.default_rng(0).normal(size=(12, 64)).astype(np.float32)
    kinds = {"token_embd.weight": Kind[kind]}
    packed = gguf.quants.quantize(value, Kind[kind])
    got, path = _embedding(tmp_path, packed, kinds)
    plain = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
    assert got.dtype == plain.get(kind, np.float32)
    if kind in plain:
        np.testing.assert_array_equal(got, value.astype(plain[kind]))
    reader = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    np.testing.assert_array_equal(got.astype(np.float32), gguf.quants.dequantize(reader.data, reader.tensor_type))
    assert np.abs(got.astype(np.float32) - value).max() < 0.5


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_types_that_gguf_only_reads(tmp_path, kind):
    packed = np.random.default_rng(0).integers(0, 100, (12, gguf.GGML_QUANT_SIZES[Kind[kind]][1]), np.uint8)
    got, _ = _embedding(tmp_path, packed, {"token_embd.weight": Kind[kind]})
    assert got.shape == (12, 256)
    np.testing.assert_array_equal(got, gguf.quants.dequantize(packed, Kind[kind]))


def _embedding(folder, packed, kinds):
    width = gguf.quants.quant_shape_from_byte_shape(packed.shape, kinds["token_embd.weight"])[-1]
    if packed.dtype != np.uint8:
        width = packed.shape[-1]
    shapes = {
        "output_norm.weight": (width,), "blk.0.attn_norm.weight": (width,), "blk.0.ffn_norm.weight": (width,),
        "blk.0.attn_q.weight": (24, width), "blk.0.attn_k.weight": (12, width), "blk.0.attn_v.weight": (12, width),
        "blk.0.attn_output.weight": (width, 24), "blk.0.ffn_gate.weight": (10, width),
        "blk.0.ffn_up.weight": (10, width), "blk.0.ffn_down.weight": (width, 10),
    }  # fmt: skip
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    own = SIZES | {"embedding_length": width}
    path = write(folder / "x.gguf", own, {"token_embd.weight": packed} | tensors, kinds=kinds)
    return open_gguf(path).read("model.embed_tokens.weight"), path


def test_a_damaged_scale_is_data_and_no_warning(tmp_path):
    got, _ = _embedding(tmp_path, np.full((12, 34), 0xFF, np.uint8), {"token_embd.weight": Kind.Q8_0})
    assert np.isnan(got).all()


METADATA = {
    "general.name": "tiny ü", "tokenizer.ggml.tokens": ["a", "Ġb", "→", ""], "tokenizer.ggml.token_type": [1, 1, 3, 4],
    "tokenizer.ggml.scores": [0.5, -1.0], "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": "{{ x }}",
}  # fmt: skip


def test_metadata_is_what_gguf_reads(tmp_path):
    path = small(tmp_path / "x.gguf", metadata=METADATA)
    metadata, reader = open_gguf(path).metadata, gguf.GGUFReader(path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert dict(metadata) == theirs
    assert len(metadata) == len(theirs)
    assert METADATA.items() <= theirs.items()
    assert metadata.get("absent", 7) == 7


@pytest.mark.parametrize(
    ("own", "rope"),
    [
        ({"rope.freq_base": None}, Rope()),
        ({"rope.scaling.type": "none"}, Rope("default", 5e5)),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, Rope("linear", 5e5, 4.0)),
        ({"rope.scaling.factor": 4.0, "rope.scaling.finetuned": True}, Rope("linear", 5e5, 4.0)),
    ],
)
def test_rope_settings(tmp_path, own, rope):
    assert open_gguf(small(tmp_path / "x.gguf", own)).config.rope == rope


BASE = 2.5e8  # with 6 dimensions, one of each: kept, blended, stretched


def test_llama3_scaling_is_recognised_by_its_divisors(tmp_path):
    freqs = divisors(BASE, 6, 32.0, 8192)
    assert freqs[0] == 1 < freqs[1] < 32 == freqs[2]
    file = open_gguf(small(tmp_path / "x.gguf", {"rope.freq_base": BASE}, {"rope_freqs.weight": freqs}))
    assert file.config.rope == Rope("llama3", BASE, 32.0, 1.0, 4.0, 8192)
    assert not any("rope" in name for name in file.tensors)
    ones = small(tmp_path / "y.gguf", extra={"rope_freqs.weight": np.ones(3, np.float32)})
    assert open_gguf(ones).config.rope == Rope("default", 5e5)


@pytest.mark.parametrize(
    ("own", "freqs"),
    [
        ({}, divisors(BASE, 6, 32.0, 8191)),
        ({}, divisors(BASE, 6, 32.0, 8192) * [1, 1.001, 1]),
        ({}, divisors(BASE, 8, 32.0, 8192)),
        ({}, [1, np.nan, 8]),
        ({"rope.freq_base": "5e5"}, divisors(BASE, 6, 32.0, 8192)),
        ({"rope.freq_base": -BASE}, divisors(BASE, 6, 32.0, 8192)),
        ({"rope.scaling.original_context_length": [8192]}, divisors(BASE, 6, 32.0, 8192)),
    ],
)
def test_other_divisors_are_refused(tmp_path, own, freqs):
    own = {"rope.freq_base": BASE} | own
    path = small(tmp_path / "x.gguf", own, {"rope_freqs.weight": np.array(freqs, np.float32)})
    assert "rope_freqs.weight is not llama3 scaling" in refused(path, ConfigError)


def test_sliding_window_and_defaults(tmp_path):
    # fmt: off
    silent = dict.fromkeys(["vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length",
                            "rope.dimension_count"])
    # fmt: on
    shapes = {"q.weight": (8, 8), "k.weight": (8, 8), "v.weight": (8, 8), "output.weight": (8, 8)}
    extra = {f"blk.0.attn_{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    own = silent | {"attention.sliding_window": 16, "expert_count": 0, "attention.causal": True}
    config = open_gguf(small(tmp_path / "x.gguf", own, extra, without=["output.weight"])).config
    assert (config.vocab_size, config.num_key_value_heads, config.head_dim) == (12, 4, 2)
    assert (config.sliding_window, config.tie_word_embeddings) == (16, True)
    assert (config.bos_token_id, config.eos_token_id) == (None, ())


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"logit_scale": 2.0, "attention.scale": 1.0}, "ignored: llama.logit_scale, llama.attention.scale"),
        ({"block_count": None, "context_length": None}, "missing: llama.block_count, llama.context_length"),
        ({"expert_count": 8}, "llama.expert_count is 8"),
        ({"attention.causal": False}, "attention.causal is False"),
        ({"rope.dimension_count": 4}, "rope.dimension_count is 4; only 6"),
        ({"attention.value_length": 8}, "attention.value_length is 8"),
        ({"vocab_size": 13}, "vocab_size is 13; only 12"),
        ({"rope.scaling.type": "yarn"}, "'yarn'"),
        ({"rope.scaling.type": "linear"}, "factor is 0.0"),
        ({"attention.head_count": [4, 4]}, "num_attention_heads is [4, 4]"),
        ({"attention.head_count": 3, "attention.key_length": None}, "num_attention_heads = 3"),
        ({"attention.head_count": 0, "attention.key_length": None}, "num_attention_heads = 0"),
        ({"embedding_length": "8"}, "hidden_size is '8'"),
        ({"block_count": 2**32 - 1}, "num_hidden_layers is 4294967295"),
        ({"rope.freq_base": float("nan")}, "rope_theta is nan"),
    ],
)
def test_settings_that_are_not_computed_are_refused(tmp_path, own, said):
    assert said in refused(small(tmp_path / "x.gguf", own), ConfigError)


def test_linear_scaling_beside_divisors(tmp_path):
    own, extra = {"rope.scaling.factor": 2.0}, {"rope_freqs.weight": np.ones(3, np.float32)}
    assert "'linear' and rope_freqs.weight" in refused(small(tmp_path / "x.gguf", own, extra), ConfigError)


def test_token_ids_outside_the_vocabulary(tmp_path):
    assert "12" in refused(small(tmp_path / "x.gguf", metadata={"tokenizer.ggml.eos_token_id": 12}), ConfigError)


def test_tensors_that_do_not_fit_are_one_message(tmp_path):
    extra = {"blk.0.attn_q_norm.weight": np.ones(6, np.float32), "blk.0.attn_k.weight": np.ones((10, 8), np.float32),
             "lm_head.weight": np.ones((12, 8), np.float32)}  # fmt: skip
    message = refused(small(tmp_path / "x.gguf", extra=extra, without=["blk.0.ffn_up.weight"]))
    assert "missing: model.layers.0.mlp.up_proj.weight" in message
    assert "unexpected: blk.0.attn_q_norm.weight (in the file), lm_head.weight (in the file)" in message
    assert "k_proj.weight is [10, 8], should be [12, 8]" in message


def test_no_embedding(tmp_path):
    path = small(tmp_path / "x.gguf", without=["token_embd.weight"])
    assert "missing: token_embd.weight" in refused(path, ConfigError)


def test_other_architectures_and_parts(tmp_path):
    assert "'qwen2'" in refused(write(tmp_path / "x.gguf", {}, {}, architecture="qwen2"))
    assert "one of 3 parts" in refused(small(tmp_path / "y.gguf", metadata={"split.count": 3}))


@pytest.mark.parametrize(("kind", "label"), [(Kind.IQ4_NL, "IQ4_NL"), (Kind.MXFP4, "MXFP4"), (Kind.I32, "I32")])
def test_types_that_are_not_read(tmp_path, kind, label):
    block, width = gguf.GGML_QUANT_SIZES[kind]
    extra = {"token_embd.weight": np.zeros((12, width * max(32 // block, 1)), np.uint8)}
    path = write(tmp_path / "x.gguf", SIZES, extra, kinds={"token_embd.weight": kind})
    assert f"token_embd.weight has tensor type {label}; F32, F16, BF16, Q8_0" in refused(path)


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def tensor(name, shape, kind=0, offset=0):
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def raw(path, pairs=(), tensors=(), data=0, *, magic=b"GGUF", version=3, counts=None):
    """A file of these parts; `data` bytes follow at the next multiple of 32."""
    counts = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join([*pairs, *tensors])
    path.write_bytes(head + bytes(-len(head) % 32 + data))
    return path


ALIGN = [pair("general.alignment", 4, struct.pack("<I", n)) for n in (0, 3, 64)]
LONG = struct.pack("<Q", 2**62)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"magic": b"GGML"}, "does not begin with GGUF"),
        ({"version": 1}, "version is 1"),
        ({"version": 3 << 24}, "little-endian"),
        ({"counts": (2**63, 0)}, f"{2**63} tensors"),
        ({"counts": (0, 2**63)}, f"{2**63} keys"),
        ({"counts": (2**59, 2**59)}, "do not fit"),
        ({"counts": (0, 9), "data": 200}, "'' occurs twice"),
        ({"pairs": [LONG]}, f"{2**62} bytes at"),
        ({"pairs": [pair("k", 8, LONG)]}, f"{2**62} bytes at"),
        ({"pairs": [pair("k", 9, struct.pack("<I", 0) + LONG)]}, f"an array of {2**62} values"),
        ({"pairs": [pair("k", 9, struct.pack("<I", 8) + LONG)]}, f"an array of {2**62} values"),
        ({"pairs": [pair("k", 9, struct.pack("<IQ", 8, 2) + text("a") + LONG)]}, f"{2**62} bytes at"),
        ({"pairs": [pair("k", 9, struct.pack("<IQIQ", 9, 1, 0, 0))]}, "holds values of type 9"),
        ({"pairs": [pair("k", 13, b"")]}, "type 13, which does not exist"),
        ({"pairs": [pair("k", 0, b"1")] * 2}, "'k' occurs twice"),
        ({"pairs": [pair(b"\xff", 0, b"1")]}, "no UTF-8"),
        ({"pairs": [pair("general.architecture", 8, text(b"\xff"))]}, "no UTF-8"),
        ({"pairs": [ALIGN[0]]}, "alignment is 0"),
        ({"pairs": [ALIGN[1]]}, "alignment is 3"),
        ({"pairs": [pair("general.alignment", 8, text("32"))]}, "alignment is '32'"),
        ({"tensors": [tensor("a", ())]}, "0 dimensions"),
        ({"tensors": [tensor("a", (1,) * 5)]}, "5 dimensions"),
        ({"tensors": [tensor("a", (2, 0))]}, "[2, 0] at 0 is empty"),
        ({"tensors": [tensor("a", (2, 33), kind=8)], "data": 200}, "no whole blocks of 32"),
        ({"tensors": [tensor("a", (2,), offset=4)], "data": 64}, "not at a multiple of 32"),
        ({"pairs": [ALIGN[2]], "tensors": [tensor("a", (2,), offset=32)], "data": 128}, "not at a multiple of 64"),
        ({"tensors": [tensor("a", (2,), offset=2**63)], "data": 64}, "a ends at byte"),
        ({"tensors": [tensor("a", (2**40, 2**40))], "data": 64}, "a ends at byte"),
        ({"tensors": [tensor("a", (17,))], "data": 64}, "a ends at byte"),
        ({"tensors": [tensor("a", (2,)), tensor("a", (2,), offset=32)], "data": 64}, "'a' occurs twice"),
        ({"tensors": [tensor("a", (9,)), tensor("b", (2,), offset=32)], "data": 64}, "a and b overlap at byte"),
        ({"tensors": [tensor("a", (2,), kind=99)], "data": 64}, "tensor type 99"),
        ({}, "architecture None"),
    ],
)
def test_header_that_does_not_hold_together(tmp_path, parts, said):
    assert said in refused(raw(tmp_path / "x.gguf", **parts))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = small(tmp_path_factory.mktemp("sound") / "x.gguf", {"rope.scaling.factor": 2.0}, metadata=METADATA)
    return path, path.read_bytes()


@pytest.mark.parametrize("keep", [0, 3, 4, 23, 24, 60, 600, -1, -3000])
def test_truncated_file(tmp_path, sound, keep):
    path = tmp_path / "x.gguf"
    # The last tensor is padded: what is cut off there is no data.
    end = max(t.data_offset + t.n_bytes for t in gguf.GGUFReader(sound[0]).tensors)
    path.write_bytes(sound[1][:end][:keep])
    assert "damaged or no GGUF file" in refused(path)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_any_damage_is_read_or_refused(sound, data):
    path, good = sound
    header = good.index(b"output_norm.weight") + 200  # most of the structure lies before
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, header) | st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    keep = data.draw(st.just(len(good)) | st.integers(0, len(good)))
    other = path.with_name("damaged.gguf")
    other.unlink(missing_ok=True)  # a new file each time: a mapping of the last one may still be alive
    other.write_bytes(damaged[:keep])
    try:
        file = open_gguf(other)
        dict(file.metadata)
    except (CheckpointError, ConfigError):
        return
    for name, info in file.tensors.items():
        assert file.read(name).shape == info.shape
