"""How long the token axis of a step is: the lengths that are compiled, and the one that a step takes.

    all rows decode      [ d d d d . . ]                   B, of many rows 3B/4, B/2 .. too: the shortest that fits
    prompts among them   [ d d d p p p p p p p p p . . ]   T = max_num_batched_tokens, T/4, T/16 ..

A step costs its whole axis, however little of it is used. So one prompt that joins rows that decode does not take
the axis of many; and what would fill less than half of an axis fills a shorter one, the rest going into the next step.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from paxattn.typing import Array, Int32

LEAST_WIDTH = 64
"""Tokens below which no shorter axis is compiled: memory, not arithmetic, is the limit of so few."""


def decode_widths(rows: int) -> list[int]:
    """Lengths where all rows decode, the longest first: one token a row, less while fewer are left.

    Three quarters of the rows, as products of 128 tokens and more are limited by arithmetic, then halves of the rows.
    """
    widths = [rows]
    while widths[-1] % 2 == 0 and widths[-1] // 2 >= LEAST_WIDTH:
        widths.append(widths[-1] // 2)
    if rows % 4 == 0 and rows * 3 // 4 >= 2 * LEAST_WIDTH:
        widths.insert(1, rows * 3 // 4)
    return widths


def prompt_widths(budget: int, rows: int) -> list[int]:
    """Lengths where prompts are fed, the longest first: quarters of the budget, at least half of each for prompts."""
    widths = [budget]
    while widths[-1] // 4 >= max(LEAST_WIDTH, 2 * rows):
        widths.append(widths[-1] // 4)
    return widths


def room(need: Int32[Array, ""], widths: Sequence[int]) -> Int32[Array, ""]:
    """Tokens that a step may feed: the shortest axis that fits, or the next, filled, where half were empty."""
    lengths = jnp.array(widths)
    fits = shortest(need, widths)
    half_used = 2 * need > lengths[fits]
    return lengths[jnp.where(half_used, fits, jnp.minimum(fits + 1, len(widths) - 1))]


def shortest(need: Int32[Array, ""], widths: Sequence[int]) -> Int32[Array, ""]:
    """Index of the shortest axis that fits; the longest where none does."""
    return jnp.maximum(jnp.sum(need <= jnp.array(widths)) - 1, 0)
