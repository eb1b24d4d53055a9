"""A converted model as one directory: Orbax arrays, and a manifest that notices every changed byte.

    model/
      config.json              as given to save
      tokenizer.json, ...      Hugging Face files, if the model has a tokenizer
      params/                  Orbax: flat names -> arrays
      manifest.json            path -> size and sha256 of every other file

    save: write all of it to a scratch directory beside -> manifest -> rename
    load: compare the manifest with the directory -> config (`open_config`) -> restore, cast on the way (`read`)

Orbax loads a chunk with a flipped bit without a word: hence the manifest, checked before anything is read.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.hub import sha256
from models.tokenizer import Tokenizer
from models.weights import CheckpointError

MANIFEST, CONFIG, PARAMS = "manifest.json", "config.json", "params"
_VERSION = 1

Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def is_checkpoint(path: Path) -> bool:
    """Whether `path` looks like a directory that `save` wrote; `load` says whether it is intact."""
    return (path / MANIFEST).is_file() or (path / PARAMS).is_dir()


def save(
    path: Path, config: Mapping[str, Any], params: Mapping[str, jax.Array], tokenizer: Tokenizer | None = None
) -> None:
    """Writes a new directory, which exists under its name only once it is complete.

    Args:
        path: The directory to make; its parents are made too.
        config: What JSON can hold.
        params: Arrays by flat name, such as `layers.0.qkv`.
        tokenizer: Saved beside the arrays as Hugging Face files.

    Raises:
        CheckpointError: There is something at `path`, or it cannot be written.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    path = path.absolute()
    if os.path.lexists(path):
        raise CheckpointError(f"{path} exists and is not overwritten: remove it or name another directory")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            draft = Path(scratch) / path.name  # made here: the scratch directory itself is private to its owner
            draft.mkdir()
            if tokenizer is not None:
                tokenizer.save(draft)
            _write_json(draft / CONFIG, config)
            if params:  # Orbax writes no empty tree
                ocp.save(str(draft / PARAMS), dict(params))
            _write_json(draft / MANIFEST, {"version": _VERSION, "files": _inventory(draft)})
            os.rename(draft, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; name a directory with room to write") from error


def load(
    path: Path, *, dtype: DTypeLike | None = None, sharding: Placement | None = None
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The config and the arrays of a directory that `save` wrote.

    Arrays are cast one by one as they are read. The peak of memory is about 1.5 times the checkpoint's size
    (measured: 0.45 GB of float32; 1.1 times when cast to bfloat16).

    Args:
        path: The directory.
        dtype: For the floating-point arrays; None keeps what was saved.
        sharding: Where each array goes, by name and shape; None is the first device. It need not be where it was
            saved from.

    Raises:
        CheckpointError: Files are missing, changed or unknown to the manifest: all are listed. Or arrays have 64 bits
            an element, which are not enabled.
    """
    return open_config(path), read(path, dtype=dtype, sharding=sharding)


def open_config(path: Path) -> dict[str, Any]:
    """The config of a directory that `save` wrote, once every file is what was saved; raises as `load` does."""
    path = path.absolute()
    _verify(path)
    return json.loads((path / CONFIG).read_text("utf-8"))


def read(path: Path, *, dtype: DTypeLike | None = None, sharding: Placement | None = None) -> dict[str, jax.Array]:
    """The arrays of a directory that `open_config` found intact; for the arguments and errors see `load`."""
    import orbax.checkpoint.experimental.v1 as ocp

    path = path.absolute()
    if not (path / PARAMS).is_dir():  # the manifest holds: there never were any
        return {}
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def target(name: str, saved: Any) -> jax.ShapeDtypeStruct:
        cast = dtype is not None and jnp.issubdtype(saved.dtype, jnp.floating)
        where = first if sharding is None else sharding(name, saved.shape)
        return jax.ShapeDtypeStruct(saved.shape, dtype if cast else saved.dtype, sharding=where)

    # Shapes and dtypes come from the files: the sharding they were saved with may not exist on this machine.
    saved: Any = ocp.metadata(str(path / PARAMS)).metadata
    wanted = {name: target(name, array) for name, array in saved.items()}
    params: Any = ocp.load(str(path / PARAMS), wanted)
    if cut := [name for name, array in params.items() if array.dtype != wanted[name].dtype]:
        raise CheckpointError(
            f"{path} holds {cut[0]} in {wanted[cut[0]].dtype}, which was read as {params[cut[0]].dtype}; set "
            "jax_enable_x64 for the whole process (JAX_ENABLE_X64=1)"
        )
    return params


def _verify(path: Path) -> None:
    """Compares every file with the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        version, expected = manifest["version"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / MANIFEST} cannot be read ({type(error).__name__}: {error}): nothing else says that "
            "the files are intact; write it again"
        ) from error
    if version != _VERSION:
        raise CheckpointError(f"{path / MANIFEST} has version {version!r}, known here: {_VERSION}; write it again")
    found = _inventory(path)
    complaints = [
        *(f"missing: {name}" for name in sorted(expected.keys() - found.keys())),
        *(f"not in the manifest: {name}" for name in sorted(found.keys() - expected.keys())),
        *(f"changed: {name}" for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]),
    ]
    if complaints:
        listing = "\n  ".join(complaints)
        raise CheckpointError(
            f"{path} is not what was saved:\n  {listing}\nRemove what does not belong there, else copy or "
            "write it again"
        )


def _inventory(root: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and sha256 of every file under `root`, by relative path, the manifest left out."""
    files = (file for file in sorted(root.rglob("*")) if not file.is_dir() and file != root / MANIFEST)
    return {file.relative_to(root).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)} for file in files}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
