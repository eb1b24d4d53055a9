"""The allocator alone over a trace of lengths: no model, no tokens, no pools. `lax.scan` inside, `vmap` outside.

    lengths    prompt [R], answer [R], arrival [R]     what is asked
    simulate   admit, choose, preempt, append, free    the serving loop's own verbs, on counters and a page table
    reserve    the same requests, each with room for all its life from the start: what paging replaces
    branch     one prompt, n rows, remapped each step by `parents`: what forks share

A step costs a few operations on [B, P] and [R], so thousands of pools run at once: `vmap` over requests, arrivals,
priorities or the policy's watermark. Kwon et al. 2023, sections 3 and 6.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from paxattn.cache import Cache
from paxattn.decoding.step import Finish
from paxattn.pages import PageTable, append, fork, free, violations
from paxattn.serving import trace as tracing
from paxattn.serving.loop import mixed_budget, most
from paxattn.serving.policy import Policy, ranked
from paxattn.serving.queue import NEVER, Queue, Times
from paxattn.serving.service import Service, admit, choose, preempt, settle, wake
from paxattn.serving.widths import prompt_widths
from paxattn.sharing import Sharing, sharing
from paxattn.typing import Array, Bool, Float32, Int32, struct

MEAN_LENGTHS = {"sharegpt": (161, 338), "alpaca": (19, 58)}
"""Tokens in and out of the paper's two workloads, on average."""


@struct
class Use:
    """Tokens of memory, step by step: what is taken, and what of it holds a token."""

    reserved: Int32[Array, "steps"]
    live: Int32[Array, "steps"]
    rows: Int32[Array, "steps"]
    waiting: Bool[Array, "steps"]  # whether a request that has arrived still waits
    ended: Bool[Array, ""]  # whether every request ended within these steps

    @property
    def busy(self) -> Bool[Array, "steps"]:
        """Steps that count: while requests wait, or all in which somebody is seated where none ever does."""
        return jnp.where(self.waiting.any(), self.waiting, self.rows > 0)

    @property
    def wasted(self) -> Float32[Array, ""]:
        """Part of the memory taken that holds no token, over the busy steps."""
        return 1 - self._sum(self.live) / jnp.maximum(self._sum(self.reserved), 1)

    @property
    def requests_at_once(self) -> Float32[Array, ""]:
        """Rows in use on average, over the busy steps."""
        return self._sum(self.rows) / jnp.maximum(self._sum(jnp.ones_like(self.rows)), 1)

    @property
    def steps(self) -> Int32[Array, ""]:
        """Steps in which somebody was seated."""
        return jnp.sum(self.rows > 0, dtype=jnp.int32)

    def _sum(self, values):
        return jnp.sum(jnp.where(self.busy, values, 0).astype(jnp.float32))


@struct
class Simulation:
    """What a simulated pool did."""

    use: Use
    trace: Int32[Array, "steps columns"]  # see `serving.trace`
    preemptions: Int32[Array, "R"]
    times: Times
    finish: Int32[Array, "R"]  # a `Finish`


def draw_lengths(name: str, requests: int, *, seed: int = 0, longest: int = 1024) -> Int32[np.ndarray, "2 R"]:
    """Prompt and answer lengths of a workload: log-normal with the paper's means and a spread of the logarithm of 1.

    Args:
      name: a key of MEAN_LENGTHS.
      requests: R.
      seed: of the draw.
      longest: tokens in, and tokens out, at most.
    """
    if name not in MEAN_LENGTHS:
        raise ValueError(f"length model {name!r} is unknown; choose one of {', '.join(MEAN_LENGTHS)}.")
    mean = np.log(np.array(MEAN_LENGTHS[name])[:, None]) - 0.5
    drawn = np.random.default_rng(seed).lognormal(mean, 1.0, (2, requests))
    return np.clip(np.rint(drawn), 1, longest).astype(np.int32)


def simulate(
    prompt: Int32[Array, "R"],
    answer: Int32[Array, "R"],
    *,
    steps: int,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    policy: Policy | None = None,
    arrival: Int32[Array, "R"] | int = 0,
    priority: Int32[Array, "R"] | int = 0,
) -> Simulation:
    """Serves requests of these lengths for `steps` steps: what `serve` does to its page table, without a model.

    Args:
      prompt: tokens in, at least 1.
      answer: tokens out, at least 1; the last is never fed, so it takes no slot.
      steps: of the scan, static; steps after everybody has ended are idle.
      num_blocks: blocks in the pool, NULL included.
      block_size: tokens a block.
      max_num_seqs: rows.
      max_model_len: tokens that a row can hold.
      max_num_batched_tokens: tokens that a step feeds at most; at least max_num_seqs, as in `serve`.
      policy: who goes first; first come, first served by default.
      arrival: the step before which a request is not there.
      priority: for policies that look at it.

    Returns:
      A `Simulation`. A request that can never fit ends as OUT_OF_BLOCKS at once.

    Raises:
      ValueError: a size that `serve` refuses.
    """
    widths = prompt_widths(mixed_budget(max_num_batched_tokens, max_num_seqs), max_num_seqs)
    policy, lines = Policy() if policy is None else policy, prompt.shape[0]
    prompt, answer = (jnp.asarray(values, jnp.int32) for values in (prompt, answer))
    table = PageTable.create(
        num_blocks=num_blocks, block_size=block_size, max_num_seqs=max_num_seqs, max_model_len=max_model_len
    )
    service = Service.create(Queue.create(lines, 0), Cache(table, ()))
    limit = prompt + answer
    sound = (prompt >= 1) & (answer >= 1) & (limit <= max_model_len) & (limit - 1 <= most(service))
    never = jnp.full(lines, NEVER, jnp.int32)
    queue = dataclasses.replace(
        service.queue,
        known=prompt,
        prompt_length=prompt,
        limit=limit,
        finish=jnp.where(sound, Finish.RUNNING, Finish.OUT_OF_BLOCKS).astype(jnp.int32),
        priority=jnp.broadcast_to(jnp.asarray(priority, jnp.int32), lines),
        ticket=jnp.arange(lines, dtype=jnp.int32),
        times=Times(jnp.broadcast_to(jnp.asarray(arrival, jnp.int32), lines), never, never, never),
    )
    order = ranked(queue, policy.admit)
    rank = jnp.zeros_like(order).at[ranked(queue, policy.keep)].set(jnp.arange(lines, dtype=jnp.int32))

    def turn(old, _):
        service = admit(wake(old), order, jnp.float32(policy.watermark))
        count, out = choose(service, rank, widths)
        service = preempt(service, out)
        new = _feed(service, count)
        return new, tracing.line(old, service, new, count, out)

    service, trace = jax.lax.scan(turn, dataclasses.replace(service, queue=queue), length=steps)
    column = dict(zip(tracing.COLUMNS, trace.T, strict=True))
    ended = ~jnp.any(service.queue.unfinished)
    held = column["blocks_used"] * block_size
    use = Use(held, column["tokens_held"], column["rows"], column["waiting"] > 0, ended)
    return Simulation(use, trace, service.queue.preemptions, service.queue.times, service.queue.finish)


def _feed(service: Service, count: Int32[Array, "B"]) -> Service:
    """What a step does to the tables and counters of its rows: `step` without a model."""
    state, before = service.view(), service.cache.table.blocks.num_used
    table, _, _ = append(state.cache.table, count)
    picks = (count > 0) & (state.pending == count)
    known = state.known + picks
    finish = jnp.where(picks & (known >= state.limit), jnp.int32(Finish.LENGTH), state.finish)
    stats = dataclasses.replace(
        state.stats, blocks_allocated=state.stats.blocks_allocated + table.blocks.num_used - before
    )
    left = free(table, finish != Finish.RUNNING)
    stats = stats.freed(table, left)
    return settle(service, dataclasses.replace(state, cache=Cache(left, ()), known=known, finish=finish, stats=stats))


def reserve(
    prompt: Int32[Array, "R"],
    answer: Int32[Array, "R"],
    reserved: Int32[Array, "R"],
    *,
    steps: int,
    pool_tokens: int,
    max_num_seqs: int,
) -> Use:
    """First come, first served where a request takes its room, `reserved[r]` tokens, for its whole life.

    The longest a row may get for all is how serving worked before paging; the answer's true length, which nobody
    knows in advance, is the paper's oracle.
    """
    prompt, answer, reserved = (jnp.asarray(values, jnp.int32) for values in (prompt, answer, reserved))
    lines, end = prompt.shape[0], prompt + answer
    total = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(reserved, dtype=jnp.int32)])

    def turn(carry, _):
        line, held, first = carry
        room = pool_tokens - jnp.sum(jnp.where(line < lines, reserved[line], 0))
        fit = jnp.searchsorted(total, total[first] + room, side="right") - 1 - first
        place = jnp.cumsum(line == lines) - 1
        joins = (line == lines) & (place < fit) & (first + place < lines)
        line = jnp.where(joins, first + place, line)
        held = jnp.where(joins, prompt[line], held)
        first = first + jnp.sum(joins, dtype=jnp.int32)
        seated = line < lines
        taken = jnp.sum(jnp.where(seated, reserved[line], 0)), jnp.sum(jnp.where(seated, held, 0))
        use = *taken, jnp.sum(seated, dtype=jnp.int32), first < lines
        stays = seated & (held + 1 < end[line])  # the last token is never fed
        return (jnp.where(stays, line, lines), held + 1, first), use

    nobody = jnp.full(max_num_seqs, lines, jnp.int32)
    (line, _, first), use = jax.lax.scan(turn, (nobody, nobody, jnp.int32(0)), length=steps)
    return Use(*use, ended=(first == lines) & jnp.all(line == lines))


def branch(
    prompt: Int32[Array, ""],
    answer: Int32[Array, ""],
    parents: Int32[Array, "t n"],
    *,
    steps: int,
    block_size: int,
    max_model_len: int,
) -> tuple[Sharing, Int32[Array, ""], Int32[Array, ""]]:
    """One prompt whose n rows go on together, row b from row `parents[step, b]`, taken again from the start when over.

    Args:
      prompt: tokens in, fed once.
      answer: tokens out of each row, at most `steps`.
      parents: row b itself for samples; for beams what a search took.
      steps: of the scan, static.
      block_size: tokens a block.
      max_model_len: tokens that a row can hold.

    Returns:
      `Sharing` summed over the steps, blocks copied, and faults: a failed verb or a broken invariant, 0 if all is well.
    """
    rows = parents.shape[1]
    row, pages = jnp.arange(rows), -(-max_model_len // block_size)
    table = PageTable.create(
        num_blocks=1 + rows * pages, block_size=block_size, max_num_seqs=rows, max_model_len=max_model_len
    )
    table, _, status = append(table, jnp.where(row == 0, prompt, 0))
    table = fork(table, jnp.zeros(rows, jnp.int32))

    def turn(table, at):
        live = at < answer
        table = fork(table, jnp.where((at > 0) & live, parents[(at - 1) % parents.shape[0]], row))
        table, copies, status = append(table, jnp.full(rows, live, jnp.int32))
        counts = jax.tree.map(lambda count: jnp.where(live, count.astype(jnp.float32), 0), sharing(table))
        return table, (counts, copies.count, status)

    table, (counts, copied, statuses) = jax.lax.scan(turn, table, jnp.arange(steps))
    counts, copied = jax.tree.map(lambda values: jnp.sum(values, axis=0), (counts, copied))
    return counts, copied, jnp.maximum(status, statuses.max()) + sum(violations(table).values())
