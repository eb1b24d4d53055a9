"""Throwing blocks away while a row lives: a pure function scores them, the lowest go, all under jit. Off by default.

    length 13, S = 2        pages [ 3 | 1 | 7 | 2 | 8 | 5 | 6 ]      score(cache) [B, P]
    sinks 2, window 5             inf  -   -   -   +   +   +
    evict                   pages [ 3 | . | . | . | 8 | 5 | 6 ]      blocks 1, 7, 2 are free: a hole, length still 13
    attention sees          pages [ 3 | 8 | 5 | 6 | . | . | . ]      length 7; positions stay those of the text

A score of -inf says that nobody needs the page; of the others the lowest go once a row holds more than `keep`.
The tail, and whatever is not full, always stays. `generate(..., evict=...)` and `serve` run the hook after every step.

Sinks and a window: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks". There keys are
turned by their place in the cache; here they keep the angle of their place in the text.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp

from paxattn.blocks import NULL, release
from paxattn.cache import KV, Cache, CacheSpec, Plan
from paxattn.decoding.model import Model
from paxattn.decoding.step import State, going, prompts_first, step
from paxattn.pages import PageTable
from paxattn.typing import Array, Bool, Float, Int32, static, struct

Score = Callable[[Cache], Array]
"""Looks at a cache, gives float [B, P]: how much each page is worth; -inf goes at once, +inf stays."""


@struct
class Eviction:
    """Which blocks a row gives back while it lives."""

    score: Score = static()
    keep: int | None = static(default=None)  # pages a row holds after a step at most, the one being filled included

    def __post_init__(self):
        if self.keep is not None and self.keep < 2:
            raise ValueError(f"keep is {self.keep}, must be at least 2: a full page and the one being filled.")

    def __call__(self, cache: Cache) -> Cache:
        """Releases the blocks that the score gives up; a shared one stays with its other holders.

        The table's `violations` then count each hole as "live page has no block", and no other.
        """
        table = cache.table
        full = jnp.arange(table.pages.shape[1]) < (table.length // table.block_size)[:, None]
        worth = jnp.where(full & (table.pages != NULL), self.score(cache), jnp.inf)
        out = worth == -jnp.inf
        if self.keep is not None:
            surplus = jnp.sum(table.pages != NULL, axis=1) - self.keep
            place = jnp.argsort(jnp.argsort(worth, axis=1), axis=1)
            out |= (place < surplus[:, None]) & (worth < jnp.inf)
        blocks = release(table.blocks, jnp.where(out, table.pages, NULL))
        pages = jnp.where(out, NULL, table.pages)
        return Cache(PageTable(pages, table.length, blocks, table.block_size), cache.layers)


@dataclasses.dataclass(frozen=True)
class SinksAndWindow:
    """The worked example of a score: a page of sinks stays, one past the window goes; equal ones compile once."""

    sinks: int
    window: int

    def __call__(self, cache: Cache) -> Float[Array, "B P"]:
        """Whole blocks: a page stays while any of its tokens is a sink or will be seen by the next query."""
        table = cache.table
        begin = jnp.arange(table.pages.shape[1]) * table.block_size
        past = begin + table.block_size <= table.length[:, None] - self.window + 1  # the next query sees itself
        return jnp.where(begin < self.sinks, jnp.inf, jnp.where(past, -jnp.inf, begin))


def sinks_and_window(sinks: int, window: int) -> Eviction:
    """Keeps the first `sinks` tokens and those that a window of `window` tokens reaches (StreamingLLM)."""
    if sinks < 0 or window < 1:
        raise ValueError(f"sinks is {sinks} and window {window}; they must be at least 0 and 1.")
    return Eviction(SinksAndWindow(sinks, window))


def sliding_window(window: int) -> Eviction:
    """For a model that attends to the last `window` tokens: what it never sees again is free, tokens unchanged."""
    return sinks_and_window(0, window)


def holes(table: PageTable) -> Bool[Array, "B P"]:
    """Pages that a row has given back: within its length, without a block."""
    return (jnp.arange(table.pages.shape[1]) < table.pages_for(table.length)[:, None]) & (table.pages == NULL)


def close(plan: Plan, block_size: int) -> Plan:
    """The plan as attention should see it: pages moved together over the holes, lengths less what is gone."""
    rows, width = plan.pages.shape
    kept = plan.pages != NULL
    gone = (plan.length + block_size - 1) // block_size - jnp.sum(kept, axis=1)
    place = jnp.where(kept, jnp.cumsum(kept, axis=1) - 1, width)
    pages = jnp.full_like(plan.pages, NULL).at[jnp.arange(rows)[:, None], place].set(plan.pages, mode="drop")
    return dataclasses.replace(plan, pages=pages, length=plan.length - gone * block_size)


@struct
class Forgetful:
    """A model whose attention looks at what its rows still hold: the same network, another plan."""

    model: Model

    @property
    def cache_spec(self) -> CacheSpec:
        """The model's."""
        return self.model.cache_spec

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.model.vocab_size

    def __call__(self, tokens: Int32[Array, "T"], plan: Plan, layers: tuple[KV, ...]):
        """As the model's; positions and slots of the new tokens are untouched."""
        return self.model(tokens, close(plan, layers[0].k.shape[2]), layers)

    def logits(self, hidden: Float[Array, "n E"]):
        """The model's."""
        return self.model.logits(hidden)


def turn(model: Model, state: State, *, evict: Eviction, **options) -> State:
    """One `paxattn.step` with these options, then the eviction."""
    return evicted(step(Forgetful(model), state, **options), evict)


def evicted(state: State, evict: Eviction) -> State:
    """The state after the eviction, its blocks counted."""
    cache = evict(state.cache)
    return dataclasses.replace(state, cache=cache, stats=state.stats.freed(state.cache.table, cache.table))


def advance(
    model: Model,
    state: State,
    *,
    evict: Eviction,
    budget: int,
    steps: Int32[Array, ""] | int | None = None,
    attention: str = "auto",
) -> State:
    """`paxattn.advance` that evicts after every step, chunks of a prompt included."""
    turns = functools.partial(turn, model, evict=evict, attention=attention)
    feed, decode = (
        functools.partial(turns, budget=budget),
        functools.partial(turns, budget=state.known.size, max_queries=1),
    )
    return prompts_first(state, going(state, steps), feed=feed, decode=decode)
