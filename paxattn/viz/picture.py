"""A picture: SVG for notebooks, documents and files, and the same in characters for a terminal.

    picture = page_map(table)
    picture                      drawn in a notebook: one <svg>, no script, nothing from the network
    print(picture)               the text version
    picture.save("map.svg")      a file that follows the reader's light or dark theme

Ink is `currentColor`, so a drawing inside a page takes the page's own; fills are middle tones that show on both.
"""

import dataclasses
import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

HUES = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#72b7b2", "#d6a520", "#9d755d", "#e377a2", "#7f8fd0")
"""Fills of rows, in order, round and round."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
"""Names of rows, in order, round and round."""

_FONT = "ui-sans-serif,system-ui,-apple-system,Segoe UI,Helvetica,Arial,DejaVu Sans,sans-serif"
_THEME = "svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}"


@dataclasses.dataclass(frozen=True, repr=False)
class Picture:
    """A drawing and its text version. `title` says in a sentence what there is to see."""

    title: str
    width: int
    height: int
    body: str  # SVG elements
    text: str

    def __repr__(self) -> str:
        return self.text

    __str__ = __repr__

    def svg(self, style: str = "") -> str:
        """The drawing as one SVG element."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'role="img" aria-label="{escape(self.title)}" style="max-width:100%;height:auto" font-family="{_FONT}" '
            f'font-size="12" fill="currentColor">{style}{self.body}</svg>'
        )

    def _repr_html_(self) -> str:
        return self.svg()

    def save(self, path: str | os.PathLike) -> None:
        """Writes an SVG file."""
        Path(path).write_text(self.svg(f"<style>{_THEME}</style>") + "\n", encoding="utf-8")


def label(x: float, y: float, words: object, *, anchor: str = "start", size: int = 12, faint: bool = False) -> str:
    """A line of text whose base line is y."""
    more = (f' text-anchor="{anchor}"' if anchor != "start" else "") + (f' font-size="{size}"' if size != 12 else "")
    more += ' fill-opacity=".65"' if faint else ""
    return f'<text x="{x:g}" y="{y:g}"{more}>{escape(str(words))}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, hover: str = "", more: str = "") -> str:
    """A rectangle, with words for a pointer that rests on it."""
    inner = f"><title>{escape(hover)}</title></rect>" if hover else "/>"
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{more}{inner}'


def legend(x: float, y: float, entries: Iterable[tuple[str, str, str]]) -> str:
    """Marks and what they mean, from left to right: (fill, character or "" for a square, words)."""
    parts = []
    for fill, mark, words in entries:
        square = box(x, y - 10, 11, 11, fill)
        parts.append(square if not mark else f'<text x="{x:g}" y="{y:g}" fill="{fill}">{mark}</text>')
        parts.append(label(x + 16, y, words))
        x += 40 + 6.4 * len(words)
    return "".join(parts)


def hue(row: int) -> str:
    """The fill of a row."""
    return HUES[row % len(HUES)]


def letter(row: int) -> str:
    """The name of a row."""
    return LETTERS[row % len(LETTERS)]


def many(count: int, noun: str) -> str:
    """A count and what is counted."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
