"""FlashInfer's paged attention on the cases of gpu_kernels.py, in a process with PyTorch: one JSON object at the end.

A case is [kind, rows, context, block, head size]. Decode takes the faster of tensor cores and CUDA cores, prefill the
backend `fa3`. Kernels are built first; measuring waits for a line on the standard input: the card is then ours alone.
"""

import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor

import flashinfer
import numpy as np
import torch

HEADS, KV_HEADS = 32, 8
TABLES = 8


def lengths_of(rows: int, context: int, ragged: bool) -> np.ndarray:
    """As in gpu_kernels.py."""
    return np.random.default_rng(rows).integers(1, context + 1, rows) if ragged else np.full(rows, context)


def pages_of(length, block, blocks, rng):
    """CSR page table over random blocks, on the device."""
    counts = -(-length // block)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    indices = rng.permutation(blocks)[: indptr[-1]].astype(np.int32)
    last = (length - 1) % block + 1
    return (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (indptr, indices, last))


def captured(call, calls: int, loops: int) -> torch.cuda.CUDAGraph:
    """A graph of `loops` times `call(i)` for i < calls."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(loops):
            for i in range(calls):
                call(i)
    return graph


def elapsed(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of a replay, its launch included."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def seconds(call, calls: int) -> float:
    """A call: median of 5 differences between replays of nine loops and of one, as ours are; a launch drops out."""
    for i in range(calls):
        call(i)
    torch.cuda.synchronize()
    one, nine = (captured(call, calls, loops) for loops in (1, 9))
    times = [(elapsed(nine) - elapsed(one)) / (8 * calls) for _ in range(6)]
    return statistics.median(times[1:])


def once(call, calls: int) -> float:
    """In the place of `seconds`: no more than builds the kernel."""
    call(0)
    return 1.0


def measure(kind: str, rows: int, context: int, block: int, dim: int, seconds=seconds, cores=(True, False)) -> float:
    """GB/s, or TFLOP/s of prefill; `cores`: with and without tensor cores."""
    length = lengths_of(rows, context, kind == "ragged")
    blocks = max(rows * -(-context // block), (1 << 29) // (KV_HEADS * block * dim * 2))
    pools = [torch.randn(blocks, KV_HEADS, block, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    rng = np.random.default_rng(0)
    work = lambda: torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # noqa: E731
    if kind == "prefill":
        q = torch.randn(rows * context, HEADS, dim, dtype=torch.bfloat16, device="cuda")
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(work(), "HND", backend="fa3")
        start = torch.arange(rows + 1, dtype=torch.int32, device="cuda") * context
        wrapper.plan(
            start, *pages_of(length, block, blocks, rng), HEADS, KV_HEADS, dim, block, causal=True, q_data_type=q.dtype
        )
        took = seconds(lambda _: wrapper.run(q, tuple(pools)), 4)
        return 4 * dim * HEADS * rows * (context * (context + 1) // 2) / took / 1e12
    q = torch.randn(rows, HEADS, dim, dtype=torch.bfloat16, device="cuda")
    took = []
    for tensor_cores in cores:
        wrappers = []
        for _ in range(TABLES):
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(work(), "HND", use_tensor_cores=tensor_cores)
            wrapper.plan(*pages_of(length, block, blocks, rng), HEADS, KV_HEADS, dim, block, q_data_type=q.dtype)
            wrappers.append(wrapper)
        took.append(seconds(lambda i, w=wrappers: w[i].run(q, tuple(pools)), TABLES))
        del wrappers
    return 4 * int(length.sum()) * KV_HEADS * dim / min(took) / 1e9


def main() -> None:
    cases, figures = json.loads(sys.argv[1]), {}
    with ThreadPoolExecutor() as pool:
        builds = [("prefill", 128, ())] + [("decode", dim, (cores,)) for dim in (128, 64) for cores in (True, False)]
        for kind, dim, cores in builds:  # a failure shows again below, with its case
            pool.submit(measure, kind, 1, 128, 16, dim, once, cores)
    torch.cuda.empty_cache()
    sys.stdin.readline()
    for kind, rows, context, block, dim in cases:
        name = json.dumps([kind, rows, context, block, dim])
        try:
            figures[name] = measure(kind, rows, context, block, dim)
        except Exception as error:
            print(f"{name}: {error}", file=sys.stderr)
        torch.cuda.empty_cache()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
