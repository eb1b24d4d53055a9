"""Safetensors: what the safetensors package writes is read back; whatever does not hold together is refused."""

import json
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import LlamaConfig
from models.load import read_config
from models.weights import CheckpointError, TensorInfo, check_tensors, expected_tensors, open_safetensors
from tests.paths import GOLDEN

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def write(folder, tensors=TENSORS, name="model.safetensors"):
    safetensors.numpy.save_file(tensors, folder / name)
    return folder


def write_header(folder, header, data=b"", *, length=None, name="model.safetensors"):
    """A file of any header, sane or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / name).write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return folder


def write_shards(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def entry(shape, begin, end, dtype="F32"):
    return {"shape": shape, "dtype": dtype, "data_offsets": [begin, end]}


def refused(folder):
    with pytest.raises(CheckpointError) as error:
        open_safetensors(folder)
    return str(error.value)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama3_rope_tied"])
def test_golden_files_are_what_safetensors_reads(name):
    source = open_safetensors(GOLDEN / name)
    with safetensors.safe_open(GOLDEN / name / "model.safetensors", framework="numpy") as file:
        assert set(source.tensors) == set(file.keys())
        for tensor in source.tensors:
            np.testing.assert_array_equal(source.read(tensor), file.get_tensor(tensor))
    check_tensors(source, expected_tensors(read_config(GOLDEN / name)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float_dtype(tmp_path, dtype):
    wanted = {"a": np.arange(-3, 3).astype(dtype).reshape(3, 2), "scalar": np.array(2.5, dtype)}
    source = open_safetensors(write(tmp_path, wanted))
    for name, value in wanted.items():
        got = source.read(name)
        assert (got.dtype, got.shape) == (value.dtype, value.shape) == (np.dtype(dtype), source.tensors[name].shape)
        np.testing.assert_array_equal(got, value)


def test_data_may_lie_at_odd_addresses(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} '
    assert len(header) % 4
    source = open_safetensors(write_header(tmp_path, header, np.array([1, 2], "<f4").tobytes()))
    assert source.read("a").tolist() == [1, 2]


def test_reading_maps_the_file_instead_of_copying_it(tmp_path):
    assert isinstance(open_safetensors(write(tmp_path)).read("a"), np.memmap)


def test_shards(tmp_path):
    for name, value in TENSORS.items():
        write(tmp_path, {name: value}, f"{name}.safetensors")
    source = open_safetensors(write_shards(tmp_path, {name: f"{name}.safetensors" for name in TENSORS}))
    assert source.tensors == {"a": TensorInfo((2, 3), "F32"), "b": TensorInfo((4,), "F16")}
    np.testing.assert_array_equal(source.read("b"), TENSORS["b"])


@pytest.mark.parametrize("sharded", [True, False])
def test_a_second_copy_of_the_weights_beside_them_is_left_alone(tmp_path, sharded):
    write(tmp_path, {"tok_embeddings.weight": TENSORS["a"]}, "consolidated.safetensors")
    write(tmp_path, name="x.safetensors" if sharded else "model.safetensors")
    source = open_safetensors(write_shards(tmp_path, dict.fromkeys(TENSORS, "x.safetensors")) if sharded else tmp_path)
    assert set(source.tensors) == set(TENSORS)


def test_shards_in_the_hubs_cache_are_links_to_its_blobs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write(blobs, name="0123")
    (snapshot / "x.safetensors").symlink_to("../../blobs/0123")
    source = open_safetensors(write_shards(snapshot, dict.fromkeys(TENSORS, "x.safetensors")))
    assert set(source.tensors) == set(TENSORS)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/tmp/x.safetensors", "..", "", "x.bin", "a/x.safetensors", 7])
def test_index_that_names_other_places(tmp_path, shard):
    assert repr(shard) in refused(write_shards(tmp_path, {"a": shard}))


@pytest.mark.parametrize("shard", ["x.safetensors", "\0.safetensors", f"{'x' * 300}.safetensors"])
def test_index_that_names_an_absent_file(tmp_path, shard):
    assert "not there" in refused(write_shards(tmp_path, {"a": shard}))


def test_index_that_names_a_link_out_of_its_folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    write(tmp_path)
    (inside / "x.safetensors").symlink_to(tmp_path / "model.safetensors")
    assert "outside its folder" in refused(write_shards(inside, {"a": "x.safetensors"}))
    (inside / "x.safetensors").unlink()
    (inside / "x.safetensors").symlink_to("x.safetensors")
    assert "not there" in refused(inside)


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "x.safetensors"}, "holds b"),
        ({"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"}, "no shard holds: c"),
        ({"a": "x.safetensors", "b": "y.safetensors"}, "puts into y.safetensors"),
        ({"a": []}, "unhashable"),
        ([], "no attribute"),
    ],
)
def test_index_that_disagrees_with_its_shards(tmp_path, weight_map, said):
    write(tmp_path, name="x.safetensors")
    write(tmp_path, name="y.safetensors")
    assert said in refused(write_shards(tmp_path, weight_map))


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[" * 100_000, '{"weight_map": {"a": "x", "a": "y"}}'])
def test_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "no index with a weight_map" in refused(tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt"])
def test_pickles_are_refused_by_name(tmp_path, suffix):
    (tmp_path / f"model{suffix}").write_bytes(b"cos\nsystem\n")
    message = refused(tmp_path)
    assert f"model{suffix}" in message
    assert "can run code" in message
    assert "safe_serialization=True" in message


def test_nothing_there(tmp_path):
    assert "neither model.safetensors nor" in refused(tmp_path)
    assert "is no directory" in refused(tmp_path / "absent")


@pytest.mark.parametrize(
    ("header", "size", "said"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "b begins at byte 4, the tensor before it ends at 8"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, "b begins at byte 12"),
        ({"a": entry([2], 4, 12)}, 12, "a begins at byte 4"),
        ({"a": entry([2], 0, 8)}, 4, "end at byte"),
        ({"a": entry([2], 0, 8)}, 12, "end at byte"),
        ({"a": entry([2], 2**62, 2**62 + 8)}, 8, f"begins at byte {2**62}"),
        ({"a": entry([3], 0, 8)}, 8, "shape [3] F32"),
        ({"a": entry([2**40, 2**40], 0, 8)}, 8, "does not fill bytes 0 to 8"),
        ({"a": entry([-2], 0, 8)}, 8, "shape [-2]"),
        ({"a": entry([2.0], 0, 8)}, 8, "shape [2.0]"),
        ({"a": entry([True, 2], 0, 8)}, 8, "shape [True, 2]"),
        ({"a": entry([0, 2], 0, 0)}, 0, "is empty"),
        ({"a": entry([1] * 9, 0, 4)}, 4, "more than 8 dimensions"),
        ({"a": entry([2], 8, 0)}, 8, "bytes 8 to 0"),
        ({"a": entry([2], "0", 8)}, 8, "does not fill"),
        ({"a": entry([1], 0, 8, "I64")}, 8, "'I64', only F64, F32, F16, BF16"),
        ({"a": entry([8], 0, 8, "F8_E4M3")}, 8, "'F8_E4M3'"),
        ({"a": entry([2], 0, 8, ["F32"])}, 8, "['F32']"),
        ({"a": {"shape": [2], "dtype": "F32"}}, 8, "data_offsets"),
        ({"a": {"shape": 2, "dtype": "F32", "data_offsets": [0, 8]}}, 8, "malformed"),
        ({"a": {"shape": [2], "dtype": "F32", "data_offsets": [0, 8, 9]}}, 8, "malformed"),
        ({"a": 1}, 8, "malformed"),
        ([], 0, "no object"),
        (b'{"a": ', 0, "no JSON"),
        (b"\xff\xff", 0, "no JSON"),
        (b"[" * 100_000, 0, "no JSON"),
        (b'{"a": {"shape": [1' + b"0" * 5000 + b"]}}", 0, "no JSON"),
        (b'{"a": {"shape": [], "shape": []}}', 0, "a name occurs twice"),
        (b'{"a": {}, "a": {}}', 0, "a name occurs twice"),
    ],
)
def test_header_that_does_not_hold_together(tmp_path, header, size, said):
    assert said in refused(write_header(tmp_path, header, bytes(size)))


@pytest.mark.parametrize("length", [2**63, 100_000_001, 3])
def test_header_longer_than_the_file(tmp_path, length):
    assert f"a header of {length} bytes does not fit" in refused(write_header(tmp_path, b"{}", length=length))


def test_header_above_the_limit_is_not_read(tmp_path):
    with write_header(tmp_path, b"{}", length=100_000_001).joinpath("model.safetensors").open("r+b") as file:
        file.truncate(100_000_100)  # sparse
    assert "limit 100000000" in refused(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 8, 60, -1])
def test_truncated_file(tmp_path, keep):
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "damaged" in refused(tmp_path)


SIZES = {
    "vocab_size": 10, "hidden_size": 6, "intermediate_size": 5, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 8,
}  # fmt: skip


def expected(**changes):
    return expected_tensors(LlamaConfig(**SIZES, **changes))


def source_of(shapes):
    return SimpleNamespace(tensors={name: TensorInfo(shape, "F32") for name, shape in shapes.items()})


def test_expected_names_and_shapes():
    at = "model.layers.0."
    plain = expected()
    assert plain == {
        "model.embed_tokens.weight": (10, 6), "model.norm.weight": (6,), "lm_head.weight": (10, 6),
        at + "input_layernorm.weight": (6,), at + "post_attention_layernorm.weight": (6,),
        at + "self_attn.q_proj.weight": (8, 6), at + "self_attn.k_proj.weight": (4, 6),
        at + "self_attn.v_proj.weight": (4, 6), at + "self_attn.o_proj.weight": (6, 8),
        at + "mlp.gate_proj.weight": (5, 6), at + "mlp.up_proj.weight": (5, 6), at + "mlp.down_proj.weight": (6, 5),
    }  # fmt: skip
    assert plain.keys() - expected(tie_word_embeddings=True).keys() == {"lm_head.weight"}
    biases = {k: v for k, v in expected(attention_bias=True, mlp_bias=True).items() if k not in plain}
    assert biases == {
        at + "self_attn.q_proj.bias": (8,), at + "self_attn.k_proj.bias": (4,), at + "self_attn.v_proj.bias": (4,),
        at + "self_attn.o_proj.bias": (6,), at + "mlp.gate_proj.bias": (5,), at + "mlp.up_proj.bias": (5,),
        at + "mlp.down_proj.bias": (6,),
    }  # fmt: skip


def test_all_that_does_not_fit_is_one_message():
    shapes = expected()
    missing, wrong = "model.norm.weight", "lm_head.weight"
    found = {k: v for k, v in shapes.items() if k != missing} | {wrong: (9, 6), "surplus": (1,), "other": (2,)}
    with pytest.raises(CheckpointError) as error:
        check_tensors(source_of(found), shapes)
    message = str(error.value)
    assert f"missing: {missing}; unexpected: other, surplus; wrong shape: {wrong} is [9, 6]" in message


def test_copies_and_tables_that_older_files_hold_are_no_surprise():
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    check_tensors(source_of(expected() | extra), expected())
    check_tensors(source_of(expected()), expected(tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        check_tensors(source_of(expected(tie_word_embeddings=True)), expected())


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    return folder, write(folder).joinpath("model.safetensors").read_bytes()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_is_read_or_refused(sound, data):
    folder, raw = sound
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    keep = data.draw(st.integers(0, len(raw)) | st.just(len(raw)))
    # A new file each time: a mapping of the last one may still be alive.
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").write_bytes(damaged[:keep])
    try:
        source = open_safetensors(folder)
    except CheckpointError:
        return
    for name, info in source.tensors.items():
        assert source.read(name).shape == info.shape
