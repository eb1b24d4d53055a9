"""Failure as data: inside jit a verb answers with a status, and the host raises once, at the end.

jit    append(table, count) -> (the same table, bit for bit, OUT_OF_BLOCKS)
host   check(status)        -> PagingError: OUT_OF_BLOCKS: no free block was left ...
"""

import enum

import jax.numpy as jnp

from paxattn.typing import Array, Bool, Int32


class Status(enum.IntEnum):
    """What became of a verb, as an int32 scalar under jit. Anything but OK left the state as it was."""

    OK = 0
    OUT_OF_BLOCKS = 1
    ROW_FULL = 2
    OVER_BUDGET = 3
    BAD_COUNT = 4

    @property
    def message(self) -> str:
        """What happened and what to do next."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.OK: "all went well.",
    Status.OUT_OF_BLOCKS: "no free block was left in the pool; free or truncate rows, or raise num_blocks.",
    Status.ROW_FULL: "a row would outgrow its page table; raise max_model_len (pages a row x block_size).",
    Status.OVER_BUDGET: "the counts of one step sum to more than its token budget; "
    "feed fewer tokens or raise max_num_batched_tokens.",
    Status.BAD_COUNT: "a row was asked to grow by a negative count; counts are >= 0, truncate shortens.",
}


class PagingError(RuntimeError):
    """A status other than OK, raised on the host."""


def first(*failures: tuple[Bool[Array, ""], Status]) -> Int32[Array, ""]:
    """The status of the first condition that holds, OK where none does."""
    status = jnp.int32(Status.OK)
    for failed, code in reversed(failures):
        status = jnp.where(failed, jnp.int32(code), status)
    return status


def check(status: Int32[Array, ""]) -> None:
    """Raises `PagingError` on the host unless the status is OK, on every data shard where there are several."""
    if (code := Status(int(jnp.max(status)))) is not Status.OK:
        raise PagingError(f"{code.name}: {code.message}")
