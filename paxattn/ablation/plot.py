"""An ablation as a picture: a panel for each figure, the first swept field along the bottom, a line for each other.

Needs matplotlib, which is not installed with paxattn: the extra `notebooks` brings it.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paxattn.ablation.cases import swept

PANELS = {  # what is drawn where rows have it, in this order
    "wasted": ("memory wasted", "%"),
    "saving": ("blocks saved by sharing", "%"),
    "requests_at_once": ("requests at once", ""),
    "preemptions": ("preemptions", ""),
    "decode_tokens_per_s": ("decode", "tokens/s"),
    "prefill_tokens_per_s": ("prefill", "tokens/s"),
    "kernel_us": ("attention kernel", "µs a call"),
    "compile_s": ("compilation", "s"),
    "peak_bytes": ("memory of the program", "GB"),
    "table_bytes": ("page table", "kB"),
}
SCALE = {"wasted": 100, "saving": 100, "peak_bytes": 1e-9, "table_bytes": 1e-3}
INK = "#808080"  # readable on white and on black
SUFFIXES = (".svg", ".png", ".pdf")


def check(rows: Sequence[dict[str, Any]], path: str | Path | None = None, *, by: Sequence[str] = ()) -> list[str]:
    """The fields that a plot of these rows tells apart; refuses what `plot` cannot draw or write.

    Rows need no figures yet: ask before they are measured.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'a plot needs matplotlib: pip install "paxattn[notebooks]", or pip install matplotlib.'
        ) from error
    if not rows or not (fields := list(by) or swept(rows)):
        raise ValueError("a plot needs rows in which some field has two values.")
    if unknown := [name for name in fields if any(name not in row for row in rows)]:
        raise ValueError(f"not every row has a field {unknown[0]!r}; choose of {', '.join(rows[0])}.")
    if path is not None:
        path = Path(path)
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path}: the name of a plot must end in {', '.join(SUFFIXES)}.")
        folder = next(each for each in path.absolute().parents if each.exists())
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{path} cannot be written; give a plot another place.")
    return fields


def plot(
    rows: Sequence[dict[str, Any]],
    path: str | Path | None = None,
    *,
    by: Sequence[str] = (),
    panels: Sequence[str] = tuple(PANELS),
):
    """Draws rows of `ablate`; gives the matplotlib figure, and writes it where a path is given (.svg, .png, .pdf).

    Args:
      rows: of one sweep; at least one field must have two values.
      path: where to write it, the background transparent.
      by: the field along the bottom, then those that each have a line a value; by default what was swept.
      panels: figures to draw; those that no row has, or that are zero everywhere, are left out.

    Raises:
      ValueError: nothing to draw, unknown fields or panels, or a path that cannot be written.
      ImportError: there is no matplotlib.
    """
    x, *others = check(rows, path, by=by)
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    if unknown := [name for name in panels if name not in PANELS]:
        raise ValueError(f"panel {unknown[0]!r} is unknown; there are {', '.join(PANELS)}.")
    shown = [name for name in panels if any(row.get(name) for row in rows)]
    if not shown:
        raise ValueError(f"no row has more than zero of {', '.join(panels) or 'no panel'}; choose other panels.")
    places = list(dict.fromkeys(row[x] for row in rows))
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * lines), layout="constrained")
    for axes, name in zip(figure.subplots(lines, columns, squeeze=False).flat, shown + [None] * columns, strict=False):
        if name is None:
            axes.set_visible(False)
            continue
        title, unit = PANELS[name]
        for series in dict.fromkeys(tuple(row[other] for other in others) for row in rows):
            chosen = [r for r in rows if tuple(r[o] for o in others) == series and r.get(name) is not None]
            label = ", ".join(f"{other} {value}" for other, value in zip(others, series, strict=True))
            where = [places.index(row[x]) for row in chosen]
            axes.plot(where, [row[name] * SCALE.get(name, 1) for row in chosen], "o-", markersize=4, label=label)
        axes.set_title(f"{title}, {unit}" if unit else title, fontsize=10, color=INK)
        axes.set_xlabel(x.replace("_", " "), color=INK)
        axes.set_xticks(range(len(places)), [str(place) for place in places])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.tick_params(colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(INK)
        axes.patch.set_alpha(0)
    if others:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", labelcolor=INK,
                      frameon=False, ncols=3)  # fmt: skip
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "paxattn"}):  # text as text, the same file each time
            metadata = {"Date": None} if Path(path).suffix.lower() == ".svg" else None
            figure.savefig(path, transparent=True, dpi=120, metadata=metadata)
    return figure
