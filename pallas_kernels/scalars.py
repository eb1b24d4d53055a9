"""Numbers of one thread, as MLIR: what kernels that are written for the single thread count with.

Mosaic's arrays belong to a warpgroup; where no layout of theirs says which thread has what, a kernel says it itself.
"""

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

VECTOR = 8
"""Elements of 16 bits that a thread moves at once: 16 bytes."""


def i32():
    """The type that threads count in."""
    return ir.IntegerType.get_signless(32)


def const(value: int):
    """An i32."""
    return utils.c(value, i32())


def times(number, size: int):
    """Number * size."""
    return arith.muli(number, const(size))


def split(number, size: int):
    """Quotient and rest."""
    return arith.divui(number, const(size)), arith.remui(number, const(size))


def less(number, end: int):
    """Number < end, both without a sign."""
    return arith.cmpi(arith.CmpIPredicate.ult, number, const(end))


def equal(number, value: int):
    """Number == value."""
    return arith.cmpi(arith.CmpIPredicate.eq, number, const(value))


def place(number):
    """As an index of memory."""
    return arith.index_cast(ir.IndexType.get(), number)
