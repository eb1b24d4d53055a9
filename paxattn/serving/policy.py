"""Who goes first: orders over the queue, as pure functions that are traced into the loop.

    order(queue) -> a key a line, the lowest goes first; ties by arrival, then by submission

    admit   who is seated next        strictly in this order: nobody overtakes the one at the front
    keep    who is preempted last     the rows kept are the longest prefix, in this order, that fits into the pool

Why it ends: the row at the front of `keep` is never preempted, since a request that could outgrow the pool alone
was refused, and it gets a token or a piece of its prompt in every step. So some request always ends; under
`first_come` the one at the front is the oldest.
"""

from collections.abc import Callable

import jax.numpy as jnp

from paxattn.serving.queue import Queue
from paxattn.typing import Array, Float32, Int32, static, struct

Order = Callable[[Queue], Array]


def first_come(queue: Queue) -> Int32[Array, "R"]:
    """First come, first served."""
    return queue.times.arrival


def shortest_prompt(queue: Queue) -> Int32[Array, "R"]:
    """Short prompts first: more requests end early, and a long one may wait for long."""
    return queue.prompt_length


def highest_priority(queue: Queue) -> Int32[Array, "R"]:
    """Highest `priority` first."""
    return -queue.priority


@struct
class Policy:
    """Two orders, and the share of the pool that admission leaves free for rows to grow into."""

    admit: Order = static(default=first_come)
    keep: Order = static(default=first_come)  # its reverse is preempted: last come, first out
    watermark: float | Float32[Array, ""] = 0.01


def ranked(queue: Queue, order: Order) -> Int32[Array, "R"]:
    """Lines, the first to go first."""
    return jnp.lexsort((queue.ticket, queue.times.arrival, order(queue))).astype(jnp.int32)
