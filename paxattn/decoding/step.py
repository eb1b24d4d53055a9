"""One step of a batch, and the state that it turns: feed, pick, retire.

    tokens   [ p p p p p g g . . . ]      known: prompt + generated so far
    cached   [ x x x x . . . . . . ]      length of the row's page table: already fed
                      \\ pending /         fed next, as far as the token budget goes

A row whose pending tokens are all fed picks its next token; a finished row gives its blocks back at once.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from paxattn.cache import Cache, Plan, extend
from paxattn.decoding.model import Model, logits_of
from paxattn.decoding.sampling import Sampling, pick
from paxattn.pages import PageTable, free
from paxattn.sharing import Sharing, record, sharing
from paxattn.status import Status
from paxattn.typing import Array, Bool, Float, Float32, Int32, struct


class Finish(enum.IntEnum):
    """Why a row ended; its lower-case name is what users read."""

    RUNNING = 0
    STOP = 1  # an eos token or a stop string
    LENGTH = 2
    OUT_OF_BLOCKS = 3
    NOT_FINITE = 4  # NaN in the row's logits
    CANCELLED = 5  # nobody waits for it any more
    INVALID = 6  # a step was given counts that it could not feed: the status says why; or a prompt without a token

    @property
    def label(self) -> str:
        """The finish reason in results and JSON."""
        return self.name.lower()


@struct
class Stats:
    """Counters of a run. Blocks are counted when they leave the pool and when they return to it.

    Block steps are blocks summed over the steps, float32 since they outgrow int32: see `sharing`.
    """

    steps: Int32[Array, ""]
    prefill_steps: Int32[Array, ""]
    tokens_fed: Int32[Array, ""]
    blocks_allocated: Int32[Array, ""]
    blocks_freed: Int32[Array, ""]
    blocks_copied: Int32[Array, ""]
    blocks_peak: Int32[Array, ""]
    block_steps_held: Float32[Array, ""]
    block_steps_shared: Float32[Array, ""]
    block_steps_unshared: Float32[Array, ""]

    @staticmethod
    def zeros() -> "Stats":
        """Nothing counted yet."""
        return Stats(*(jnp.zeros((), dtype) for dtype in 7 * [jnp.int32] + 3 * [jnp.float32]))

    @property
    def sharing(self) -> Sharing:
        """What sharing saved over the whole run."""
        return Sharing(self.block_steps_held, self.block_steps_shared, self.block_steps_unshared)

    def freed(self, before: PageTable, after: PageTable) -> "Stats":
        """Counts the blocks that a verb gave back."""
        return dataclasses.replace(
            self, blocks_freed=self.blocks_freed + before.blocks.num_used - after.blocks.num_used
        )


def end_ids(eos_token_id) -> Int32[Array, "eos"]:
    """The ids that end a row; where there are none, one that no token has: XLA of JAX 0.11 fails on empty arrays."""
    ids = jnp.atleast_1d(jnp.asarray(eos_token_id, jnp.int32))
    return ids if ids.size else jnp.full(1, -1, jnp.int32)


@struct
class State:
    """A batch in flight. Row b's text is line `line[b]` of the buffers: line b, unless a queue deals them out."""

    cache: Cache
    tokens: Int32[Array, "R M"]
    logprobs: Float32[Array, "R M"]
    line: Int32[Array, "B"]
    known: Int32[Array, "B"]
    prompt_length: Int32[Array, "B"]
    limit: Int32[Array, "B"]
    finish: Int32[Array, "B"]
    eos: Int32[Array, "eos"]
    sampling: Sampling | None  # None: every row is greedy, known when a program is traced
    status: Int32[Array, ""]
    stats: Stats
    trace: Int32[Array, "steps 4"] | None  # of sharing, a line a step, where it was asked for

    @property
    def running(self) -> Bool[Array, "B"]:
        """Rows that still want tokens."""
        return self.finish == Finish.RUNNING

    @property
    def is_plain(self) -> Bool[Array, ""]:
        """Whether all rows are greedy and no block is shared: the common case, which asks the host nothing."""
        greedy = True if self.sampling is None else self.sampling.is_greedy
        return greedy & jnp.all(self.cache.table.blocks.refcount <= 1)

    @property
    def pending(self) -> Int32[Array, "B"]:
        """Known tokens that are not in the cache yet: 1 when decoding, more in prefill."""
        return jnp.where(self.running, self.known - self.cache.table.length, 0)


def share(pending: Int32[Array, "B"], budget: int) -> Int32[Array, "B"]:
    """How many tokens each row feeds: prompts first, in row order; rows that decode take the room left.

    A batch ends when its last row does, so a token decoded early gains nothing, and one that crowds out the end
    of a prompt costs a whole prefill step.
    """
    prompts = jnp.where(pending > 1, pending, 0)
    singles = pending - prompts

    def deal(wanted, room):
        before = jnp.cumsum(wanted) - wanted
        return jnp.clip(room - before, 0, wanted)

    fed = deal(prompts, budget)
    return fed + deal(singles, budget - jnp.sum(fed))


def step[S: State](
    model: Model,
    state: S,
    *,
    budget: int,
    count: Int32[Array, "B"] | None = None,
    attention: str = "auto",
    max_queries: int | None = None,
    shared: bool = True,
    greedy: bool = False,
) -> S:
    """Feeds up to `budget` tokens, `count[b]` of row b (as `share` deals them by default), picks, retires, frees.

    `max_queries` promises that no row feeds more, `shared=False` that no block has two holders, `greedy=True` that no
    row uses a sampling knob: what such a step does not need is then left out of the program.
    """
    count = share(state.pending, budget) if count is None else count
    promised = {"max_queries": max_queries, "shared": shared}
    fed, newest = feed(model, state, count, budget=budget, attention=attention, **promised)
    return settle(model, fed, newest, picks=(count > 0) & (fed.pending == 0), most=budget, greedy=greedy)


def feed[S: State](
    model: Model,
    state: S,
    count: Int32[Array, "B"],
    *,
    budget: int,
    attention: str = "auto",
    max_queries: int | None = None,
    shared: bool = True,
) -> tuple[S, Float[Array, "B E"]]:
    """Feeds `count[b]` pending tokens of each row: paging, the model, the counters; picks nothing.

    Where the counts cannot be fed nothing is, and rows end with what they have: all that run as OUT_OF_BLOCKS, or as
    INVALID where the counts themselves are wrong; those that are full, and no others, as LENGTH.

    Returns:
      The state, and the hidden state of each row's newest token (of some other token where count is 0).
    """
    promised = {"max_queries": max_queries, "shared": shared}
    cache, plan, status = extend(state.cache, count, budget=budget, attention=attention, **promised)
    tokens = jnp.where(plan.live, state.tokens[state.line[plan.row], plan.position], 0)
    hidden, layers = model(tokens, plan, cache.layers)
    fed = dataclasses.replace(extended(state, cache.table, count, plan, status), cache=Cache(cache.table, layers))
    return fed, hidden[plan.last]


def extended[S: State](state: S, table: PageTable, count: Int32[Array, "B"], plan: Plan, status: Int32[Array, ""]) -> S:
    """The state after `extend` gave this table, plan and status: all that is counted, and rows that end by it."""
    stats, now, copied = state.stats, sharing(table), plan.copies.count
    full = count > state.cache.table.capacity - state.cache.table.length
    reason = jnp.where(status == Status.OUT_OF_BLOCKS, Finish.OUT_OF_BLOCKS, Finish.INVALID)
    reason = jnp.where(status == Status.ROW_FULL, jnp.where(full, Finish.LENGTH, Finish.RUNNING), reason)
    stuck = state.running & (status != Status.OK)
    return dataclasses.replace(
        state,
        finish=jnp.where(stuck, reason, state.finish).astype(jnp.int32),
        status=jnp.where(state.status == Status.OK, status, state.status),
        stats=dataclasses.replace(
            stats,
            steps=stats.steps + 1,
            prefill_steps=stats.prefill_steps + jnp.any(state.pending > 1),
            tokens_fed=stats.tokens_fed + plan.query_start[-1],
            blocks_allocated=stats.blocks_allocated + now.held - state.cache.table.blocks.num_used,
            blocks_copied=stats.blocks_copied + copied,
            blocks_peak=jnp.maximum(stats.blocks_peak, now.held),
            block_steps_held=stats.block_steps_held + now.held,
            block_steps_shared=stats.block_steps_shared + now.shared,
            block_steps_unshared=stats.block_steps_unshared + now.unshared,
        ),
        trace=None if state.trace is None else record(state.trace, stats.steps, now, copied),
    )


def settle[S: State](
    model: Model,
    state: S,
    newest: Float[Array, "B E"],
    *,
    picks: Bool[Array, "B"],
    most: int | None = None,
    greedy: bool = False,
) -> S:
    """Picks the next token of the running rows in `picks`, at most `most`, retires rows and frees what they held."""
    token, logprob = _pick(model, state, newest, picks, most, greedy)
    finite = ~jnp.isnan(logprob)

    picks = picks & state.running
    column = jnp.where(picks & finite, state.known, state.tokens.shape[1])
    known = state.known + (picks & finite)
    finish = _finish(state, picks, finite, token, known)
    table = free(state.cache.table, finish != Finish.RUNNING)
    return dataclasses.replace(
        state,
        cache=Cache(table, state.cache.layers),
        tokens=state.tokens.at[state.line, column].set(token, mode="drop"),
        logprobs=state.logprobs.at[state.line, column].set(logprob, mode="drop"),
        known=known,
        finish=finish,
        stats=state.stats.freed(state.cache.table, table),
    )


def _pick(model, state, newest, picks, most, greedy):
    """Of all rows; where fewer can pick than there are, of those alone, as scores cost a pass over the vocabulary."""
    rows = state.known.size
    if most is None or most >= rows:
        return pick(logits_of(model, newest), state.sampling, state.tokens, state.known, state.line, greedy=greedy)
    of = jnp.nonzero(picks, size=most, fill_value=rows)[0]
    sampling, newest, known, line = jax.tree.map(lambda x: x[of], (state.sampling, newest, state.known, state.line))
    found = pick(logits_of(model, newest), sampling, state.tokens, known, line, greedy=greedy)
    return jax.tree.map(lambda x: jnp.zeros(rows, x.dtype).at[of].set(x, mode="drop"), found)


def _finish(state, picks, finite, token, known):
    ended = jnp.where(known >= state.limit, Finish.LENGTH, Finish.RUNNING)
    ended = jnp.where((token[:, None] == state.eos).any(axis=-1), Finish.STOP, ended)
    ended = jnp.where(finite, ended, Finish.NOT_FINITE)
    return jnp.where(picks, ended, state.finish).astype(jnp.int32)


def stop[S: State](state: S, rows: Bool[Array, "B"]) -> S:
    """Ends rows from outside (a stop string, a cancelled request); their blocks are free at once."""
    rows = rows & state.running
    table = free(state.cache.table, rows)
    stats = state.stats.freed(state.cache.table, table)
    finish = jnp.where(rows, jnp.int32(Finish.STOP), state.finish)
    return dataclasses.replace(state, cache=Cache(table, state.cache.layers), finish=finish, stats=stats)


def advance[S: State](
    model: Model,
    state: S,
    *,
    budget: int,
    steps: Int32[Array, ""] | int | None = None,
    attention: str = "auto",
    shared: bool = True,
) -> S:
    """Runs the batch until every row has ended, or for `steps` more steps: one program, a loop after a loop.

    While a row has a prompt to feed the token axis is `budget` long; once all rows decode it is one token a
    row. Each loop updates the pools in place. Where a question that steers the program makes the device wait for the
    host, the plain case (greedy, nothing shared) has a loop of its own that asks one a step: whether to go on.
    `shared=False` promises that no block has two holders: a state as `start` gives it then has no other case.
    """
    more = going(state, steps)

    def turn(tokens, most=None, shared=shared, greedy=False):
        promised = {"max_queries": most, "shared": shared, "greedy": greedy}
        return lambda s: step(model, s, budget=tokens, attention=attention, **promised)

    decode = functools.partial(turn, state.known.size, 1)

    def either(state):
        state = jax.lax.while_loop(lambda s: more(s) & s.is_plain, decode(shared=False, greedy=True), state)
        return jax.lax.while_loop(lambda s: more(s) & ~s.is_plain, decode(), state)

    one_case = not questions_wait() or (state.sampling is None and not shared)
    return prompts_first(state, more, feed=turn(budget), decode=decode() if one_case else either)


def going(state: State, steps: Int32[Array, ""] | int | None) -> Callable[[State], Bool[Array, ""]]:
    """The question whether a batch goes on: a row wants tokens, and it has taken fewer than `steps` steps from here."""
    begun, most = state.stats.steps, 2**31 - 1 if steps is None else steps
    return lambda s: jnp.any(s.running) & (s.stats.steps - begun < most)


def prompts_first[S: State](
    state: S, more: Callable[[S], Array], *, feed: Callable[[S], S], decode: Callable[[S], S]
) -> S:
    """Turns a batch by `feed` while a row has a prompt to feed, then by `decode`: rows that decode never go back."""
    state = jax.lax.while_loop(lambda s: more(s) & jnp.any(s.pending > 1), feed, state)
    return jax.lax.while_loop(more, decode, state)


def questions_wait() -> bool:
    """Whether a condition or a loop makes the device wait for the host: on a GPU; a CPU saves the compile time."""
    return jax.default_backend() == "gpu"
