"""The notebooks run, say today what their kept outputs say, begin with a question and end with a figure.

Their cells run here one after another in one namespace each, as a kernel would run them, without the kernel: all
seven share this process and its compiled programs. `make notebooks` runs them in kernels and keeps what they show.
"""

import ast
import contextlib
import io
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[dict]:
    """The cells of one kind."""
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def execute(source: str, names: dict) -> tuple[str, str]:
    """Runs a cell; what it printed, and the drawing of its last expression if that is a picture."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "cell", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return printed.getvalue(), value._repr_html_() if hasattr(value, "_repr_html_") else ""


def kept(cell: dict) -> tuple[str, str]:
    """What a cell printed and drew when it was last run in a kernel."""
    texts, drawings = [], []
    for output in cell["outputs"]:
        assert output["output_type"] != "error", output
        assert output.get("name") != "stderr", "".join(output["text"])
        texts += output.get("text", [])
        drawings += output.get("data", {}).get("text/html", [])
    return "".join(texts), "".join(drawings)


def test_there_are_seven():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_says_what_was_kept(path, monkeypatch):
    """Cells marked `varies` depend on files that come and go: they must run, whatever they say."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(path.parent)
    names: dict = {"__name__": "__main__"}
    for cell in cells(path, "code"):
        said = execute("".join(cell["source"]), names)
        if "varies" not in cell["metadata"].get("tags", []):
            assert said == kept(cell), "".join(cell["source"])
    if "plt" in names:
        names["plt"].close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_begins_with_a_question_and_ends_with_a_figure(path):
    title = "".join(cells(path, "markdown")[0]["source"]).splitlines()[0]
    assert title.startswith(f"# {path.stem[:2]} · ")
    assert title.endswith("?")
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run from the top"
    shown = [kind for output in code[-1]["outputs"] for kind in output.get("data", {})]
    assert {"text/html", "image/png"} & set(shown)
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("option", ["soft_cap", "sliding_window"])
def test_the_kernel_of_the_sixth_raises_on_what_it_does_not_do(option):
    """What is asked for by name runs or raises, in an example too."""
    (source,) = [s for cell in cells(NOTEBOOKS[5], "code") if "def gather_all" in (s := "".join(cell["source"]))]
    names: dict = {}
    exec(ast.unparse(ast.parse(source).body[0]), names)
    with pytest.raises(NotImplementedError, match=rf"no {option} \(4\)"):
        names["gather_all"](*[None] * 6, scale=1.0, **{option: 4})
