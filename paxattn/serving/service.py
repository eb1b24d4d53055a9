"""A batch over a queue, and one iteration of it: admit, choose, feed, retire.

    admit    waiting lines ──order──> empty rows, as far as promised blocks go      line [ 4 | . | 2 ] -> [ 4 | 5 | 2 ]
    choose   decoding rows one token each, then prompts; rows that no longer fit give their blocks back and wait
    feed     `step` on a view of the seated lines: one token a row, or the mixed body's token axis
    retire   rows whose request has ended are empty, their blocks free, for the very next iteration

All of it is a handful of fused operations on [R] and [B]. Text stays in its line of the queue, so admission,
preemption and the end of a request copy no tokens, and a row is but a line's number: R where nobody sits.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from paxattn.blocks import NULL
from paxattn.cache import Cache
from paxattn.decoding.step import Finish, State, Stats, end_ids
from paxattn.pages import PageTable, free
from paxattn.serving.queue import NEVER, Queue
from paxattn.serving.widths import room
from paxattn.status import Status
from paxattn.typing import Array, Bool, Float32, Int32, struct


@struct
class Service:
    """Everything there is while requests are served."""

    queue: Queue
    line: Int32[Array, "B"]  # who sits on each row; R: nobody
    cache: Cache
    eos: Int32[Array, "eos"]
    now: Int32[Array, ""]  # in steps, the idle ones that were skipped included
    status: Int32[Array, ""]
    stats: Stats
    trace: Int32[Array, "steps columns"]  # see `serving.trace`; without lines where it is off

    @staticmethod
    def create(queue: Queue, cache: Cache, eos_token_id=(), trace: Int32[Array, "steps columns"] | None = None):
        """Nobody is seated. The cache's rows are the rows."""
        return Service(
            queue=queue,
            line=jnp.full(cache.table.num_rows, queue.size, jnp.int32),
            cache=cache,
            eos=end_ids(eos_token_id),
            now=jnp.int32(0),
            status=jnp.int32(Status.OK),
            stats=Stats.zeros(),
            trace=jnp.zeros((0, 0), jnp.int32) if trace is None else trace,
        )

    @property
    def seated(self) -> Bool[Array, "B"]:
        """Rows that a request sits on."""
        return self.line < self.queue.size

    @property
    def waiting(self) -> Bool[Array, "R"]:
        """Lines whose request has arrived, has not ended and sits on no row."""
        on_row = jnp.zeros(self.queue.size, bool).at[self.line].set(True, mode="drop")
        return self.queue.unfinished & ~on_row & (self.queue.times.arrival <= self.now)

    def view(self) -> State:
        """The rows as `step` knows them; empty ones have ended."""
        queue = self.queue
        return State(
            cache=self.cache,
            tokens=queue.tokens,
            logprobs=queue.logprobs,
            line=self.line,
            known=queue.known[self.line],
            prompt_length=queue.prompt_length[self.line],
            limit=queue.limit[self.line],
            finish=jnp.where(self.seated, Finish.RUNNING, Finish.CANCELLED).astype(jnp.int32),
            eos=self.eos,
            sampling=jax.tree.map(lambda values: values[self.line], queue.sampling),
            status=self.status,
            stats=self.stats,
            trace=None,
        )


def capacity(table: PageTable) -> Int32[Array, ""]:
    """Blocks that the rows hold or could hold, counting evicted ones as held. Rows of a queue share none."""
    return table.blocks.num_free + jnp.sum(table.pages_for(table.length))


def wake(service: Service) -> Service:
    """Skips idle time: where nobody is seated, it is at least the next arrival."""
    queue = service.queue
    arrival = jnp.min(jnp.where(queue.unfinished, queue.times.arrival, jnp.iinfo(jnp.int32).max))
    idle = ~jnp.any(service.seated)
    return dataclasses.replace(service, now=jnp.where(idle, jnp.maximum(service.now, arrival), service.now))


def admit(service: Service, order: Int32[Array, "R"], watermark: Float32[Array, ""]) -> Service:
    """Seats waiting lines on empty rows, in order, while their blocks and those promised to others fit.

    A row is promised the blocks of all that is known of it, fed or not. The watermark stays free for rows to
    grow into, as far as they can grow: a request alone always fits, and so do all where the pool is large enough.
    """
    queue, table, seated = service.queue, service.cache.table, service.seated
    waiting = service.waiting[order]
    place = jnp.cumsum(waiting) - 1
    now, end = table.pages_for(queue.known), table.pages_for(queue.limit - 1)  # the last token is never fed

    def total(blocks):  # of the rows, and of the lines up to each
        taken = jnp.sum(jnp.where(seated, blocks[service.line], 0))
        return taken + jnp.cumsum(jnp.where(waiting, blocks[order], 0))

    reserve = jnp.floor(watermark * (table.blocks.refcount.size - 1)).astype(jnp.int32)
    promised = total(now) + jnp.minimum(reserve, total(end - now))
    fits = waiting & (place < jnp.sum(~seated)) & (promised <= capacity(table))

    rows = seated.size
    chosen = jnp.full(rows, queue.size, jnp.int32).at[jnp.where(fits, place, rows)].set(order, mode="drop")
    line = jnp.where(seated, service.line, chosen[jnp.maximum(jnp.cumsum(~seated) - 1, 0)])
    before = queue.times.admitted[line]
    at = jnp.where(seated, queue.size, line)
    admitted = queue.times.admitted.at[at].set(jnp.where(before == NEVER, service.now, before), mode="drop")
    times = dataclasses.replace(queue.times, admitted=admitted)
    return dataclasses.replace(service, queue=dataclasses.replace(queue, times=times), line=line)


def choose(
    service: Service, rank: Int32[Array, "R"], widths: Sequence[int], gone: Int32[Array, "B"] | int = 0
) -> tuple[Int32[Array, "B"], Bool[Array, "B"]]:
    """How many tokens each row feeds, and which rows have to go.

    Decoding rows feed their one token, then prompts share what is left of the token axis, in rank order; it is as long
    as one of `widths`. The rows that stay are the longest prefix in rank order whose pages, after this step, fit into
    the pool; `gone` of a row's pages were evicted, and hold no block.
    """
    table, pending = service.cache.table, service.view().pending
    rank = jnp.where(service.seated, rank[service.line], service.queue.size)
    ahead = rank < rank[:, None]  # [b, c]: c goes before b

    def before(values):
        return jnp.sum(jnp.where(ahead, values, 0), axis=1)

    prompts = jnp.where(pending > 1, pending, 0)
    singles, budget = pending - prompts, room(jnp.sum(pending), widths)
    count = singles + jnp.clip(budget - jnp.sum(singles) - before(prompts), 0, prompts)
    pages = table.pages_for(table.length + count) - gone
    stays = before(pages) + pages <= capacity(table) - jnp.sum(gone)
    return jnp.where(stays, count, 0), service.seated & ~stays


def vacate(service: Service, rows: Bool[Array, "B"]) -> Service:
    """Empties rows; their blocks are free at once, their lines keep what is known."""
    cache = Cache(free(service.cache.table, rows), service.cache.layers)
    freed = jnp.sum(rows[:, None] & (service.cache.table.pages != NULL))  # no block has two holders here
    stats = dataclasses.replace(service.stats, blocks_freed=service.stats.blocks_freed + freed)
    line = jnp.where(rows, service.queue.size, service.line)
    return dataclasses.replace(service, cache=cache, line=line, stats=stats)


def preempt(service: Service, rows: Bool[Array, "B"]) -> Service:
    """Sends the requests of these rows back to wait, prompt and answer kept, to be fed anew (recompute)."""
    queue = service.queue
    preemptions = queue.preemptions.at[jnp.where(rows, service.line, queue.size)].add(1, mode="drop")
    service = dataclasses.replace(service, queue=dataclasses.replace(queue, preemptions=preemptions))
    return vacate(service, rows)


def cancel(service: Service, lines: Bool[Array, "R"], reason: Finish = Finish.CANCELLED) -> Service:
    """Ends requests from outside, wherever they are; those that have ended stay as they are."""
    queue = service.queue
    lines = lines & queue.unfinished
    queue = dataclasses.replace(
        queue,
        finish=jnp.where(lines, jnp.int32(reason), queue.finish),
        times=dataclasses.replace(queue.times, ended=jnp.where(lines, service.now, queue.times.ended)),
    )
    rows = lines[service.line] & service.seated
    return vacate(dataclasses.replace(service, queue=queue), rows)


def settle(service: Service, state: State) -> Service:
    """Takes over what a step made of the view: answers into their lines, ended requests off their rows."""
    queue, now = service.queue, service.now + 1
    known = queue.known.at[service.line].set(state.known, mode="drop")
    finish = queue.finish.at[service.line].set(state.finish, mode="drop")

    def first(time, happened):
        return jnp.where((time == NEVER) & happened, now, time)

    times = dataclasses.replace(
        queue.times,
        first_token=first(queue.times.first_token, known > queue.prompt_length),
        ended=first(queue.times.ended, finish != Finish.RUNNING),
    )
    queue = dataclasses.replace(
        queue, tokens=state.tokens, logprobs=state.logprobs, known=known, finish=finish, times=times
    )
    return dataclasses.replace(
        service,
        queue=queue,
        line=jnp.where(state.running, service.line, queue.size),
        cache=state.cache,
        now=now,
        status=state.status,
        stats=state.stats,
    )
