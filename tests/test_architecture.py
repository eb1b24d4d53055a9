"""The shape of the house, kept by reading the source: who imports whom, and how long a module may grow.

    pallas_kernels  <-  paxattn  <-  models  <-  benchmarks, notebooks, tests
    (arrays only)       (state)      (network, files, CLI)

Each rule is a function from (path, source) to complaints, tried on sources that break it and then on ours.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "paxattn", "models")
OUTSIDE = ("benchmarks", "notebooks", "tests")
MAX_LINES = 350

FORBIDDEN = {
    "pallas_kernels": {"paxattn", "models", *OUTSIDE, "flax", "transformers", "orbax"},
    "paxattn": {"models", *OUTSIDE, "flax", "transformers", "orbax"},
    "models": set(OUTSIDE),
}


def imported(source: str) -> set[str]:
    """Top-level names of all absolute imports in `source`, wherever in the module they stand."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom(level=0, module=str(module)):
                names.add(module)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                names.add(name)
    return {name.split(".")[0] for name in names}


def direction(path: Path, source: str) -> list[str]:
    """An import against the direction of the packages."""
    package = path.parts[0]
    wrong = imported(source) & FORBIDDEN.get(package, set())
    return [f"{path}: {package} must not import {name}" for name in sorted(wrong)]


def torchless(path: Path, source: str) -> list[str]:
    """PyTorch is a peer to measure against, never a dependency."""
    return (
        [f"{path}: torch belongs in benchmarks/"]
        if "torch" in imported(source) and path.parts[0] != "benchmarks"
        else []
    )


def live_annotations(path: Path, source: str) -> list[str]:
    """Annotations stay objects: as strings, jaxtyping's letters would bind nothing."""
    future = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.module == "__future__")
    found = any(alias.name == "annotations" for node in future for alias in node.names)
    return [f"{path}: no `from __future__ import annotations`"] if found else []


def docstring(path: Path, source: str) -> list[str]:
    """Every module says first what it is for."""
    return [] if (ast.get_docstring(ast.parse(source)) or "").strip() else [f"{path}: opens without a docstring"]


def short(path: Path, source: str) -> list[str]:
    """A module of the three packages is read in one sitting."""
    lines = len(source.splitlines())
    long = path.parts[0] in PACKAGES and lines > MAX_LINES
    return [f"{path}: {lines} lines, at most {MAX_LINES}"] if long else []


RULES = (direction, torchless, live_annotations, docstring, short)
SOURCES = sorted(p for folder in (*PACKAGES, *OUTSIDE) for p in (ROOT / folder).rglob("*.py"))

OK = '"""A module."""\n'
BROKEN = [
    (direction, "pallas_kernels/a.py", OK + "import paxattn"),
    (direction, "pallas_kernels/a.py", OK + "from models.llama import Llama"),
    (direction, "pallas_kernels/deep/a.py", OK + "import paxattn.cache as c"),
    (direction, "pallas_kernels/a.py", OK + "import flax"),
    (direction, "paxattn/a.py", OK + "def f():\n    from models import load\n"),
    (direction, "paxattn/a.py", OK + "import importlib\nimportlib.import_module('models.llama')\n"),
    (direction, "paxattn/a.py", OK + "from flax import nnx"),
    (direction, "paxattn/a.py", OK + "import transformers"),
    (direction, "paxattn/a.py", OK + "import orbax.checkpoint as ocp"),
    (direction, "models/a.py", OK + "from tests.mutants import MUTANTS"),
    (torchless, "models/a.py", OK + "import torch"),
    (torchless, "tests/test_a.py", OK + "from torch.nn import Linear"),
    (live_annotations, "tests/test_a.py", OK + "from __future__ import annotations"),
    (live_annotations, "paxattn/a.py", OK + "from __future__ import division, annotations"),
    (docstring, "paxattn/a.py", "import jax"),
    (docstring, "paxattn/__init__.py", ""),
    (docstring, "paxattn/a.py", '"""  """\n'),
    (short, "models/a.py", OK * (MAX_LINES + 1)),
]
ALLOWED = [
    ("paxattn/a.py", OK + "import jax\nimport pallas_kernels\nfrom .models import x\nfrom . import models"),
    ("models/a.py", OK + "import flax, transformers, orbax, paxattn, pallas_kernels"),
    ("benchmarks/a.py", OK * MAX_LINES * 2 + "import torch, models, paxattn"),
    ("models/a.py", OK * MAX_LINES),
    ("tests/test_a.py", OK + "from __future__ import division\nimport models, torchvision"),
]


@pytest.mark.parametrize(("rule", "path", "source"), BROKEN)
def test_each_rule_can_fail(rule, path, source):
    assert rule(Path(path), source)
    assert [r for r in RULES if r(Path(path), source)] == [rule]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_rules_allow_what_they_should(path, source):
    assert [c for rule in RULES for c in rule(Path(path), source)] == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    complaints = [c for p in SOURCES for c in rule(p.relative_to(ROOT), p.read_text("utf-8"))]
    assert not complaints, "\n".join(complaints)


def test_every_package_was_read():
    assert {p.relative_to(ROOT).parts[0] for p in SOURCES} >= {*PACKAGES, "tests"}
