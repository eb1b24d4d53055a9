"""The whole flow as a table, with the numbers of one run: what each phase did to the page table and to the pool.

    phase        operation                       page table           block pool
    Prefill      37 tokens fed in 2 steps        5 pages written      - 5
    Decode       24 tokens fed in 8 steps        3 pages appended     - 3
    Fork         2 rows forked, 1 copy           6 cells shared       - 1
    Speculative  16 tokens guessed, 9 held       2 pages cut off      - 4  + 2
    Evict        4 pages let go in 3 steps       cells emptied        + 4
    Free         3 rows ended                    emptied              + 7

What leaves the pool and what returns to it adds up, over the phases, to what the allocator counted.
"""

import dataclasses

import numpy as np

from paxattn.viz.picture import Picture, box, label, legend, many
from paxattn.viz.recording import Moves, Phase, Recording


@dataclasses.dataclass(frozen=True)
class Row:
    """One phase of a run."""

    phase: str
    operation: str
    pages: str
    taken: int  # blocks that left the pool
    returned: int = 0


def phases(film: Recording) -> list[Row]:
    """The phases that happened, each with what it did; the sums of `taken` and `returned` are the run's."""
    moves = film.moves

    def total(name: str) -> int:
        return sum(int(np.sum(getattr(move, name))) for move in moves)

    def steps(phase: Phase) -> str:
        return many(sum(bool((move.phase == phase).any()) for move in moves), "step")

    fed, taken = ([sum(part) for part in zip(*map(of, moves), strict=True)] for of in (_fed, _taken))
    copies, dropped, back, evicted, preempted = map(total, ("copies", "dropped", "rolled_back", "evicted", "preempted"))
    died = dropped if total("joined") and not preempted else 0  # beams; a service has none
    lost = dropped if preempted else 0
    given_back = total("freed") - back - died - lost - evicted
    letting_go = sum(move.holes > 0 for move in moves)
    guess = f"{total('guessed')} tokens guessed, " if total("guessed") else ""
    rows = [
        Row("Prefill", f"{fed[0]} tokens fed in {steps(Phase.PREFILL)}", f"{many(taken[0], 'page')} written", taken[0]),
        Row("Decode", f"{fed[1]} tokens fed in {steps(Phase.DECODE)}", f"{many(taken[1], 'page')} appended", taken[1]),
        Row(
            "Fork",
            f"{many(total('joined'), 'row')} forked, {copies} copied on write",
            f"{many(total('shared_cells'), 'cell')} shared, {copies} replaced",
            copies,
            died,
        ),
        Row(
            "Speculative" if guess else "Roll back",
            f"{guess}{total('rejected')} rolled back",
            f"{many(taken[2], 'page')} appended, {back} cut off",
            taken[2],
            back,
        ),
        Row(
            "Evict",
            f"{many(total('holes'), 'page')} let go in {many(letting_go, 'step')}",
            "cells emptied, rows go on",
            0,
            evicted,
        ),
        Row("Preempt", f"{many(preempted, 'request')} sent back to wait", "rows emptied", 0, lost),
        Row("Free", f"{many(total('ended'), 'row')} ended", "rows emptied", 0, given_back),
    ]
    happened = (
        fed[0],
        fed[1],
        total("joined") + copies,
        total("guessed") + total("rejected"),
        letting_go,
        preempted,
        total("ended") + given_back,
    )
    return [row for row, once in zip(rows, happened, strict=True) if once]


def _fed(move: Moves) -> tuple[int, int, int]:
    """Tokens fed in prefill, decode and speculation: a decoding row feeds one, a guessing row one and its guess."""
    decode, guessing = (int((move.phase == phase).sum()) for phase in (Phase.DECODE, Phase.SPECULATIVE))
    guess = guessing + move.guessed
    if not (move.phase == Phase.PREFILL).any():
        return 0, move.fed - guess, guess
    return move.fed - decode - guess, decode, guess


def _taken(move: Moves) -> tuple[int, int, int]:
    """Blocks taken in prefill, decode and speculation, copies left out."""
    taken = move.allocated - move.copies
    if (move.phase == Phase.SPECULATIVE).any():  # no prompt is fed while a row guesses
        return 0, 0, taken
    prefill = min(move.prefilled, taken) if (move.phase == Phase.DECODE).any() else taken
    prefill = prefill if (move.phase == Phase.PREFILL).any() else 0
    return prefill, taken - prefill, 0


def flow(film: Recording) -> Picture:
    """Draws the table of a recording."""
    rows = phases(film)
    cells = [(row.phase, row.operation, row.pages, _signed(row)) for row in rows]
    head = ("Phase", "Operation", "Page table", "Block pool")
    left = (0, 96, 336, 548)
    body = ["".join(f'<g font-weight="700">{label(x, 16, words)}</g>' for x, words in zip(left, head, strict=True))]
    most = max([row.taken for row in rows] + [row.returned for row in rows] + [1])
    for i, (row, line) in enumerate(zip(rows, cells, strict=True)):
        y = 44 + 26 * i
        body.append(f'<path d="M0 {y - 18}h730" stroke="currentColor" stroke-opacity=".25"/>')
        body += [label(x, y, words) for x, words in zip(left, line, strict=True)]
        for k, (count, fill) in enumerate(((row.taken, "#f58518"), (row.returned, "#54a24b"))):
            hover = f"{count} blocks {('taken', 'returned')[k]}"
            body.append(box(632, y - 10 + 6 * k, 96 * count / most, 5, fill, hover) if count else "")
    bottom = 44 + 26 * len(rows)
    key = [("#f58518", "", "taken from the pool"), ("#54a24b", "", "returned to it")]
    body.append(legend(0, bottom + 6, key))
    title = "The whole flow: " + "; ".join(f"{row.phase}: {row.operation}" for row in rows)
    return Picture(title, 740, bottom + 18, "".join(body), _text([head, *cells]))


def _text(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "-+-".join("-" * width for width in widths)
    drawn = [" | ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([drawn[0], rule, *drawn[1:]])


def _signed(row: Row) -> str:
    return "  ".join(sign + str(count) for sign, count in (("-", row.taken), ("+", row.returned)) if count) or "0"
