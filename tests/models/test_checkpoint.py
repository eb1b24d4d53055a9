"""Orbax directories: what is saved comes back, and nothing that was touched since is loaded."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoint import is_checkpoint, load, save
from models.weights import CheckpointError

CONFIG = {"model_type": "llama", "hidden_size": 8, "rope_theta": 1e5, "eos_token_id": [1, 2]}


def params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "embed": jax.random.normal(keys[0], (512, 64), dtype),  # a chunk of its own, without a checksum by Orbax
        "layers.0.qkv": jax.random.normal(keys[1], (8, 2, 4, 4), dtype),
        "layers.10.norm": jax.random.normal(keys[2], (8,), dtype),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "model"
    save(path, CONFIG, params())
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def files(path):
    return sorted(p for p in path.rglob("*") if p.is_file())


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        np.testing.assert_array_equal(np.asarray(left[name]), np.asarray(right[name]), err_msg=name)


# --- round trips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("restored", [None, jnp.float32, jnp.bfloat16])
def test_round_trip(tmp_path, dtype, restored):
    counter = jnp.arange(3, dtype=jnp.int32)
    save(tmp_path / "model", CONFIG, params(dtype) | {"counter": counter})
    config, arrays = load(tmp_path / "model", dtype=restored)
    assert config == CONFIG
    cast = {name: array.astype(restored or dtype) for name, array in params(dtype).items()}
    same(arrays, cast | {"counter": counter})  # whole numbers keep their type
    assert all(isinstance(array, jax.Array) for array in arrays.values())


def test_a_sharding_for_all_arrays(saved):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    _, arrays = load(saved, sharding=lambda name, shape: sharding)
    assert {array.sharding for array in arrays.values()} == {sharding}
    same(arrays, params())


def test_a_saved_directory_may_move(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    same(load(Path("elsewhere"))[1], params())


def test_only_the_directory_is_left(tmp_path):
    save(tmp_path / "deep" / "er" / "model", CONFIG, params())
    assert [p.name for p in (tmp_path / "deep" / "er").iterdir()] == ["model"]


def test_is_checkpoint(saved, copy, tmp_path):
    assert is_checkpoint(saved)
    (copy / "manifest.json").unlink()
    assert is_checkpoint(copy)  # a broken one is still for `load` to refuse
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(saved / "config.json")
    assert not is_checkpoint(tmp_path / "nowhere")


# --- nothing is overwritten ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "empty directory", "checkpoint", "dangling link"])
def test_an_existing_destination_is_refused(saved, tmp_path, kind):
    path = tmp_path / "model"
    match kind:
        case "file":
            path.write_text("mine")
        case "empty directory":
            path.mkdir()
        case "checkpoint":
            shutil.copytree(saved, path)
        case "dangling link":
            path.symlink_to(tmp_path / "nowhere")
    before = [(p, p.read_bytes()) for p in files(tmp_path)]
    with pytest.raises(CheckpointError, match="exists and is not overwritten"):
        save(path, {}, params())
    assert [(p, p.read_bytes()) for p in files(tmp_path)] == before


def test_a_save_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path / "model", {"not": object()}, params())
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write"):
        save(tmp_path / "file" / "model", CONFIG, params())


# --- every change is noticed -----------------------------------------------------------------------------


def test_the_manifest_lists_every_other_file(saved):
    listed = json.loads((saved / "manifest.json").read_text())["files"]
    assert sorted(listed) == [p.relative_to(saved).as_posix() for p in files(saved) if p.name != "manifest.json"]
    assert {name: entry["size"] for name, entry in listed.items()} == {
        name: (saved / name).stat().st_size for name in listed
    }


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_refused(saved, tmp_path_factory, data):
    """In the manifest too. Undone afterwards, so that the next example starts from an intact directory."""
    path = data.draw(st.sampled_from([p for p in files(saved) if p.stat().st_size]))
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    try:
        with pytest.raises(CheckpointError):
            load(saved)
    finally:
        path.write_bytes(content)


def test_all_complaints_at_once(copy):
    (copy / "config.json").write_text("{}")
    (copy / "params" / "_CHECKPOINT_METADATA").unlink()
    (copy / "params" / "more").mkdir()
    (copy / "params" / "more" / "file").write_text("?")
    with pytest.raises(CheckpointError) as error:
        load(copy)
    message = str(error.value)
    assert "missing: params/_CHECKPOINT_METADATA" in message
    assert "not in the manifest: params/more/file" in message
    assert "changed: config.json" in message


@pytest.mark.parametrize("keep", [0, 1, -1])
def test_a_truncated_file(copy, keep):
    path = max(files(copy / "params"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"changed: {path.relative_to(copy).as_posix()}"):
        load(copy)


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (None, "FileNotFoundError"),
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"version": 1}', "KeyError"),
        ('{"version": 1, "files": 3}', "TypeError"),
        ('{"version": 2, "files": {}}', "version 2, known here: 1"),
        ('{"version": 1, "files": {}}', "not in the manifest: config.json"),
        ('{"version": 1, "files": {"../secret": {}}}', "missing: ../secret"),
    ],
)
def test_a_bad_manifest(copy, manifest, says):
    (copy / "manifest.json").unlink() if manifest is None else (copy / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=says):
        load(copy)


def test_the_check_comes_before_anything_is_read(copy, monkeypatch):
    (copy / "config.json").write_text("{}")
    monkeypatch.setattr("orbax.checkpoint.experimental.v1.metadata", pytest.fail)
    with pytest.raises(CheckpointError):
        load(copy)
