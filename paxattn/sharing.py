"""What sharing saves: the blocks that rows hold together, counted against a cache in which each row holds its own.

    row 0: [ 3 | 1 ]        held      3 blocks (1, 3, 5)
    row 1: [ 3 | 5 ]        shared    1 block  (3)
                            unshared  4 blocks without sharing: a block a cell
                            saving    1/4

A trace has a line a step: int32 [steps, 4], the columns of `COLUMNS`, written in place.

The metric of Kwon et al. 2023, section 6.3: blocks saved by sharing / blocks without sharing.
"""

import jax.numpy as jnp

from paxattn.pages import PageTable
from paxattn.typing import Array, Float32, Int32, struct

COLUMNS = ("held", "shared", "unshared", "copied")
"""Blocks of a step: those of a `Sharing`, and those that copy-on-write copied."""


@struct
class Sharing:
    """Block counts of one moment, or their sums over many."""

    held: Int32[Array, ""] | Float32[Array, ""]
    shared: Int32[Array, ""] | Float32[Array, ""]  # of these, by more than one row
    unshared: Int32[Array, ""] | Float32[Array, ""]  # what the rows would hold if each had its own

    @property
    def saving(self) -> Float32[Array, ""]:
        """Part of the unshared blocks that sharing saves, in [0, 1)."""
        return (self.unshared - self.held) / jnp.maximum(self.unshared, 1)


def sharing(table: PageTable) -> Sharing:
    """The count of a page table as it stands: three reductions."""
    return Sharing(
        table.blocks.num_used,
        jnp.sum(table.blocks.refcount > 1, dtype=jnp.int32),
        jnp.sum(table.blocks.refcount, dtype=jnp.int32),  # a block a cell; a page that was evicted has none
    )


def record(trace: Int32[Array, "steps 4"], step: Int32[Array, ""], now: Sharing, copied: Int32[Array, ""]):
    """The trace with line `step`; a step past its end is not recorded."""
    return trace.at[step].set(jnp.stack([now.held, now.shared, now.unshared, copied]), mode="drop")
