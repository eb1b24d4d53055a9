"""More requests than rows, in one device program.

    serve = results . run . put . open_service

    run   lax.while_loop:  wake, admit, choose, preempt  ->  one of the compiled bodies  ->  settle
                                                             prompts among them:    T = max_num_batched_tokens, T/4 ..
                                                             all rows at one token: T = B, of many rows 3B/4, B/2 .. too

`generate` is the case in which everybody has a row from the start. What a request is answered depends on its prompt
and its key alone: rows, batch mates, chunks, preemption and the order of admission are unobservable in the tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from paxattn.cache import Cache
from paxattn.decoding.eviction import Eviction, Forgetful, evicted, holes
from paxattn.decoding.generate import MAX_NUM_BATCHED_TOKENS, check_prompts, is_traced, new_tokens
from paxattn.decoding.model import Model
from paxattn.decoding.step import Stats, step
from paxattn.serving import trace as tracing
from paxattn.serving.policy import Policy, ranked
from paxattn.serving.queue import Queue, Requests, Times, put
from paxattn.serving.service import Service, admit, choose, preempt, settle, wake
from paxattn.serving.widths import decode_widths, prompt_widths, shortest
from paxattn.typing import Array, Float32, Int32, struct


@struct
class Served:
    """What came out, in the order of the requests; W is max_model_len, more than any of them has."""

    token_ids: Int32[Array, "R W"]  # new tokens, the eos token included if produced; 0 past `length`
    logprobs: Float32[Array, "R W"]
    length: Int32[Array, "R"]
    finish_reason: Int32[Array, "R"]  # a `Finish`
    preemptions: Int32[Array, "R"]  # how often each was sent back to wait
    times: Times
    status: Int32[Array, ""]
    stats: Stats
    trace: Int32[Array, "steps columns"]
    cache: Cache


def serve(
    model: Model,
    requests: Requests,
    *,
    max_num_seqs: int,
    max_model_len: int | None = None,
    num_blocks: int | None = None,
    block_size: int = 16,
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
    policy: Policy | None = None,
    eos_token_id=(),
    trace: int = 0,
    attention: str = "auto",
    evict: Eviction | None = None,
) -> Served:
    """Serves all requests through `max_num_seqs` rows: a pure function, ready for `jax.jit`.

    Args:
      model: see `paxattn.decoding.model.Model`.
      requests: what is asked; see `Requests.create`.
      max_num_seqs: rows: requests in flight at once, at most.
      max_model_len: tokens that a request can hold, prompt and answer; by default what the largest asks for.
      num_blocks: blocks in the pool, NULL included; enough for all rows by default. With fewer, requests wait, and
        rows are preempted when blocks run out.
      block_size: tokens a block holds.
      max_num_batched_tokens: tokens that a step feeds at most; at least max_num_seqs, as decoding rows go first. The
        token axis is that long, or a quarter, a sixteenth .. where few prompts wait.
      policy: who goes first; first come, first served by default.
      eos_token_id: none, one or several ids that end a request.
      trace: record that many iterations; see `paxattn.serving.trace`.
      attention: implementation of paged attention, by name.
      evict: gives blocks back while rows live, see `paxattn.decoding.eviction`; nothing is evicted by default.

    Returns:
      A `Served`. A traced request that can never fit ends as OUT_OF_BLOCKS without a token.

    Raises:
      ValueError: a request that can never fit, or arguments that can be seen to be wrong before anything runs.
    """
    lines, policy = requests.prompt_length.size, Policy() if policy is None else policy
    if max_model_len is None:
        if is_traced(requests.prompt_length) or is_traced(requests.max_new_tokens):
            raise ValueError("the requests are traced, so they cannot size the page table: pass max_model_len.")
        whole = np.asarray(requests.prompt_length, np.int64) + np.asarray(requests.max_new_tokens)
        max_model_len = int(np.max(whole, initial=1))
    at_least_one(block_size=block_size, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
    budget = mixed_budget(max_num_batched_tokens, max_num_seqs)
    if num_blocks is None:
        num_blocks = 1 + max_num_seqs * -(-max_model_len // block_size)
    if lines:
        check_requests(model, requests, max_model_len=max_model_len, block_size=block_size, num_blocks=num_blocks)
    service = open_service(
        model,
        lines=max(lines, 1),
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        block_size=block_size,
        eos_token_id=eos_token_id,
        trace=trace,
    )
    line = jnp.arange(lines, dtype=jnp.int32)
    service = dataclasses.replace(service, queue=put(service.queue, requests, line, line, most(service)))
    if lines:  # a queue of none would still be compiled
        service = run(model, service, budget=budget, policy=policy, attention=attention, evict=evict)
    return results(service, lines)


def open_service(
    model: Model,
    *,
    lines: int,
    max_num_seqs: int,
    max_model_len: int,
    num_blocks: int,
    block_size: int,
    eos_token_id=(),
    trace: int = 0,
) -> Service:
    """An empty queue of `lines` lines, empty rows, an empty cache."""
    cache = Cache.create(
        model.cache_spec,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
    )
    return Service.create(Queue.create(lines, max_model_len), cache, eos_token_id, tracing.blank(trace))


def most(service: Service) -> int:
    """Tokens that the pool could hold for one request."""
    table = service.cache.table
    return (table.blocks.refcount.size - 1) * table.block_size


def at_least_one(**sizes: int) -> None:
    """Refuses sizes that are not positive, by name."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, must be at least 1.")


def mixed_budget(max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """Tokens that a step feeds at most."""
    if max_num_batched_tokens < max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens is {max_num_batched_tokens}, must be at least max_num_seqs = {max_num_seqs}: "
            "decoding rows go first, a token each; raise it or ask for fewer rows."
        )
    return max_num_batched_tokens


def run(
    model: Model,
    service: Service,
    *,
    budget: int,
    policy: Policy,
    steps: Int32[Array, ""] | int | None = None,
    attention: str = "auto",
    evict: Eviction | None = None,
) -> Service:
    """Runs until every request of the queue has ended, or for `steps` more steps.

    The policy's orders are taken once, here: they may look at whatever the queue holds when the loop starts.
    """
    order = ranked(service.queue, policy.admit)
    rank = jnp.zeros_like(order).at[ranked(service.queue, policy.keep)].set(jnp.arange(order.size, dtype=jnp.int32))
    begun, steps = service.stats.steps, jnp.int32(2**31 - 1) if steps is None else steps
    watermark = jnp.float32(policy.watermark)

    model = model if evict is None else Forgetful(model)

    def feed(tokens, most):
        told = {"budget": tokens, "max_queries": most, "attention": attention, "shared": False}
        return lambda state, count: step(model, state, count=count, **told)

    mixed, plain = prompt_widths(budget, service.line.size), decode_widths(service.line.size)
    bodies = [*(feed(tokens, None) for tokens in mixed), *(feed(tokens, 1) for tokens in plain)]

    def turn(old):
        service = admit(wake(old), order, watermark)
        gone = 0 if evict is None else jnp.sum(holes(service.cache.table), axis=1)
        count, out = choose(service, rank, mixed, gone)
        service, fed = preempt(service, out), jnp.sum(count)
        body = jnp.where(jnp.any(count > 1), shortest(fed, mixed), len(mixed) + shortest(fed, plain))
        state = jax.lax.switch(body, bodies, service.view(), count)
        new = settle(service, state if evict is None else evicted(state, evict))
        if not new.trace.size:
            return new
        return dataclasses.replace(new, trace=tracing.record(old, service, new, count, out))

    return jax.lax.while_loop(lambda s: jnp.any(s.queue.unfinished) & (s.stats.steps - begun < steps), turn, service)


def results(service: Service, lines: int) -> Served:
    """The answers in the first `lines` lines of the queue, and everything that was counted."""
    queue = jax.tree.map(lambda values: values[:lines], service.queue)

    def answers(buffer):
        return new_tokens(buffer, queue.prompt_length, queue.known, buffer.shape[1])

    return Served(
        token_ids=answers(queue.tokens),
        logprobs=answers(queue.logprobs),
        length=queue.known - queue.prompt_length,
        finish_reason=queue.finish,
        preemptions=queue.preemptions,
        times=queue.times,
        status=service.status,
        stats=service.stats,
        trace=service.trace,
        cache=service.cache,
    )


def check_requests(model: Model, requests: Requests, *, max_model_len: int, block_size: int, num_blocks: int) -> None:
    """Refuses, on the host, requests that are wrong or can never fit; traced values are passed over."""
    limits = {"max_model_len": max_model_len, "block_size": block_size, "num_blocks": num_blocks}
    asked = requests.prompt_ids, requests.prompt_length, requests.max_new_tokens
    check_asked(model, *asked, vars(requests.sampling), **limits)


def check_asked(model: Model, ids, prompt, new, knobs: dict, *, max_model_len, block_size, num_blocks) -> None:
    """`check_requests` of the arrays that requests are made from, on the device or not."""
    check_prompts(model, ids, prompt, new, max_model_len, block_size, num_blocks, knobs)
    if is_traced(prompt) or is_traced(new):
        return
    need = -(-(np.asarray(prompt, np.int64) + np.asarray(new) - 1) // block_size)  # the last token is never fed
    if (need >= num_blocks).any():
        line = int(np.argmax(need >= num_blocks))
        raise ValueError(
            f"request {line} may need {need[line]} blocks of {block_size} tokens; the pool has {num_blocks - 1} to "
            "hand out, so it could never finish; raise num_blocks, or lower its max_new_tokens."
        )
