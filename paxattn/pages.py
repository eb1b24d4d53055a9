"""Page tables: which block holds which tokens of which row, and the verbs that change it.

    append  row 0: [ 3 | 1 ] 6 tokens, S = 4        fork    row 1 <- row 0: the same cells, counts + 1
            + 3   -> [ 3 | 1 | 7 ] 9 tokens         truncate  9 -> 6: block 7 goes back to the pool

    copy-on-write, inside append:   row 0: [ 3 | 1 ]     row 1 writes into the shared, partly filled tail:
                                    row 1: [ 3 | 1 ]  -> row 1: [ 3 | 5 ] and the copy 1 -> 5

Verbs take a table and give a table. They are loop-free, run under jit, and a failed one returns its input
bit for bit. Kwon et al. 2023, "Efficient Memory Management for LLM Serving with PagedAttention", section 4.
"""

import jax
import jax.numpy as jnp

from paxattn.blocks import NULL, Blocks, allocate, references, release, retain
from paxattn.status import Status, first
from paxattn.typing import Array, Bool, Int32, static, struct


@struct
class PageTable:
    """B rows of P pages. Page p of row b holds the tokens [p * S, (p + 1) * S) of that row."""

    pages: Int32[Array, "B P"]
    length: Int32[Array, "B"]
    blocks: Blocks
    block_size: int = static()

    @staticmethod
    def create(*, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int) -> "PageTable":
        """An empty table whose rows can each hold `max_model_len` tokens."""
        for name, value, least in (
            ("block_size", block_size, 1),
            ("num_blocks", num_blocks, 2),
            ("max_num_seqs", max_num_seqs, 1),
            ("max_model_len", max_model_len, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}, must be at least {least}.")
        if jax.dtypes.canonicalize_dtype(jnp.int64) == jnp.int64:
            raise ValueError(
                "paxattn counts in int32: leave jax_enable_x64 off, or call under `jax.enable_x64(False)`."
            )
        return PageTable(
            jnp.zeros((max_num_seqs, -(-max_model_len // block_size)), jnp.int32),
            jnp.zeros(max_num_seqs, jnp.int32),
            Blocks.create(num_blocks),
            block_size,
        )

    @property
    def num_rows(self) -> int:
        """B."""
        return self.pages.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold: P * S."""
        return self.pages.shape[1] * self.block_size

    def pages_for(self, length: Int32[Array, "B"]) -> Int32[Array, "B"]:
        """Pages that rows of these lengths take."""
        return (length + self.block_size - 1) // self.block_size

    def _repr_html_(self) -> str | None:
        """A notebook shows the page map; of stacked tables the fields."""
        from paxattn.viz import page_map

        return page_map(self)._repr_html_() if self.pages.ndim == 2 else None


@struct
class Copies:
    """Block copies that copy-on-write asks for, one a row at most; NULL -> NULL where a row needs none."""

    source: Int32[Array, "B"]
    target: Int32[Array, "B"]

    @property
    def count(self) -> Int32[Array, ""]:
        """How many blocks are copied."""
        return (self.target != NULL).sum(dtype=jnp.int32)


def append(table: PageTable, count: Int32[Array, "B"]) -> tuple[PageTable, Copies, Int32[Array, ""]]:
    """Makes room for `count[b]` more tokens in each row, with private blocks wherever they are written.

    A shared, partly filled tail is replaced by a fresh block, and the copy to make is returned; the last
    holder keeps the original. Fresh tails and copies come from one allocation.

    Returns:
      The table, the copies, and OK, OUT_OF_BLOCKS, ROW_FULL or BAD_COUNT for the verb as a whole.
    """
    page = jnp.arange(table.pages.shape[1])
    end = table.length + count
    used, needed = table.pages_for(table.length), table.pages_for(end)
    tail = table.length // table.block_size
    copy = tails_to_copy(table, count)

    fresh = (page >= used[:, None]) & (page < needed[:, None])
    copied = copy[:, None] & (page == tail[:, None])
    blocks, ids, enough = allocate(table.blocks, fresh | copied)

    source = jnp.where(copy, _block_at(table.pages, tail), NULL)
    target = jnp.where(copied, ids, NULL).sum(axis=1, dtype=jnp.int32)
    grown = PageTable(jnp.where(fresh | copied, ids, table.pages), end, release(blocks, source), table.block_size)
    status = first(
        (jnp.any(count < 0), Status.BAD_COUNT),
        (jnp.any(count > table.capacity - table.length), Status.ROW_FULL),  # whatever `end` wraps to
        (~enough, Status.OUT_OF_BLOCKS),
    )
    ok = status == Status.OK
    nothing = jnp.full_like(source, NULL)
    copies = Copies(jnp.where(ok, source, nothing), jnp.where(ok, target, nothing))
    return jax.tree.map(lambda new, old: jnp.where(ok, new, old), grown, table), copies, status


def _block_at(pages: Int32[Array, "B P"], page: Int32[Array, "B"]) -> Int32[Array, "B"]:
    return jnp.take_along_axis(pages, jnp.minimum(page, pages.shape[1] - 1)[:, None], axis=1)[:, 0]


def tails_to_copy(table: PageTable, count: Int32[Array, "B"]) -> Bool[Array, "B"]:
    """Rows about to write into a partly filled block that somebody else holds too."""
    writes = (count > 0) & (table.length % table.block_size != 0)
    tail = jnp.where(writes, _block_at(table.pages, table.length // table.block_size), NULL)
    row = jnp.arange(table.num_rows)
    shares = (tail[:, None] == tail) & (tail != NULL)  # [B, B]: rows that write into the same block
    last_writer = jnp.max(jnp.where(shares, row, -1), axis=1)
    keeps = (table.blocks.refcount[tail] == jnp.sum(shares, axis=1)) & (last_writer == row)
    return writes & ~keeps


def fork(table: PageTable, parent: Int32[Array, "B"]) -> PageTable:
    """Row b goes on from row `parent[b]`, sharing all its blocks; nothing is copied.

    Beam reordering, parallel sampling and tree search are this one remap. `parent[b] == b` leaves a row as it
    is; a parent outside [0, B) empties it.
    """
    lives = (parent >= 0) & (parent < table.num_rows)
    pages = jnp.where(lives[:, None], table.pages[parent], NULL)
    blocks = release(retain(table.blocks, pages), table.pages)
    return PageTable(pages, jnp.where(lives, table.length[parent], 0), blocks, table.block_size)


def truncate(table: PageTable, length: Int32[Array, "B"]) -> PageTable:
    """Rolls rows back to `length[b]` tokens and releases the blocks past the new end.

    The exact inverse of `append` where that copied nothing. A row never grows: lengths are cut to
    [0, its length].
    """
    length = jnp.clip(length, 0, table.length)
    kept = jnp.arange(table.pages.shape[1]) < table.pages_for(length)[:, None]
    blocks = release(table.blocks, jnp.where(kept, NULL, table.pages))
    return PageTable(jnp.where(kept, table.pages, NULL), length, blocks, table.block_size)


def free(table: PageTable, rows: Bool[Array, "B"]) -> PageTable:
    """Empties rows; a block whose last holder this was is free at once."""
    return truncate(table, jnp.where(rows, 0, table.length))


def locate(
    table: PageTable, row: Int32[Array, "*t"], position: Int32[Array, "*t"]
) -> tuple[Int32[Array, "*t"], Int32[Array, "*t"]]:
    """Block and slot of a row's token; (NULL, 0) for positions the row does not hold."""
    held = (position >= 0) & (position < table.length[row])
    position = jnp.where(held, position, 0)
    block = jnp.where(held, table.pages[row, position // table.block_size], NULL)
    return block, position % table.block_size


def violations(table: PageTable) -> dict[str, Int32[Array, ""]]:
    """How often each invariant of the table is broken; all zero in a sound one."""
    num_blocks = table.blocks.refcount.shape[0]
    pages, refcount = table.pages, table.blocks.refcount
    live = jnp.arange(pages.shape[1]) < table.pages_for(table.length)[:, None]
    valid = (pages >= 0) & (pages < num_blocks)
    distinct = jnp.where(live & (pages != NULL), pages, -1 - jnp.arange(pages.shape[1]))
    ordered = jnp.sort(distinct, axis=1)
    broken = {
        "refcount is not the number of cells": refcount != references(jnp.where(valid, pages, NULL), num_blocks),
        "refcount is negative": refcount < 0,
        "NULL is in use": refcount[NULL] != 0,
        "block id is out of range": ~valid,
        "live page has no block": live & (pages == NULL),
        "dead page holds a block": ~live & (pages != NULL),
        "row holds a block twice": ordered[:, 1:] == ordered[:, :-1],
        "length is out of range": (table.length < 0) | (table.length > table.capacity),
    }
    return {name: jnp.sum(where, dtype=jnp.int32) for name, where in broken.items()}
