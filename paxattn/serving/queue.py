"""The queue is data: a line for each request, with its prompt, its answer so far, and when things happened.

    line 0  [ p p p g g g g . . ]  ended (length)          known 7
    line 1  [ p p p p p g . . . ]  on a row                known 6
    line 2  [ p p g g g . . . . ]  preempted, waits again  known 5: prompt and answer are fed anew
    line 3  [ p . . . . . . . . ]  not arrived yet         known 1

A row of the batch is a seat, and holds nothing but a line's number: a request that leaves its row, because it
has ended or has to wait, leaves no data to be copied. A line without a request is one that has ended.
"""

import dataclasses

import jax
import jax.numpy as jnp

from paxattn.decoding.sampling import Sampling
from paxattn.decoding.step import Finish
from paxattn.typing import Array, Bool, Float32, Int32, struct

NEVER = -1
"""The time of what has not happened."""


@struct
class Requests:
    """What is asked: R prompts, and how each wants to be answered."""

    prompt_ids: Int32[Array, "R W"]
    prompt_length: Int32[Array, "R"]
    max_new_tokens: Int32[Array, "R"]
    priority: Int32[Array, "R"]
    arrival: Int32[Array, "R"]
    sampling: Sampling

    @staticmethod
    def create(
        prompt_ids,
        prompt_length,
        *,
        max_new_tokens,
        priority: int | Int32[Array, "R"] = 0,
        arrival: int | Int32[Array, "R"] = 0,
        **sampling,
    ) -> "Requests":
        """Requests from padded prompts.

        Args:
          prompt_ids: int32 [R, W], anything past a prompt's length.
          prompt_length: int32 [R].
          max_new_tokens: a number, or one a request.
          priority: higher goes first, where the policy asks for it.
          arrival: the step before which the request is not there.
          **sampling: see `Sampling.create`; request r samples with fold_in(key, r) unless given a key of its own.
        """
        lines = prompt_ids.shape[0]

        def each(value):
            return jnp.broadcast_to(jnp.asarray(value, jnp.int32), (lines,))

        return Requests(
            jnp.asarray(prompt_ids, jnp.int32),
            each(prompt_length),
            each(max_new_tokens),
            each(priority),
            each(arrival),
            Sampling.create(lines, **sampling),
        )


@struct
class Times:
    """When things happened to each request, in steps; NEVER before they have."""

    arrival: Int32[Array, "R"]
    admitted: Int32[Array, "R"]  # the step that first seated it
    first_token: Int32[Array, "R"]  # steps done when it had one
    ended: Int32[Array, "R"]  # steps done when it had ended


@struct
class Queue:
    """R lines. M is the most that a request may hold, prompt and answer together."""

    tokens: Int32[Array, "R M"]
    logprobs: Float32[Array, "R M"]
    known: Int32[Array, "R"]
    prompt_length: Int32[Array, "R"]
    limit: Int32[Array, "R"]
    finish: Int32[Array, "R"]  # RUNNING until it has ended, on a row or not
    priority: Int32[Array, "R"]
    ticket: Int32[Array, "R"]  # order of submission
    preemptions: Int32[Array, "R"]
    times: Times
    sampling: Sampling

    @staticmethod
    def create(lines: int, max_model_len: int) -> "Queue":
        """Lines without requests."""

        def full(value=0):  # a buffer each: the queue may be donated
            return jnp.full(lines, value, jnp.int32)

        return Queue(
            tokens=jnp.zeros((lines, max_model_len), jnp.int32),
            logprobs=jnp.zeros((lines, max_model_len), jnp.float32),
            known=full(),
            prompt_length=full(),
            limit=full(),
            finish=full(Finish.CANCELLED),
            priority=full(),
            ticket=full(),
            preemptions=full(),
            times=Times(full(NEVER), full(NEVER), full(NEVER), full(NEVER)),
            sampling=Sampling.create(lines),
        )

    @property
    def size(self) -> int:
        """R."""
        return self.known.shape[0]

    @property
    def unfinished(self) -> Bool[Array, "R"]:
        """Lines whose request still wants tokens, on a row or not."""
        return self.finish == Finish.RUNNING


def put(queue: Queue, requests: Requests, line: Int32[Array, "n"], ticket: Int32[Array, "n"], most: int) -> Queue:
    """Writes n requests into lines whose own request has ended.

    Args:
      queue: the queue.
      requests: n of them.
      line: where each goes; R drops it.
      ticket: place of each in the order of submission.
      most: tokens that a request may ever hold in the cache; one that needs more could run for ever, and
        ends as OUT_OF_BLOCKS at once, as one with no prompt or nothing to generate does.
    """
    prompt, limit = requests.prompt_length, requests.prompt_length + requests.max_new_tokens
    sound = (prompt >= 1) & (limit > prompt) & (limit <= queue.tokens.shape[1]) & (limit - 1 <= most)
    zero, never = jnp.zeros_like(prompt), jnp.full_like(prompt, NEVER)
    ids = requests.prompt_ids[:, : queue.tokens.shape[1]]
    fresh = dataclasses.replace(
        queue,
        tokens=ids,
        logprobs=jnp.zeros(ids.shape, jnp.float32),
        known=prompt,
        prompt_length=prompt,
        limit=limit,
        finish=jnp.where(sound, Finish.RUNNING, Finish.OUT_OF_BLOCKS).astype(jnp.int32),
        priority=requests.priority,
        ticket=ticket,
        preemptions=zero,
        times=Times(requests.arrival, never, never, never),
        sampling=requests.sampling,
    )

    def write(old, new):
        at = (line, slice(new.shape[1])) if new.ndim == 2 else line
        return old.at[at].set(new, mode="drop")

    return jax.tree.map(write, queue, fresh)
