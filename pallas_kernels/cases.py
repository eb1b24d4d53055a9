"""Shape cases by name, shared by tests, benchmarks and ablations.

    lengths  tokens each row holds, its queries included      counts  queries of each row (0: idle)

`make` draws the arrays of a case: pages at random, NaN in every slot that no row holds or that lies behind its window.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of paged attention."""

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 4
    idle: int = 0  # tokens on the axis that belong to no row
    shared: bool = False  # rows share the blocks of row 0 as far as they go
    sliding_window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    hint: bool = True  # whether the caller knows the counts when the program is traced

    @property
    def max_queries(self) -> int | None:
        """The hint that a caller would give: decode and verify steps know it, prompts have none."""
        return max(self.counts) if self.hint and max(self.counts) <= 8 else None

    @property
    def options(self) -> dict:
        """Keyword arguments of the call."""
        return {"sliding_window": self.sliding_window, "soft_cap": self.soft_cap, "scale": self.scale}

    @property
    def all_options(self) -> dict:
        """Keyword arguments with the hint, and nothing left to a default."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return {**self.options, "scale": scale, "max_queries": self.max_queries}


class Arrays(NamedTuple):
    """Positional arguments of `paged_attention`, NumPy."""

    q: np.ndarray
    k_pool: np.ndarray
    v_pool: np.ndarray
    pages: np.ndarray
    length: np.ndarray
    query_start: np.ndarray


CASES = {
    "decode": Case((5, 8, 1, 13), (1, 1, 1, 1)),
    "decode-mha": Case((9, 3), (1, 1), heads=3, kv_heads=3),
    "decode-mqa": Case((9, 3), (1, 1), heads=5, kv_heads=1),
    "decode-idle-rows": Case((5, 0, 7), (1, 0, 1), idle=1),
    "decode-block-edges": Case((3, 4, 5, 8, 9), (1, 1, 1, 1, 1)),
    "decode-block-1": Case((3, 7, 1), (1, 1, 1), block_size=1),
    "decode-block-16": Case((300, 17, 16, 15, 1), (1, 1, 1, 1, 1), block_size=16),
    "decode-block-256": Case((300, 256, 257, 2), (1, 1, 1, 1), block_size=256),
    "decode-giant-among-tiny": Case((700, 1, 1, 2, 1), (1, 1, 1, 1, 1), block_size=16),
    "decode-shared": Case((12, 9, 5), (1, 1, 1), shared=True),
    "decode-window": Case((3, 4, 5, 40), (1, 1, 1, 1), sliding_window=4),
    "decode-window-1": Case((3, 40), (1, 1), sliding_window=1),
    "decode-window-beyond-a-chunk": Case((500, 200), (1, 1), sliding_window=40),
    "decode-soft-cap": Case((5, 30), (1, 1), soft_cap=2.0),
    "decode-scale": Case((5, 30), (1, 1), scale=0.7),
    "verify": Case((9, 20, 6), (4, 4, 4)),
    "prefill-one-row": Case((130,), (130,), block_size=16),
    "prefill-ragged": Case((70, 1, 7, 33), (70, 1, 7, 33), block_size=16),
    "prefill-chunked": Case((90, 40, 12), (30, 1, 12), idle=5, block_size=16),
    "prefill-window": Case((90, 20), (70, 20), sliding_window=17),
    "mixed": Case((64, 31, 0, 8, 200), (16, 1, 0, 8, 1), idle=3),
}

_llama = functools.partial(Case, heads=32, kv_heads=8, head_dim=128, block_size=16)
_tiny = functools.partial(Case, heads=4, kv_heads=2, head_dim=64, block_size=16)

HOPPER_CASES = {  # head sizes, block sizes and lengths that the kernels for Hopper are made for
    "decode": _llama((5000, 8, 1, 130, 15, 16, 17, 64, 65, 63), (1,) * 10),
    "decode-block-8": Case((5, 8, 1, 130, 700), (1,) * 5, heads=9, kv_heads=3, head_dim=64, block_size=8),
    "decode-block-128": _llama((5000, 8, 1, 130, 127, 128, 129), (1,) * 7, block_size=128),
    "decode-mha": Case((5, 8, 1, 130, 700), (1,) * 5, heads=3, kv_heads=3, head_dim=64, block_size=16),
    "decode-mqa": Case((5000, 8, 1, 130), (1,) * 4, heads=64, kv_heads=1, head_dim=128, block_size=16),
    "decode-group-12": Case((5000, 8, 1, 130), (1,) * 4, heads=24, kv_heads=2, head_dim=128, block_size=16),
    "decode-head-256": Case((5000, 8, 1, 130), (1,) * 4, heads=8, kv_heads=2, head_dim=256, block_size=16),
    "decode-idle-rows": _llama((5, 0, 3000), (1, 0, 1), idle=1),
    "decode-giant-among-tiny": _llama((20000, *(1,) * 30), (1,) * 31),
    "decode-512-rows": Case(tuple(range(1, 513)), (1,) * 512, heads=8, kv_heads=2, head_dim=128, block_size=16),
    "decode-shared": _llama((1200, 900, 55), (1, 1, 1), shared=True),
    "decode-window": _llama((9, 3000, 64, 200, 100, 101), (1,) * 6, sliding_window=100),
    "decode-soft-cap": _llama((9, 70, 2000), (1, 1, 1), soft_cap=2.0),
    "decode-scale": _llama((9, 70, 2000), (1, 1, 1), scale=0.3),
    "verify": _llama((9, 1000, 6, 77), (4, 4, 4, 4)),
    "verify-5": _llama((9, 1000, 6, 77), (5, 5, 5, 5)),  # 20 rows: no power of two, no multiple of 8
    "verify-5-head-64": Case((9, 1000, 6), (5, 5, 5), heads=9, kv_heads=3, head_dim=64, block_size=16),
    "verify-ragged": _llama((900, 1000, 60, 77), (8, 8, 3, 8), idle=5),
    "verify-window": _llama((9, 3000, 64, 200), (4,) * 4, sliding_window=100),
    "prefill": _llama((300,), (300,)),
    "prefill-last-token": _llama((300,), (1,), hint=False),
    "prefill-ragged": _llama((70, 1, 7, 233), (70, 1, 7, 233), idle=13),
    "prefill-chunked": _llama((390, 140, 12, 257), (130, 1, 12, 64), idle=1, block_size=128),
    "prefill-window": _llama((390, 140, 12), (230, 70, 12), sliding_window=100),
    "prefill-soft-cap": _llama((390, 140), (130, 70), soft_cap=2.0, scale=0.3),
    "prefill-head-64": Case((390, 140), (130, 70), heads=9, kv_heads=3, head_dim=64, block_size=8),
    "prefill-head-256": Case((390, 140), (130, 70), heads=4, kv_heads=2, head_dim=256, block_size=16),
    "mixed": _llama((640, 1, 0, 80, 2000, 33), (160, 1, 0, 8, 1, 33), idle=3),
}

TINY_CASES = {  # small enough to run the kernels' bodies in an interpreter
    "decode": _tiny((5, 8, 1, 130), (1, 1, 1, 1), block_size=8),
    "decode-odd-group": _tiny((5, 0, 150), (1, 0, 1), idle=1, heads=6),
    "decode-window": _tiny((9, 200, 64), (1, 1, 1), sliding_window=70),
    "decode-soft-cap": _tiny((9, 70), (1, 1), soft_cap=2.0, head_dim=128, block_size=64),
    "verify": _tiny((9, 100, 6), (4, 4, 4)),
    "prefill-last-token": _tiny((70,), (1,), hint=False),
    "mixed": _tiny((70, 33, 0, 9, 40), (70, 1, 0, 3, 1), idle=2),  # one worker has an idle item, then one that is not
}


def make(case: Case, seed: int = 0, dtype=np.float32) -> Arrays:
    """The arrays of a case; block names are random, block 0 and every slot that no query may see are NaN."""
    rng = np.random.default_rng(seed)
    rows, size = len(case.lengths), case.block_size
    pages_of = [-(-n // size) for n in case.lengths]
    width = max(*pages_of, 1) + 1
    cells = np.arange(width) < np.array(pages_of)[:, None]
    num_blocks = 2 + cells.sum() * 3 // 2
    pages = np.zeros((rows, width), np.int32)
    pages[cells] = rng.permutation(num_blocks - 1)[: cells.sum()] + 1
    if case.shared:
        pages = np.where(cells, pages[:1], 0)

    held = np.zeros((num_blocks, size), bool)
    for row, (length, count) in enumerate(zip(case.lengths, case.counts, strict=True)):
        behind = 0 if case.sliding_window is None else max(length - count - case.sliding_window + 1, 0)
        at = np.arange(behind, length)
        held[pages[row, at // size], at % size] = True
    shape = (num_blocks, case.kv_heads, size, case.head_dim)

    def pool():
        return np.where(held[:, None, :, None], rng.standard_normal(shape), np.nan).astype(dtype)

    q = rng.standard_normal((sum(case.counts) + case.idle, case.heads, case.head_dim)).astype(dtype)
    query_start = np.concatenate([[0], np.cumsum(case.counts)]).astype(np.int32)
    return Arrays(q, pool(), pool(), pages, np.array(case.lengths, np.int32), query_start)
