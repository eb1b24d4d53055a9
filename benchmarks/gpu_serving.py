"""Dynamic batching on a GPU: the serving workload against vLLM's measured rate, and the time split by phase.

    whole   one call of the loop from the first admission to the last token       -> output tokens / s
    split   the same in two calls: the steps that fed prompts, then the rest      -> seconds a phase

256 requests at once, `random.Random(0)`, lengths uniform in 100..1024 each way, no end token, random weights, bf16.
    python benchmarks/gpu_serving.py --save            python benchmarks/gpu_serving.py --tiny
"""

import argparse
import dataclasses
import functools
import gc
import json

import jax
import programs
import record

from models.serve_bench import Bench, workload
from models.shapes import CONFIGS

VLLM = {"8B": 8375.0, "1B": 32993.0, "135M": 27138.0}
"""Output tokens a second: vLLM 0.24, one H100 80GB, lengths by the same rule, block 16, CUDA graphs, FA3."""
BUDGET = {"8B": 4096, "1B": 8192, "135M": 8192, "tiny": 512}
"""Token axis of a step with prompts: long where the matrix products of the model are small."""
EVERYTHING = 2**30  # steps

METHOD = """
All requests are in the queue before the clock starts; the program is compiled ahead of time; eight steps warm; one call
serves everything and is timed on the host until its result is ready. The whole is repeated; median and samples stay.
Split: one more run in two calls, the first as long as the steps that fed prompts. Prompts are random ids,
weights random, greedy.
"""


def blocks_for(weights: int, rows: int, high: int, block_size: int, bytes_per_block: int, share: float) -> int:
    """Enough for all rows, or the given share of the memory that `weights` bytes leave."""
    enough = 1 + rows * -(-2 * high // block_size)
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return enough
    return min(enough, int(share * (stats["bytes_limit"] - weights)) // bytes_per_block)


def bench_of(name: str, options: argparse.Namespace) -> Bench:
    """The workload on the shapes of a model, before there are arrays."""
    model = programs.model_shapes(CONFIGS[name], options.dtype)
    requests = workload(options.requests, options.low, options.high, model.vocab_size)
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))
    block = model.cache_spec.bytes_per_token * options.block_size
    blocks = blocks_for(weights, options.requests, options.high, options.block_size, block, 0.85)
    sizes = options.requests, blocks, options.block_size, options.max_num_batched_tokens or BUDGET[name]
    return Bench(model, requests, *sizes, options.attention, options.trace)


def measure(name: str, bench: Bench, program: jax.stages.Compiled, repeats: int) -> dict:
    """One model: warm, repeat, split."""
    runs = []
    bench.measure([8, 0], program=program)  # warms
    for _ in range(max(repeats, 1)):
        figures = bench.figures(*bench.measure([EVERYTHING], program=program))
        runs.append(figures["seconds"])
    seconds = record.summary(runs)
    _, spans = bench.measure([figures["prefill_steps"], EVERYTHING], program=program)
    (prompts, _), (decode, _) = spans if len(spans) == 2 else (spans[0], (0.0, 0))
    rate, peer = figures["output_tokens"] / seconds["median"], VLLM.get(name)
    return {
        "model": name,
        "seconds": seconds,
        "output_tokens": figures["output_tokens"],
        "output_tokens_per_s": rate,
        "vllm_output_tokens_per_s": peer,
        "times_vllm": rate / peer if peer else None,
        "preemptions": figures["preemptions"],
        "peak_blocks": figures["peak_blocks"],
        "num_blocks": bench.num_blocks,
        "max_num_batched_tokens": bench.max_num_batched_tokens,
        "attention": bench.attention,
        "trace": bench.trace,
        "phases": {
            "prompts": {"seconds": prompts, "steps": figures["prefill_steps"], "tokens": figures["prompt_tokens"]},
            "decode": {"seconds": decode, "steps": figures["steps"] - figures["prefill_steps"]},
        },
    }


def table(lines: list[dict]) -> str:
    """One line a model."""
    heads = "tokens/s", "vLLM", "times", "s", "prompts s", "decode s", "preempted"
    widths = 12, 12, 8, 9, 11, 10, 11
    text = [f"{'model':<8}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))]
    for line in lines:
        peer, times = line["vllm_output_tokens_per_s"] or 0, line["times_vllm"] or 0
        phases = line["phases"]
        text.append(
            f"{line['model']:<8}{line['output_tokens_per_s']:12,.0f}{peer:12,.0f}{times:8.2f}"
            f"{line['seconds']['median']:9.2f}{phases['prompts']['seconds']:11.2f}{phases['decode']['seconds']:10.2f}"
            f"{line['preemptions']:11d}"
        )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", default=["135M", "1B", "8B"], choices=CONFIGS)
    add("--requests", type=int, default=256, help="also the rows")
    add("--low", type=int, default=100)
    add("--high", type=int, default=1024)
    add("--block-size", type=int, default=16)
    add("--max-num-batched-tokens", type=int, help="by default what suits each model")
    add("--dtype", default="bfloat16")
    add("--attention", default="auto")
    add("--repeats", type=int, default=2)
    add("--trace", type=int, default=0, metavar="STEPS", help="record that many iterations, to measure what it costs")
    add("--json", action="store_true")
    record.add_options(parser, "serving.json", tiny="a small model and workload, in seconds on a CPU")
    options = parser.parse_args()
    if options.tiny:
        options.models, options.requests, options.low, options.high, options.dtype = ["tiny"], 8, 5, 40, "float32"
    benches = {name: bench_of(name, options) for name in options.models}
    makes = {(name, "run"): bench.lower for name, bench in benches.items()}
    makes |= {(name, "make"): functools.partial(programs.lower_maker, CONFIGS[name], options.dtype) for name in benches}
    compiled, lines = programs.side_by_side(makes), []
    for name, bench in benches.items():
        bench = dataclasses.replace(bench, model=programs.make(compiled[name, "make"]))
        lines.append(measure(name, bench, compiled[name, "run"], options.repeats))
        del bench
        gc.collect()
        if options.save:  # after each model: a run that is cut leaves what it has
            record.write("serving", lines, method=METHOD)
        print(table(lines[-1:]) if not options.json else "", flush=True)
    document = record.document("serving", lines, method=METHOD)
    print(json.dumps(document, indent=1) if options.json else table(lines))


if __name__ == "__main__":
    main()
