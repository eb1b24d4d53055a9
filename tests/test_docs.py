"""The documents tell the truth: links lead somewhere, targets exist, commands and Python of the README run.

A command of the README is of a known kind or the test fails: nothing stands there unchecked by accident.
`make X` must be a target (running it is the business of that target), `paxattn ...` and the Python blocks, as
one program, are run, and so are those of each how-to; commands that fetch or install are left alone.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from models.cli import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
README = (ROOT / "README.md").read_text("utf-8")
LEFT_ALONE = {"make", "git", "pip", "uv", "cd"}


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks of `text` marked with one of `languages`."""
    return [body for mark, body in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S) if mark in languages]


def commands(text: str) -> list[list[str]]:
    """The shell commands of `text` as words: continuations joined, comments and prompts dropped."""
    lines = "\n".join(blocks(text, "bash", "sh", "shell", "console")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def links(text: str) -> list[str]:
    """Link and image targets of `text` outside code."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)[^)]*\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)


def anchors(text: str) -> set[str]:
    """Names that GitHub gives to the headings of `text`."""
    titles = re.findall(r"^#+ +(.+?)\s*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(document: Path, text: str) -> list[str]:
    """Links of `text`, standing in `document`, that lead to no file or no heading of this checkout."""
    bad = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists():
            bad.append(f"{document.name}: {link} does not exist")
        elif target.is_dir():
            bad.append(f"{document.name}: {link} is a folder, which the site has no page for")
        elif anchor and target.suffix == ".md":
            page = text if target == document else target.read_text("utf-8")
            bad += [] if anchor in anchors(page) else [f"{document.name}: {link}: no such heading"]
    return bad


def targets() -> set[str]:
    """Targets that `make help` lists."""
    return set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.M))


def run(*command: str) -> None:
    """Run `command` as a reader would; its output is shown when it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_readers_of_markdown():
    text = "# A b: c\n[x](gone.md) `[y](no)`\n![z](#a-b-c) [w](#nope) [v](docs)\n"
    text += "```bash\n$ make 'a d' \\\n  b # c\n[q](no)\n```\n"
    assert links(text) == ["gone.md", "#a-b-c", "#nope", "docs"]
    assert commands(text)[0] == ["make", "a d", "b"]
    assert broken(ROOT / "README.md", text) == [
        "README.md: gone.md does not exist",
        "README.md: #nope: no such heading",
        "README.md: docs is a folder, which the site has no page for",
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    assert broken(document, document.read_text("utf-8")) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_targets_exist(document):
    for program, *words in commands(document.read_text("utf-8")):
        wanted = {word for word in words if re.fullmatch("[a-z]+", word)} if program == "make" else set()
        assert wanted <= targets(), f"make {' '.join(words)}"


def test_commands_of_the_readme_run(capsys):
    """In this process, which compiles each program once; the command itself is there."""
    run(str(Path(sys.executable).with_name("paxattn")), "--version")
    for program, *words in commands(README):
        assert program in LEFT_ALONE | {"paxattn"}, f"neither run here nor known to be left alone: {program}"
        if program == "paxattn":
            assert main(words) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err[-4000:]}"


def test_python_of_the_readme_runs():
    if program := "\n".join(blocks(README, "python")):
        run(sys.executable, "-c", program)


def test_the_drafter_of_the_architecture_guesses_and_changes_no_token():
    from tests.paxattn.test_speculative import VOCAB, check, started

    (code,) = blocks((ROOT / "docs" / "architecture.md").read_text("utf-8"), "python")
    names = {}
    exec(code, names)
    state = check(names["Habit"](VOCAB), started(block_size=3), 5)
    assert int(state.tally.drafted.sum()) > int(state.tally.accepted.sum()) > 0


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "howto").glob("*.md")), ids=lambda p: p.stem)
def test_python_of_a_howto_runs(page):
    exec("\n".join(blocks(page.read_text("utf-8"), "python")), {"__name__": "__main__"})


def test_flags_that_the_documents_set_are_known():
    """XLA ends a process that sets one it does not know."""
    texts = [page.read_text("utf-8") for page in DOCUMENTS]
    flags = [value for text in texts for value in re.findall(r"^export XLA_FLAGS=(.*)$", text, re.M)]
    assert len(flags) >= 2
    for value in flags:
        run("env", f"XLA_FLAGS={value.strip('"')}", sys.executable, "-c", "import jax; jax.devices()")
