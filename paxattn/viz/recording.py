"""A run as the host sees it: frames of its page table, and what happened between each two of them.

    film = Recording()
    state = film.see(start(...))            see: a frame is kept, its argument is returned
    state = film.see(advance(..., steps=1))

    frame t  --moves: who fed in which phase, forked, copied, was rolled back, evicted, preempted, ended-->  frame t + 1

Anything with a page table can be seen: a `PageTable`, a `Cache`, a batch, a beam search, a service. What happened is
derived from two frames and the run's own counters; nothing is recorded twice, and nothing on the device changes.
"""

import dataclasses
import enum
import itertools
from typing import Any

import numpy as np

from paxattn.blocks import NULL
from paxattn.cache import Cache
from paxattn.decoding.expand import Search
from paxattn.decoding.speculative import Speculation
from paxattn.decoding.step import State
from paxattn.pages import PageTable
from paxattn.serving.service import Service

COUNTERS = ("tokens_fed", "blocks_allocated", "blocks_freed", "blocks_copied")
TALLY = ("steps", "drafted", "accepted", "blocks_rolled_back")


class Phase(enum.IntEnum):
    """What a row does in a step."""

    IDLE = 0
    PREFILL = 1
    DECODE = 2
    SPECULATIVE = 3


@dataclasses.dataclass(frozen=True)
class Frame:
    """One moment on the host. Arrays of B rows, `refcount` of N blocks; counters where the run keeps them."""

    pages: np.ndarray
    length: np.ndarray
    refcount: np.ndarray
    block_size: int
    known: np.ndarray
    running: np.ndarray
    line: np.ndarray
    waiting: frozenset[int]  # lines that are neither on a row nor at their end
    counters: dict[str, int] | None
    tally: dict[str, np.ndarray] | None

    @property
    def used(self) -> int:
        """Blocks in use."""
        return int(np.sum(self.refcount > 0))

    @property
    def shared(self) -> int:
        """Blocks with several holders."""
        return int(np.sum(self.refcount > 1))

    @property
    def holes(self) -> np.ndarray:
        """Bool [B, P]: pages that a row has given back while it lives."""
        return (np.arange(self.pages.shape[1]) * self.block_size < self.length[:, None]) & (self.pages == NULL)


@dataclasses.dataclass(frozen=True)
class Moves:
    """What happened between two frames: one value a row, and sums over the step."""

    phase: np.ndarray  # a `Phase` a row
    joined: np.ndarray  # rows that came to share blocks of another: a fork
    copied: np.ndarray  # rows whose shared tail was copied before they wrote
    rejected: np.ndarray  # guessed tokens a row that were rolled back
    preempted: np.ndarray
    ended: np.ndarray
    fed: int
    allocated: int
    freed: int
    copies: int
    shared_cells: int  # page cells that point at a block which another cell points at too
    prefilled: int  # blocks that went to rows which were fed a prompt
    guessed: int
    rolled_back: int  # blocks that held nothing but rejected guesses
    holes: int  # pages that rows let go and went on
    evicted: int  # blocks that came back by it; one that others hold stays with them
    dropped: int  # blocks given back otherwise by rows that had not ended: beams that died, preempted requests


class Recording:
    """Frames in the order in which they were seen."""

    def __init__(self):
        self.frames: list[Frame] = []

    def see(self, state: Any) -> Any:
        """Keeps a frame of `state` and returns it."""
        self.frames.append(frame(state))
        return state

    @property
    def moves(self) -> list[Moves]:
        """What happened between each two frames."""
        return [between(old, new) for old, new in itertools.pairwise(self.frames)]


def frame(state: PageTable | Cache | State | Search | Service) -> Frame:
    """A state as the host sees it."""
    waiting = frozenset()
    if isinstance(state, Service):
        unseated = np.setdiff1d(np.arange(state.queue.size), np.asarray(state.line))
        waiting = frozenset(unseated[np.asarray(state.queue.unfinished)[unseated]].tolist())
        state = state.view()
    rows = state.rows if isinstance(state, Search) else state
    table = rows if isinstance(rows, PageTable) else (rows if isinstance(rows, Cache) else rows.cache).table
    pages, length, refcount = map(np.array, (table.pages, table.length, table.blocks.refcount))
    sizes = (pages, length, refcount, table.block_size)
    if not isinstance(rows, State):
        return Frame(*sizes, length, length > 0, np.arange(length.size), waiting, None, None)
    known, running, line = map(np.array, (rows.known, rows.running, rows.line))
    counters = {name: int(getattr(rows.stats, name)) for name in COUNTERS}
    tally = {k: np.array(getattr(rows.tally, k)) for k in TALLY} if isinstance(rows, Speculation) else None
    return Frame(*sizes, known, running, line, waiting, counters, tally)


def between(old: Frame, new: Frame) -> Moves:
    """What turned one frame into the next."""
    preempted = np.array([bool(on) and line in new.waiting for on, line in zip(old.running, old.line, strict=True)])
    lost = _held_by(old, preempted)  # before the step took any, maybe the same ones
    fresh_block = ((old.refcount == 0) | lost) & (new.refcount > 0)
    given_back = (old.refcount > 0) & (new.refcount == 0) | lost
    gained = (new.pages != old.pages) & (new.pages != NULL)
    fresh = gained & fresh_block[new.pages] & _first_holder(new.pages)
    foreign = gained & ~fresh & ~_held_before(old, new) & (new.refcount[new.pages] > 1)
    joined = foreign.any(axis=1)
    tail = np.arange(old.pages.shape[1]) == (old.length // old.block_size)[:, None]
    copied = fresh & tail & (old.length % old.block_size > 0)[:, None]
    ended = old.running & ~new.running & ~preempted

    cut = (new.length < old.length) & (new.length > 0) & ~joined & (new.counters is None)
    came = _came(old, new)[:, None]
    holes = new.holes & ~(old.holes & ~came) & ~joined[:, None]
    let_go = holes & (old.pages != NULL) & ~came
    passing = holes & ~let_go & (new.counters is not None)  # came and went within the step
    of_cut, of_ended, of_holes = (given_back & _held_by(old, cells) for cells in (cut, ended, let_go))
    tally = _since(old.tally, new.tally) or dict.fromkeys(TALLY, np.zeros(joined.size, int))
    phase = np.where(preempted, Phase.IDLE, _phase(old, new, tally["steps"] > 0, joined))
    filled, known = (-(-tokens // old.block_size) for tokens in (old.length, old.known))
    last = (known - filled)[ended & (phase == Phase.PREFILL)]  # pages of prompts whose row ended in the same step
    seen = {
        "tokens_fed": np.sum((new.length - old.length)[phase != Phase.IDLE]),
        "blocks_allocated": fresh_block.sum(),
        "blocks_freed": given_back.sum(),
        "blocks_copied": copied.sum(),
    }
    counted = _since(old.counters, new.counters) or seen  # a run counts what comes and goes within a step, too
    rolled_back = int(tally["blocks_rolled_back"].sum() + of_cut.sum())
    dropped = int((given_back & ~of_cut & ~of_ended & ~of_holes).sum())
    evicted = int(of_holes.sum() + passing.sum())
    if holes.any() and not ended.any():  # nobody else gave any: a copy that went in the step that made it counts, too
        evicted = int(counted["blocks_freed"]) - rolled_back - dropped
    return Moves(
        phase=phase,
        joined=joined,
        copied=copied.any(axis=1),
        rejected=np.where(cut, old.length - new.length, tally["drafted"] - tally["accepted"]),
        preempted=preempted,
        ended=ended,
        fed=int(counted["tokens_fed"]),
        allocated=int(counted["blocks_allocated"]),
        freed=int(counted["blocks_freed"]),
        copies=int(counted["blocks_copied"]),
        shared_cells=int(np.maximum(new.refcount - np.maximum(old.refcount, 1), 0).sum()),
        prefilled=int((fresh & ~copied | passing)[phase == Phase.PREFILL].sum() + last.sum()),
        guessed=int(tally["drafted"].sum()),
        rolled_back=rolled_back,
        holes=int(holes.sum()),
        evicted=evicted,
        dropped=dropped,
    )


def _since(old: dict[str, Any] | None, new: dict[str, Any] | None) -> dict[str, Any] | None:
    """Counters now less those before; None where nothing counts."""
    return new and {name: value - (old[name] if old else 0) for name, value in new.items()}


def _held_by(frame: Frame, cells: np.ndarray) -> np.ndarray:
    """Bool [N]: blocks that some of these cells, or rows, point at."""
    held = np.zeros(frame.refcount.size, bool)
    held[frame.pages[cells]] = True
    held[NULL] = False
    return held


def _came(old: Frame, new: Frame) -> np.ndarray:
    """Rows that began, or that another request sits on."""
    return new.running & (~old.running | (old.line != new.line))


def _first_holder(pages: np.ndarray) -> np.ndarray:
    """Cells that are the first, row by row, to point at their block."""
    first = np.zeros(pages.size, bool)
    first[np.unique(pages, return_index=True)[1]] = True
    return first.reshape(pages.shape)


def _held_before(old: Frame, new: Frame) -> np.ndarray:
    """Cells whose block the row held before, on whatever page."""
    mine = np.arange(old.length.size)[:, None] * old.refcount.size  # one number for a row and a block
    return np.isin(mine + new.pages, mine + old.pages)


def _phase(old: Frame, new: Frame, guessing: np.ndarray, joined: np.ndarray) -> np.ndarray:
    """What each row did: one that had several tokens pending, or none cached, was fed a prompt."""
    came = _came(old, new)
    pending = np.where(came, 2, old.known - old.length)
    if new.counters is None:  # a bare table: nobody knows what is pending, but the row grew by it
        pending = new.length - old.length
    phase = np.where(pending > 1, Phase.PREFILL, Phase.DECODE)
    moved = came | (old.running & ((new.length != old.length) | ~new.running)) & (pending > 0)
    follower = joined & (old.length == 0)  # the first row of its group was fed, it was not
    return np.where(moved & ~follower, np.where(guessing, Phase.SPECULATIVE, phase), Phase.IDLE)
