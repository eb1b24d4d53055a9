"""The device's side of an engine: three programs over a donated service, each compiled once.

chunk  k steps of the loop, and the news: what each line gained, who ended
enter  a request into a free line              leave  requests that were cancelled

On a mesh each data shard has lines of its own. The host counts them like cards that are dealt: line i is one of
shard i % D, so that the first free line is one of the shard that has the fewest requests, or nearly.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from paxattn.decoding.eviction import Eviction
from paxattn.decoding.generate import new_tokens
from paxattn.mesh import DATA, deal, join, spread
from paxattn.serving.loop import most, open_service, run
from paxattn.serving.policy import Policy
from paxattn.serving.queue import Requests, put
from paxattn.serving.service import Service, cancel
from paxattn.typing import Array, Bool, Float32, Int32, struct


@struct
class News:
    """What a chunk tells the host: the tokens that each line gained, and how things stand."""

    tokens: Int32[Array, "R k"]
    logprobs: Float32[Array, "R k"]
    grown: Int32[Array, "R"]
    finish: Int32[Array, "R"]
    seated: Bool[Array, "R"]
    used: Int32[Array, ""]
    steps: Int32[Array, ""]
    preemptions: Int32[Array, ""]


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
        seated=jnp.zeros(queue.size, bool).at[service.line].set(True, mode="drop"),
        used=service.cache.table.blocks.num_used,
        steps=service.stats.steps,
        preemptions=jnp.sum(queue.preemptions) - preempted,
    )
    return service, news


def enter(service: Service, asked: dict[str, Any], line: Int32[Array, "1"], ticket: Int32[Array, "1"]) -> Service:
    """Writes a request into a line; it arrives now.

    Args:
      service: what it enters.
      asked: arguments of `Requests.create`, with one key; where `fold` is true it samples with fold_in(key, ticket).
      line: where it goes; R drops it.
      ticket: its number in the order of submission.
    """
    asked, key = dict(asked), asked["key"]
    key = jnp.where(asked.pop("fold"), jax.random.fold_in(key, ticket[0]), key)
    requests = Requests.create(**asked | {"key": key[None], "arrival": service.now})
    return dataclasses.replace(service, queue=put(service.queue, requests, line, ticket, most(service)))


class Programs(NamedTuple):
    """What an engine runs: an empty service, and the three programs, jitted."""

    open: Callable
    chunk: Callable
    enter: Callable
    leave: Callable


@functools.cache
def programs(mesh: Mesh | None) -> Programs:
    """Of one device, or of the data shards of a mesh; the same calls."""
    made = (chunk, enter, cancel) if mesh is None else _on(mesh)
    static = {"chunk": ("budget", "steps", "attention"), "enter": (), "leave": ("reason",)}
    jitted = (
        jax.jit(program, static_argnames=names, donate_argnames="service")
        for program, names in zip(made, static.values(), strict=True)
    )
    return Programs(open_service if mesh is None else spread(open_service, mesh), *jitted)


def _on(mesh: Mesh) -> tuple[Callable, Callable, Callable]:
    """The programs over a service whose arrays have an axis [D], lines given and told as if there were one queue."""
    shards = mesh.shape[DATA]

    def chunks(model, service, policy, evict, **options):
        service, news = spread(chunk, mesh)(model, service, policy, evict, **options)
        return service, join(news, mesh, service.queue.known.size)

    def enters(service, asked, line, ticket):
        lines = service.queue.known.shape[1]
        at = jnp.where(line % shards == jnp.arange(shards)[:, None], line // shards, lines)  # elsewhere it is dropped
        given = jax.tree.map(lambda x: jnp.broadcast_to(x, (shards, *x.shape)), (asked, ticket))
        return spread(enter, mesh)(service, given[0], at, given[1])

    def leaves(service, lines, reason):
        return spread(cancel, mesh)(service, deal(lines, shards), reason)

    return chunks, enters, leaves
