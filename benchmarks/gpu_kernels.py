"""Paged attention alone on one GPU: decode in GB/s of live K + V, prefill in TFLOP/s, beside FlashInfer's.

    compile   all programs in threads, while the peer builds its kernels in a process of its own (--peer-python)
    peer      FlashInfer on the same cases, alone on the card (flashinfer_kernels.py)
    decode    8 calls over 8 random page tables, in a loop in one program -> ms a call    kernels.json
    prefill   4 calls, likewise                                           -> ms a call    prefill.json

Pools are larger than the cache of the chip and each call reads other pages. The ceiling is a plain reduction over 8 GB
in the same run. A prefill case whose block holds the whole row is the contiguous kernel to compare paging with.
"""

import argparse
import functools
import json
import math
import re
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import record

from pallas_kernels import paged_attention

HEADS, KV_HEADS = 32, 8
DECODE = ((1, 4096), (1, 131072), (8, 1024), (32, 8192), (64, 2048), (256, 1024))
RAGGED = ((32, 8192), (256, 1024))
HALF = (("decode", 128, 512), ("ragged", 256, 1024))  # with heads of 64, as in models of 1B and less
PREFILL = ((1, 16384), (4, 4096), (16, 1024))
TABLES = {"decode": 8, "ragged": 8, "prefill": 4}
# Best of FlashInfer and FlashAttention 3 on a card of this kind, an earlier run: block 16, block 128.
PUBLISHED = {
    "decode 1 x 4096": (848, 859),
    "decode 1 x 131072": (2666, 2719),
    "decode 8 x 1024": (1277, 1303),
    "decode 32 x 8192": (2885, 2918),
    "decode 64 x 2048": (2718, 2702),
    "decode 256 x 1024": (2847, 2854),
    "ragged 32 x 8192": (2460, 2712),
    "ragged 256 x 1024": (2660, 2719),
    "prefill 1 x 16384": (600, 671),
    "prefill 4 x 4096": (471, 574),
    "prefill 16 x 1024": (371, 404),
}
METHOD = """Host clock around a blocking call; (time of many loop iterations - time of one) over the calls between them,
median. Bytes: K and V of live tokens. FLOP: 4 D H a visible pair. peer: the better of the peer measured in
this run (peer_measured: FlashInfer 0.6.12 in a PyTorch process on the same card) and of FlashInfer and FlashAttention 3
in an earlier run on another draw of lengths (peer_published); peer_source says which."""


class Case(NamedTuple):
    """One row of a result: `rows` rows of `context` tokens (at most, if ragged) in blocks of `block`."""

    kind: str
    rows: int
    context: int
    block: int
    head_dim: int = 128

    @property
    def name(self) -> str:
        """Without the block size."""
        return f"{self.kind} {self.rows} x {self.context}" + (f" head {self.head_dim}" if self.head_dim != 128 else "")

    @property
    def length(self) -> np.ndarray:
        """Tokens of each row; a ragged draw is the same for every block size and peer."""
        if self.kind != "ragged":
            return np.full(self.rows, self.context)
        return np.random.default_rng(self.rows).integers(1, self.context + 1, self.rows)

    @property
    def queries(self) -> int:
        """Queries a row."""
        return self.context if self.kind == "prefill" else 1

    @property
    def loops(self) -> tuple[int, ...]:
        """How often its programs go over the tables: what is measured is a difference, in which launches drop out."""
        calls = 2e-2 * 2.5e12 / (self.bytes * TABLES[self.kind])  # 20 ms
        return (1, 5) if self.kind == "prefill" else (1, 1 + max(2, min(40, int(calls))))

    @property
    def bytes(self) -> int:
        """K and V of the live tokens."""
        return 4 * int(self.length.sum()) * KV_HEADS * self.head_dim

    @property
    def flop(self) -> int:
        """Of the visible pairs."""
        return 4 * self.head_dim * HEADS * self.rows * (self.context * (self.context + 1) // 2)

    def shapes(self, size: int) -> tuple:
        """Of q, k, v, tables, length, query_start; `size` elements a pool."""
        sds, block = jax.ShapeDtypeStruct, (KV_HEADS, self.block, self.head_dim)
        pool = sds((size // math.prod(block), *block), jnp.bfloat16)
        return (
            sds((self.rows * self.queries, HEADS, self.head_dim), jnp.bfloat16),
            pool,
            pool,
            (sds((self.rows, -(-self.context // self.block)), jnp.int32),) * TABLES[self.kind],
            sds((self.rows,), jnp.int32),
            sds((self.rows + 1,), jnp.int32),
        )


def program(q, k, v, tables, length, start, *, loops: int, attention: str, max_queries: int | None):
    """`loops` times all page tables, each call fed with the last one's result."""

    def once(_, q):
        for table in tables:
            q, _lse = paged_attention(q, k, v, table, length, start, max_queries=max_queries, implementation=attention)
        return q

    return jax.lax.fori_loop(0, loops, once, q)


def compile_all(cases: list[Case], size: int, attention: str) -> dict[Case, list]:
    """The programs of all cases, compiled side by side."""

    def compiled(case):
        few = None if case.kind == "prefill" else 1
        make = functools.partial(program, attention=attention, max_queries=few)
        return [jax.jit(functools.partial(make, loops=n)).lower(*case.shapes(size)).compile() for n in case.loops]

    with ThreadPoolExecutor(16) as pool:
        return dict(zip(cases, pool.map(compiled, cases), strict=True))


def arguments(case: Case, pools: list) -> tuple:
    """What `program` is given: queries, K and V pool, random page tables, lengths, where queries begin."""
    shapes = case.shapes(pools[0].size)
    rng, num_tables, (rows, pages) = np.random.default_rng(0), len(shapes[3]), shapes[3][0].shape
    blocks = shapes[1].shape[0]
    tables = [rng.permutation(blocks)[: rows * pages].reshape(rows, pages) for _ in range(num_tables)]
    return (
        jax.random.normal(jax.random.key(3), shapes[0].shape, jnp.bfloat16),
        *(pool.reshape(shapes[1].shape) for pool in pools),
        tuple(jnp.asarray(table, jnp.int32) for table in tables),  # apart: a slice of few ids is a kernel of its own
        jnp.asarray(case.length, jnp.int32),
        jnp.arange(case.rows + 1, dtype=jnp.int32) * case.queries,
    )


def measure(case: Case, programs: list, pools: list, repeats: int) -> dict:
    """One row of a result: milliseconds, GB/s or TFLOP/s, and the samples in seconds."""
    given = arguments(case, pools)

    def seconds(program):
        began = time.perf_counter()
        jax.block_until_ready(program(*given))
        return time.perf_counter() - began

    def sample():
        return (seconds(programs[1]) - seconds(programs[0])) / (TABLES[case.kind] * (case.loops[1] - case.loops[0]))

    for one in programs:
        seconds(one)
    samples = [sample() for _ in range(repeats + 1)][1:]  # the first differs, though all is warm
    took = statistics.median(samples)
    prefill = case.kind == "prefill"
    speed = {"tflop_per_s": case.flop / took / 1e12} if prefill else {"gb_per_s": case.bytes / took / 1e9}
    return {"ms": 1e3 * took, **speed, "samples": samples}


def ceiling(size: int) -> float:
    """GB/s of a plain reduction over `size` bytes."""
    x = jax.jit(lambda: jax.random.bits(jax.random.key(0), (size // 4096, 1024), jnp.uint32))()

    @jax.jit
    def read(x, n):
        return jax.lax.fori_loop(0, n, lambda i, s: s + jnp.max(x ^ i.astype(jnp.uint32), axis=1).sum(), jnp.uint32(0))

    def seconds(n):
        began = time.perf_counter()
        read(x, n).block_until_ready()
        return time.perf_counter() - began

    seconds(1), seconds(9)
    return x.nbytes / statistics.median((seconds(9) - seconds(1)) / 8 for _ in range(5)) / 1e9


def start_peer(python: str | None, cases: list[Case]) -> subprocess.Popen | None:
    """FlashInfer in a process of its own, which builds its kernels and then waits for a word."""
    if python is None:
        return None
    script = Path(__file__).with_name("flashinfer_kernels.py")
    return subprocess.Popen(
        [python, script, json.dumps(cases)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def peer_figures(peer: subprocess.Popen | None) -> dict[str, float]:
    """GB/s or TFLOP/s by case and block; empty where the peer cannot run."""
    if peer is None:
        return {}
    out, _ = peer.communicate("go\n")
    if peer.returncode:
        print("no peer in this run: see above")
        return {}
    return json.loads(out.splitlines()[-1])


def row_of(case: Case, figures: dict, measured: float | None, top: float) -> tuple[str, dict]:
    """The result that a row belongs to, and the row."""
    published = dict(zip((16, 128), PUBLISHED.get(case.name, ()), strict=False)).get(case.block)
    best = max((x for x in (measured, published) if x), default=None)
    peers = {
        "peer_source": None if best is None else "this run" if best == measured else "earlier run",
        "peer_measured": measured,
        "peer_published": published,
    }
    if case.kind == "prefill":
        row = {"rows": case.rows, "tokens": case.context, "block_size": case.block, **figures}
        return "prefill", row | {"contiguous": case.block == case.context, "peer_tflop_per_s": best, **peers}
    row = {"case": case.name, "rows": case.rows, "context": case.context, "ragged": case.kind == "ragged"}
    row |= {"head_dim": case.head_dim, "block_size": case.block, **figures, "ceiling_gb_per_s": top}
    return "kernels", row | {"peer": "best of FlashInfer and FlashAttention 3", "peer_gb_per_s": best, **peers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter with PyTorch and FlashInfer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--only", help="cases whose name this expression finds")
    record.add_options(parser, "kernels.json and prefill.json", tiny="small cases, to try the script")
    options = parser.parse_args()
    cases = [Case("decode", *shape, block) for shape in DECODE for block in (8, 16, 128)]
    cases += [Case("ragged", *shape, block) for shape in RAGGED for block in (16, 128)]
    cases += [Case(*shape, 16, 64) for shape in HALF]
    cases += [Case("prefill", *shape, block) for shape in PREFILL for block in (16, 128, shape[1])]
    if options.tiny:
        cases = [Case(kind, 2, 64, 16) for kind in ("decode", "ragged", "prefill")] + [Case("decode", 2, 64, 16, 64)]
    cases = [case for case in cases if re.search(options.only or "", case.name)]
    size = (768 if options.tiny else (1 << 18) + (1 << 14)) * KV_HEADS * 128  # elements of a pool
    peer = start_peer(options.peer_python, [case for case in cases if case.block in (16, 128)])
    programs = compile_all(cases, size, options.attention)
    peers = peer_figures(peer)
    top = ceiling(1 << (22 if options.tiny else 33))
    print(f"read ceiling {top:.0f} GB/s")
    normal = jax.jit(lambda key: jax.random.normal(key, (size,), jnp.bfloat16))
    pools = [normal(jax.random.key(seed)) for seed in (1, 2)]
    results = {"kernels": [], "prefill": []}
    for case in cases:
        figures = measure(case, programs.pop(case), pools, options.repeats)
        which, row = row_of(case, figures, peers.get(json.dumps(case)), top)
        results[which].append(row)
        ours = row["tflop_per_s"] if which == "prefill" else row["gb_per_s"]
        best = row["peer_tflop_per_s"] if which == "prefill" else row["peer_gb_per_s"]
        print(
            f"{case.name:26} block {case.block:5}  {row['ms']:8.4f} ms  {ours:7.1f}  "
            + (f"{ours / best:.3f} of {best:.0f} ({row['peer_source']}; {row['peer_measured']})" if best else ""),
            flush=True,
        )
        if options.save:  # after each row: a run that is cut leaves what it has
            record.write(which, results[which], method=METHOD)


if __name__ == "__main__":
    main()
