"""The page map: who owns which block of the pool, and which blocks make up each row.

    pool    |.AAAB CC*A....|               one place a block, in the order of their ids
    rows    A: [ 1 | 2 | 3 | 8 ]           the page table, a row a line
            B: [ 4 :   :   : 5 ]           pages that were evicted are holes: an outline, nothing in it

A shared block shows the colours of its first and last holder; a pointer that rests on a block reads its count.
"""

import itertools

import numpy as np

from paxattn.blocks import NULL
from paxattn.decoding.eviction import holes as holes_of
from paxattn.pages import PageTable
from paxattn.viz.picture import Picture, box, hue, label, legend, letter, many

_SIZES = ((128, 32, 20), (640, 48, 14), (2560, 64, 11))
"""Up to so many blocks: so many a line, each of so many pixels; beyond that 100 of 7."""
_ACROSS = 760
_ROWS, _PAGES = 16, 20
"""Rows that are drawn one by one, and pages of a row up to which the blocks are named."""


def page_map(table: PageTable, *, width: int = 64) -> Picture:
    """The pool block by block, and what each row holds. Runs on the host.

    Args:
      table: any page table.
      width: blocks a line of the text version.
    """
    pages, refcount = np.asarray(table.pages), np.asarray(table.blocks.refcount)
    length, holes = np.asarray(table.length), np.asarray(holes_of(table))
    used, shared = int(np.sum(refcount[1:] > 0)), int(np.sum(refcount > 1))
    head = f"{used} of {refcount.size - 1} blocks of {table.block_size} tokens in use"
    rows = [row for row in range(length.size) if length[row]]
    pool, bottom = _pool(pages, refcount)
    lanes, bottom = _lanes(pages, length, holes, rows, table.block_size, bottom + 22)
    key = [(hue(0), "", "a colour a row"), ("url(#shared)", "", "shared"), (_FAINT, "", "free")]
    key += [(_HOLE, "", "evicted")] if holes.any() else []
    body = f"{_SHARED}{label(0, 14, f'{head}, {shared} shared')}{pool}{lanes}{legend(0, bottom + 18, key)}"
    lines = [f"{head} (a letter a row, * shared, . free)", *_text_pool(pages, refcount, width)]
    lines += [_text_row(row, pages[row], length[row], holes[row], table.block_size) for row in rows]
    title = f"Page map: {head}, {shared} shared by several rows."
    return Picture(title, _ACROSS, bottom + 28, body, "\n".join(lines))


_FAINT = 'currentColor" fill-opacity=".13'
_PALE = ' fill-opacity=".3"'
_HOLE = 'none" stroke="currentColor" stroke-opacity=".6" stroke-dasharray="3 2'
_SHARED = (
    '<linearGradient id="shared" x2="1" y2="1"><stop offset=".5" stop-color="#4c78a8"/>'
    '<stop offset=".5" stop-color="#f58518"/></linearGradient>'
)


def _pool(pages: np.ndarray, refcount: np.ndarray) -> tuple[str, int]:
    """Every block in its place, those of a colour as one group; also where the drawing ends."""
    columns, cell = next(((c, px) for most, c, px in _SIZES if refcount.size <= most), (100, 7))
    left, top, side = 44, 24, cell - 1
    first, last = _holders(pages, refcount.size)
    groups: dict[str, list[str]] = {}
    corners: dict[str, list[str]] = {}
    free, marks = [], []
    for block, count in enumerate(refcount):
        x, y = left + block % columns * cell, top + block // columns * cell
        if block % (columns * max(1, 14 // cell)) == 0:
            marks.append(label(left - 6, y + side - 1, block, anchor="end", size=min(11, side + 2), faint=True))
        if block == NULL:
            cross = f'<path d="M{x} {y}l{side} {side}m0-{side}l-{side} {side}" stroke="currentColor"'
            marks.append(f'{cross} stroke-opacity=".5"><title>block 0: never handed out</title></path>')
        elif count == 0:
            free.append(f"M{x} {y}h{side}v{side}h-{side}z")
        else:
            who = letter(first[block]) + (f"..{letter(last[block])}" if count > 1 else "")
            shape = f'<path d="M{x} {y}h{side}v{side}h-{side}z"><title>{block}: {who}, refcount {count}</title></path>'
            groups.setdefault(hue(first[block]), []).append(shape)
            if first[block] != last[block]:
                corners.setdefault(hue(last[block]), []).append(f"M{x + side} {y}v{side}h-{side}z")
    blank = f'<path fill="{_FAINT}" d="{"".join(free)}"><title>free</title></path>' if free else ""
    drawn = "".join(f'<g fill="{fill}">{"".join(shapes)}</g>' for fill, shapes in groups.items())
    halves = (f'<path fill="{c}" d="{"".join(d)}" pointer-events="none"/>' for c, d in corners.items())
    return blank + drawn + "".join([*halves, *marks]), top + -(-refcount.size // columns) * cell


def _holders(pages: np.ndarray, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last row that holds each block; of no meaning where none does."""
    row = np.broadcast_to(np.arange(pages.shape[0])[:, None], pages.shape)
    first, last = np.full(num_blocks, pages.shape[0]), np.full(num_blocks, -1)
    np.minimum.at(first, pages, row)
    np.maximum.at(last, pages, row)
    return first, last


def _lanes(pages, length, holes, rows: list[int], block_size: int, top: int) -> tuple[str, int]:
    """A line for each row: its pages in order, the tail filled as far as it is; also where the drawing ends."""
    count = -(-length // block_size)
    widest = max(count[rows[:_ROWS]], default=1)
    step = 30 if widest <= _PAGES else (_ACROSS - (190 if holes.any() else 150)) / widest
    parts = []
    for row in rows[:_ROWS]:
        parts.append(label(38, top + 13, letter(row), anchor="end"))
        for start, end, hole in _runs(holes[row, : count[row]]):
            x, whole = 44 + start * step, (end - start) * step
            if hole:
                inset, hover = min(1.5, whole / 4), f"{many(end - start, 'page')} evicted"
                parts.append(box(x + inset, top + 1.5, whole - 2 * inset, 14, _HOLE, hover, ' pointer-events="all"'))
                continue
            full = (min(end, length[row] / block_size) - start) * step
            parts.append(box(x, top, whole, 17, hue(row), "" if step == 30 else many(end - start, "page"), _PALE))
            parts.append(box(x, top, full, 17, hue(row), more=' pointer-events="none"'))
        for page, block in enumerate(pages[row, : count[row]] if step == 30 else ()):
            x = 44 + page * step
            part = length[row] / block_size - page
            if not holes[row, page]:
                name = label(x + 15, top + 13, block, anchor="middle", size=11)
                parts.append(f'<g fill="{"#fff" if part > 0.6 else "currentColor"}">{name}</g>')
            parts.append(f'<path d="M{x + 30} {top}v17" stroke="currentColor" stroke-opacity=".6"/>')
        words = _tokens(length[row], holes[row], block_size)
        parts.append(label(44 + count[row] * step + 6, top + 13, words, size=11, faint=True))
        top += 22
    if rows[_ROWS:]:
        parts.append(label(44, top + 12, f"and {len(rows) - _ROWS} rows more", faint=True))
        top += 22
    return "".join(parts), top


def _runs(holes: np.ndarray) -> list[tuple[int, int, bool]]:
    """Pages of a row that are alike, from one to before another, and whether they are holes."""
    edges = [0, *(np.flatnonzero(holes[1:] != holes[:-1]) + 1).tolist(), holes.size]
    return [(start, end, bool(holes[start])) for start, end in itertools.pairwise(edges)]


def _tokens(length: int, holes: np.ndarray, block_size: int) -> str:
    """How long a row is, and how many of its tokens are held where pages were evicted."""
    held = length - int(holes.sum()) * block_size
    return f"{length} tokens" if held == length else f"{held} of {length} tokens"


def _text_pool(pages, refcount, width: int) -> list[str]:
    """A character a block."""
    cells = np.full(refcount.size, ".")
    for row, held in enumerate(pages):
        cells[held[held != NULL]] = letter(row)
    cells[refcount > 1] = "*"
    cells = cells[1:]  # NULL is nobody's
    return [f"  |{''.join(cells[at : at + width])}|" for at in range(0, cells.size, width)]


def _text_row(row: int, pages, length: int, holes, block_size: int) -> str:
    """The ids of a row's blocks, and how many pages were evicted between them."""
    runs = _runs(holes[: -(-length // block_size)])
    parts = [f"({end - start} evicted)" if hole else " ".join(map(str, pages[start:end])) for start, end, hole in runs]
    return f"  row {letter(row)}: {_tokens(length, holes, block_size):>12} in {' '.join(parts)}"
