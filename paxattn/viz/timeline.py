"""The timeline of a run: how full the pool was, what each row did, and where rows forked, rolled back or had to go.

blocks   ___/~~~\\__/~~~~~~~\\___      in use, of these shared
row A    ppdddddddddddd|               p prompt, d decode, s speculative
row B    ....F ddddssR s|              F forked, C copied, R rolled back, X preempted, | ended
"""

import itertools

import numpy as np

from paxattn.viz.picture import Picture, box, label, legend, letter
from paxattn.viz.recording import Moves, Phase, Recording

_FILL = {Phase.PREFILL: "#f58518", Phase.DECODE: "#4c78a8", Phase.SPECULATIVE: "#54a24b"}
_EVENTS = (("joined", "F", "forked"), ("copied", "C", "copied on write"), ("rejected", "R", "rolled back"),
           ("preempted", "X", "preempted"), ("ended", "|", "ended"))  # fmt: skip
_LEFT, _WIDE, _HIGH, _LANE = 56, 640, 110, 18
_LETTER = 9
"""Pixels that the letter of an event takes; where steps are narrower a line marks it."""
_ROWS = 24
"""Rows that get a lane; of more, the first ones."""


def timeline(film: Recording) -> Picture:
    """Draws a recording, a column between each two frames. Best seen with one step a frame.

    Raises:
      ValueError: fewer than two frames: nothing happened yet.
    """
    moves = film.moves
    if not moves:
        raise ValueError(f"the recording has {len(film.frames)} frames; see at least two states.")
    pool = film.frames[0].refcount.size - 1
    used = [frame.used for frame in film.frames]
    shared = [frame.shared for frame in film.frames]
    rows = [b for b in range(moves[0].phase.size) if any(m.phase[b] or m.joined[b] for m in moves)][:_ROWS]
    step = _WIDE / len(moves)
    top = 24 + _HIGH + 14
    head = f"{len(moves)} steps, at most {max(used)} of {pool} blocks in use after a step"
    areas = [("#7f8fd0", "", "in use"), *([("#b279a2", "", "shared")] if max(shared) else [])]
    body = [label(0, 12, head), legend(_LEFT + _WIDE - 160, 12, areas)]
    body += [_occupancy(used, shared, pool, step)]
    body += [_lane(row, moves, top + i * _LANE, step) for i, row in enumerate(rows)]
    bottom = top + len(rows) * _LANE + 4
    body += [_axis(len(moves), step, bottom)]
    phases = {p: any((m.phase == p).any() for m in moves) for p in _FILL}
    happened = [(mark, words) for name, mark, words in _EVENTS if any(getattr(m, name).any() for m in moves)]
    key = [(_FILL[p], "", p.name.lower()) for p in _FILL if phases[p]]
    body += [legend(_LEFT, bottom + 36, [*key, *(("currentColor", mark, words) for mark, words in happened)])]
    title = f"Timeline of {len(moves)} steps: blocks in use, and what each of {len(rows)} rows did."
    text = _text(head, used, pool, moves, rows, happened)
    return Picture(title, _LEFT + _WIDE + 52, bottom + 46, "".join(body), text)


def _occupancy(used: list[int], shared: list[int], pool: int, step: float) -> str:
    """Blocks in use and, of these, shared, as areas under the size of the pool."""
    high = max(max(used), 1) * 1.1
    high = pool if pool < 1.6 * high else high

    def area(values: list[int], fill: str) -> str:
        points = [(_LEFT + i * step, 24 + _HIGH * (1 - value / high)) for i, value in enumerate(values)]
        path = f"M{_LEFT} {24 + _HIGH}" + "".join(f"L{x:.1f} {y:.1f}" for x, y in points) + f"V{24 + _HIGH}z"
        return f'<path d="{path}" fill="{fill}"/>'

    lines = []
    for value, words in {0: "0", max(used): max(used), pool: pool}.items():
        if value <= high:
            y = 24 + _HIGH * (1 - value / high)
            dash = ' stroke-dasharray="4 3"' if value == pool else ""
            lines.append(f'<path d="M{_LEFT} {y:.1f}h{_WIDE}" stroke="currentColor" stroke-opacity=".35"{dash}/>')
            lines.append(label(_LEFT - 6, y + 4, words, anchor="end", size=11))
    return area(used, "#7f8fd0") + area(shared, "#b279a2") + "".join(lines)


def _lane(row: int, moves: list[Moves], top: float, step: float) -> str:
    """One row: a bar for each run of steps in one phase, and a letter for each event."""
    parts = [label(_LEFT - 6, top + 13, f"row {letter(row)}", anchor="end", size=11)]
    phases = [Phase(m.phase[row]) for m in moves]
    edges = [0, *(t for t in range(1, len(phases)) if phases[t] != phases[t - 1]), len(phases)]
    for start, end in itertools.pairwise(edges):
        if (phase := phases[start]) != Phase.IDLE:
            hover = f"row {letter(row)}: {phase.name.lower()}, steps {start + 1} to {end}"
            parts.append(box(_LEFT + start * step, top + 2, (end - start) * step, _LANE - 5, _FILL[phase], hover))
    room = 0.0
    for t, move in enumerate(moves):
        for name, mark, words in _EVENTS:
            if getattr(move, name)[row]:
                x = _LEFT + (t + (1.0 if mark == "|" else 0.5)) * step
                parts.append(box(x - 1, top + 1, 2, _LANE - 3, "currentColor", f"step {t + 1}: {words}"
                                 ) if step < _LETTER or mark == "|" else "")  # fmt: skip
                if mark != "|" and x >= room:
                    parts.append(_bold(x, top + 13, mark, f"step {t + 1}: {words}"))
                    room = x + _LETTER
    return "".join(parts)


def _bold(x: float, y: float, mark: str, hover: str) -> str:
    return f'<g font-weight="700"><title>{hover}</title>{label(x, y, mark, anchor="middle", size=11)}</g>'


def _axis(steps: int, step: float, y: float) -> str:
    power = 10 ** (len(str(steps)) - 1)
    every = max(1, power if steps >= 5 * power else power // 2)
    ticks = [
        label(_LEFT + t * step, y + 14, t, anchor="middle", size=11, faint=True) for t in range(0, steps + 1, every)
    ]
    return "".join(ticks) + label(_LEFT + _WIDE + 18, y + 14, "steps", size=11, faint=True)


def _text(head: str, used: list[int], pool: int, moves: list[Moves], rows: list[int], happened: list) -> str:
    """A character a step: the pool in eighths, and each row's phase or event."""
    levels = " ▁▂▃▄▅▆▇█"
    bars = "".join(levels[min(8, -(-8 * value // max(pool, 1)))] for value in used[1:])
    lines = [head, f"  blocks |{bars}|"]
    for row in rows:
        marks = []
        for move in moves:
            events = [mark for name, mark, _ in _EVENTS if np.any(getattr(move, name)[row])]
            marks.append(events[-1] if events else ".pds"[move.phase[row]])
        lines.append(f"  row {letter(row)}  |{''.join(marks)}|")
    legend = ["p prompt", "d decode", *(["s speculative"] if any((m.phase == 3).any() for m in moves) else [])]
    return "\n".join([*lines, "  " + ", ".join([*legend, *(f"{mark} {words}" for mark, words in happened)])])
