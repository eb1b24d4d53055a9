"""The device's side of an engine: three programs over a donated service, each compiled once.

chunk  k steps of the loop, and the news: what each line gained, who ended
enter  a request into a free line              leave  requests that were cancelled
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from paxattn.decoding.eviction import Eviction
from paxattn.decoding.generate import new_tokens
from paxattn.serving.loop import most, run
from paxattn.serving.policy import Policy
from paxattn.serving.queue import Requests, put
from paxattn.serving.service import Service, cancel
from paxattn.typing import Array, Float32, Int32, struct


@struct
class News:
    """What a chunk tells the host: the tokens that each line gained, and how things stand."""

    tokens: Int32[Array, "R k"]
    logprobs: Float32[Array, "R k"]
    grown: Int32[Array, "R"]
    finish: Int32[Array, "R"]
    running: Int32[Array, ""]
    used: Int32[Array, ""]
    steps: Int32[Array, ""]
    preemptions: Int32[Array, ""]


@functools.partial(jax.jit, static_argnames=("budget", "steps", "attention"), donate_argnames="service")
def chunk(model, service: Service, policy: Policy, evict: Eviction | None, *, budget: int, steps: int, attention: str):
    """`steps` steps, and what they brought."""
    known = service.queue.known
    preempted = jnp.sum(service.queue.preemptions)
    service = run(model, service, budget=budget, policy=policy, steps=steps, attention=attention, evict=evict)
    queue = service.queue
    news = News(
        tokens=new_tokens(queue.tokens, known, queue.known, steps),
        logprobs=new_tokens(queue.logprobs, known, queue.known, steps),
        grown=queue.known - known,
        finish=queue.finish,
        running=jnp.sum(service.seated),
        used=service.cache.table.blocks.num_used,
        steps=service.stats.steps,
        preemptions=jnp.sum(queue.preemptions) - preempted,
    )
    return service, news


@functools.partial(jax.jit, donate_argnums=0)
def enter(service: Service, requests: Requests, line, ticket):
    """Writes a request into a line; it arrives now."""
    requests = dataclasses.replace(requests, arrival=service.now[None])
    return dataclasses.replace(service, queue=put(service.queue, requests, line, ticket, most(service)))


leave = jax.jit(cancel, static_argnames="reason", donate_argnums=0)
