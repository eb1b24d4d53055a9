"""Paged attention alone on one GPU: decode in GB/s of live K + V, prefill in TFLOP/s, beside FlashInfer's.

    decode    8 calls over 8 random page tables, in a loop in one program -> ms a call    kernels.json
    prefill   4 calls in one program                                      -> ms a call    prefill.json
    peer      the same cases in a PyTorch process (flashinfer_kernels.py), where that can be had: --peer-python

Pools are larger than the cache of the chip, page tables are random, each call reads other pages. The ceiling is a plain
reduction over 8 GB in the same run.
"""

import argparse
import functools
import json
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import record

from pallas_kernels import paged_attention

HEADS, KV_HEADS, DIM = 32, 8, 128
DECODE = ((1, 4096), (1, 131072), (8, 1024), (32, 8192), (64, 2048), (256, 1024))
RAGGED = ((32, 8192), (256, 1024))
PREFILL = ((1, 16384), (4, 4096), (16, 1024))
TABLES = 8
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
METHOD = """Host clock around a blocking call, median; decode: (time of many loop iterations - time of one) over the
calls between them. Bytes: K and V of live tokens. FLOP: 4 D H a visible pair. Peer: FlashInfer in a PyTorch process on
the same machine where peer_source says so, otherwise the best of FlashInfer and FlashAttention 3 in an earlier run."""


def lengths_of(rows: int, context: int, ragged: bool) -> np.ndarray:
    """Tokens that each row holds; a ragged draw is the same for every block size and peer."""
    return np.random.default_rng(rows).integers(1, context + 1, rows) if ragged else np.full(rows, context)


def arrays(rows: int, context: int, block: int, ragged: bool, tables: int):
    """Page tables, pools, lengths: pools of 1 GB and more."""
    pages = -(-context // block)
    blocks = max(rows * pages, (1 << 29) // (KV_HEADS * block * DIM * 2)) + 1
    rng = np.random.default_rng(0)
    table = np.stack([rng.permutation(blocks - 1)[: rows * pages].reshape(rows, pages) + 1 for _ in range(tables)])
    normal = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), (blocks, KV_HEADS, block, DIM), jnp.bfloat16))
    return jnp.asarray(table, jnp.int32), normal(1), normal(2), lengths_of(rows, context, ragged)


def decode_program(attention, tables, q, k, v, length, start, loops):
    """`loops` times all page tables, each call fed with the last one's result."""

    def once(_, q):
        for table in tables:
            q, _lse = paged_attention(q, k, v, table, length, start, max_queries=1, implementation=attention)
        return q

    return jax.lax.fori_loop(0, loops, once, q)


def decode(case, *, repeats: int, attention: str) -> dict:
    """One row of kernels.json."""
    rows, context, block, ragged = case
    tables, k, v, length = arrays(rows, context, block, ragged, TABLES)
    q = jax.random.normal(jax.random.key(3), (rows, HEADS, DIM), jnp.bfloat16)
    given = tables, q, k, v, jnp.asarray(length, jnp.int32), jnp.arange(rows + 1, dtype=jnp.int32)
    size = 4 * int(length.sum()) * KV_HEADS * DIM
    many = 1 + max(2, min(40, int(2e-2 * 2.5e12 / (size * TABLES))))
    programs = [jax.jit(functools.partial(decode_program, attention, loops=n)).lower(*given) for n in (1, many)]
    with ThreadPoolExecutor(2) as pool:
        one, more = pool.map(lambda lowered: lowered.compile(), programs)

    def seconds(program):
        began = time.perf_counter()
        jax.block_until_ready(program(*given))
        return time.perf_counter() - began

    seconds(one), seconds(more)
    samples = [(seconds(more) - seconds(one)) / (TABLES * (many - 1)) for _ in range(repeats)]
    took = statistics.median(samples)
    return {"ms": 1e3 * took, "gb_per_s": size / took / 1e9, "samples": samples}


def prefill(case, *, repeats: int, attention: str) -> dict:
    """One row of prefill.json."""
    rows, tokens, block = case
    tables, k, v, length = arrays(rows, tokens, block, ragged=False, tables=4)
    q = jax.random.normal(jax.random.key(3), (rows * tokens, HEADS, DIM), jnp.bfloat16)

    @jax.jit
    def program(q, k, v, tables, length, start):
        for table in tables:
            q, _ = paged_attention(q, k, v, table, length, start, implementation=attention)
        return q

    given = q, k, v, tables, jnp.asarray(length, jnp.int32), jnp.arange(rows + 1, dtype=jnp.int32) * tokens
    jax.block_until_ready(program(*given))
    samples = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(program(*given))
        samples.append((time.perf_counter() - began) / len(tables))
    took = statistics.median(samples)
    flop = 4 * DIM * HEADS * rows * (tokens * (tokens + 1) // 2)
    return {"ms": 1e3 * took, "tflop_per_s": flop / took / 1e12, "samples": samples}


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


def peer_figures(python: str | None, cases: list) -> dict[str, float]:
    """GB/s or TFLOP/s of FlashInfer by case and block, from a process of its own; empty where it cannot run."""
    if python is None:
        return {}
    script = Path(__file__).with_name("flashinfer_kernels.py")
    done = subprocess.run([python, script, json.dumps(cases)], capture_output=True, text=True, check=False)
    if done.returncode:
        print("no peer in this run:", done.stderr[-500:])
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter with PyTorch and FlashInfer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--tiny", action="store_true", help="small cases, to try the script")
    parser.add_argument(
        "--save", action="store_true", help="write kernels.json and prefill.json of benchmarks/results/h100"
    )
    options = parser.parse_args()
    run = {"repeats": options.repeats, "attention": options.attention}
    kinds = [("decode", r, c, b) for r, c in DECODE for b in (8, 16, 128)]
    kinds += [("ragged", r, c, b) for r, c in RAGGED for b in (16, 128)]
    kinds += [("prefill", r, c, b) for r, c in PREFILL for b in (16, 128)]
    if options.tiny:
        kinds = [("decode", 2, 64, 16), ("ragged", 2, 64, 16), ("prefill", 2, 48, 16)]
    peers = peer_figures(options.peer_python, kinds)
    top = ceiling(1 << (22 if options.tiny else 33))
    print(f"read ceiling {top:.0f} GB/s")
    results = {"kernels": [], "prefill": []}
    for kind, rows, context, block in kinds:
        name = f"{kind} {rows} x {context}"
        published = dict(zip((16, 128), PUBLISHED.get(name, ()), strict=False)).get(block)
        measured = peers.get(f"{name} block {block}")
        source = "this run" if measured else "earlier run"
        if kind == "prefill":
            row = {"rows": rows, "tokens": context, "block_size": block}
            row |= prefill((rows, context, block), **run) | {"peer_tflop_per_s": measured or published}
            ours, best = row["tflop_per_s"], row["peer_tflop_per_s"]
        else:
            row = {"case": name, "rows": rows, "context": context, "ragged": kind == "ragged", "block_size": block}
            row |= decode((rows, context, block, kind == "ragged"), **run)
            row |= {"ceiling_gb_per_s": top, "peer": "FlashInfer", "peer_gb_per_s": measured or published}
            ours, best = row["gb_per_s"], row["peer_gb_per_s"]
        row |= {"peer_source": source, "peer_published": published}
        results["prefill" if kind == "prefill" else "kernels"].append(row)
        print(
            f"{name:20} block {block:3}  {row['ms']:8.4f} ms  {ours:7.1f}  peer {best}  published {published}",
            flush=True,
        )
    if options.save:
        for name, rows in results.items():
            print(record.write(name, rows, method=METHOD, folder="h100"))


if __name__ == "__main__":
    main()
