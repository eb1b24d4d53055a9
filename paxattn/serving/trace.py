"""What each iteration did, in a fixed buffer: int32 [steps, columns], written in place, off by default.

step   rows  waiting  prefill  decode  held  blocks: used  allocated  freed  copied  preempted
0         3        5       48       0    48             3          3      0       0          0
1         3        5        0       3    51             6          3      0       0          0
"""

import jax.numpy as jnp
import numpy as np

from paxattn.serving.service import Service
from paxattn.typing import Array, Bool, Int32

COLUMNS = ("rows", "waiting", "prefill_tokens", "decode_tokens", "tokens_held", "blocks_used", "blocks_allocated",
           "blocks_freed", "blocks_copied", "preempted")  # fmt: skip


def blank(steps: int) -> Int32[Array, "steps columns"]:
    """Room for the first `steps` iterations; those after them are not recorded."""
    return jnp.zeros((steps, len(COLUMNS)), jnp.int32)


def record(old: Service, fed: Service, new: Service, count: Int32[Array, "B"], preempted: Bool[Array, "B"]):
    """The trace [steps, columns] with one more line; arguments as in `line`."""
    return new.trace.at[old.stats.steps].set(line(old, fed, new, count, preempted), mode="drop")


def line(
    old: Service, fed: Service, new: Service, count: Int32[Array, "B"], preempted: Bool[Array, "B"]
) -> Int32[Array, "columns"]:
    """What one iteration did.

    Args:
      old: before the iteration.
      fed: its rows as they were fed.
      new: after it.
      count: tokens that each row fed.
      preempted: rows that were sent back to wait.
    """
    allocated = new.stats.blocks_allocated - old.stats.blocks_allocated
    decoding = fed.view().pending == 1
    values = (
        jnp.sum(fed.seated),
        jnp.sum(fed.waiting),
        jnp.sum(jnp.where(decoding, 0, count)),
        jnp.sum(jnp.where(decoding, count, 0)),
        jnp.sum(fed.cache.table.length + count),
        fed.cache.table.blocks.num_used + allocated,
        allocated,
        new.stats.blocks_freed - old.stats.blocks_freed,
        new.stats.blocks_copied - old.stats.blocks_copied,
        jnp.sum(preempted),
    )
    return jnp.stack([jnp.int32(value) for value in values])


def columns(trace: Int32[Array, "steps columns"], steps: int) -> dict[str, np.ndarray]:
    """The recorded iterations as one array a column, on the host."""
    recorded = np.asarray(trace)[:steps]
    return {name: recorded[:, i] for i, name in enumerate(COLUMNS)} if recorded.size else {}
