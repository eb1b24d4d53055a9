"""The block allocator: one vector of reference counts, and nothing else.

    refcount   [ 0 1 0 2 0 1 ]      allocate(want = [T, F, T])
    free         . x F x F x    ->  ids = [2, 0, 4], refcount [0 1 1 2 1 1]
                 ^ block 0 is NULL: always 0, never handed out

A block is free when its count is 0; nothing else says "free". Every verb is loop-free and total: an
allocation that cannot be served in full changes nothing.
"""

import jax.numpy as jnp

from paxattn.typing import Array, Bool, Int32, struct

NULL = 0
"""The block that no row owns: a valid address for idle writes and unused page cells, whose content nobody reads."""


@struct
class Blocks:
    """Reference counts of the N blocks of a pool: how many page cells point at each."""

    refcount: Int32[Array, "N"]

    @staticmethod
    def create(num_blocks: int) -> "Blocks":
        """All free. `num_blocks` includes NULL, so num_blocks - 1 can be handed out."""
        return Blocks(jnp.zeros(num_blocks, jnp.int32))

    @property
    def is_free(self) -> Bool[Array, "N"]:
        """Blocks that `allocate` may hand out."""
        return (self.refcount == 0).at[NULL].set(False)

    @property
    def num_free(self) -> Int32[Array, ""]:
        """How many blocks `allocate` could hand out now."""
        return self.is_free.sum(dtype=jnp.int32)

    @property
    def num_used(self) -> Int32[Array, ""]:
        """How many blocks are referenced by at least one cell."""
        return self.refcount.shape[0] - 1 - self.num_free


def allocate(blocks: Blocks, want: Bool[Array, "*cells"]) -> tuple[Blocks, Int32[Array, "*cells"], Bool[Array, ""]]:
    """One fresh block for each True cell, or none at all.

    Args:
      blocks: the allocator.
      want: a mask of any shape; prefill, decode and copy-on-write are the same call.

    Returns:
      The allocator, the block of each cell (NULL where none was wanted or nothing was given), and whether
      there were enough free blocks. Not ok: the same allocator, bit for bit.
    """
    wanted = want.ravel()
    rank = jnp.cumsum(wanted, dtype=jnp.int32) - 1
    ordinal = jnp.cumsum(blocks.is_free, dtype=jnp.int32) - 1
    ok = rank[-1] <= ordinal[-1] if wanted.size else jnp.array(True)

    # The free blocks in order, compacted to the front by one scatter; then the r-th wish takes the r-th block.
    slots = max(wanted.size, 1)
    place = jnp.where(blocks.is_free, ordinal, slots)
    free_ids = jnp.zeros(slots, jnp.int32).at[place].set(jnp.arange(place.size, dtype=jnp.int32), mode="drop")
    given = wanted & ok
    ids = jnp.where(given, free_ids[jnp.maximum(rank, 0)], NULL)
    return retain(blocks, ids), ids.reshape(want.shape), ok


def retain(blocks: Blocks, ids: Int32[Array, "*cells"]) -> Blocks:
    """One more reference to each block listed, as often as it is listed; NULL is passed over."""
    return Blocks(blocks.refcount + references(ids, blocks.refcount.shape[0]))


def release(blocks: Blocks, ids: Int32[Array, "*cells"]) -> Blocks:
    """One reference less. Nothing is clamped: a double free shows as a negative count in `violations`."""
    return Blocks(blocks.refcount - references(ids, blocks.refcount.shape[0]))


def references(ids: Int32[Array, "*cells"], num_blocks: int) -> Int32[Array, "N"]:
    """How often each block is listed, NULL not counted."""
    flat = ids.ravel()
    listed = jnp.where(flat == NULL, num_blocks, flat)  # dropped: adding 0 to NULL would queue all threads there
    return jnp.zeros(num_blocks, jnp.int32).at[listed].add(1, mode="drop")
