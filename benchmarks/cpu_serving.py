"""Throughput of a CPU: SmolLM2, 32 requests over 8 rows in one program, against the same requests one by one.

    batched     pax.serve over 8 rows; a row that ends early takes the next request
    one by one  the same program with one row, so that each request is alone on the machine

Random weights of SmolLM2-135M shapes, float32, greedy, no end token; the two sides take turns in one run.
"""

import argparse
import json

import jax
import record

from models.llama import random_llama
from models.serve_bench import Bench, workload
from models.shapes import CONFIGS

METHOD = """
Both sides serve all requests from the start; compiled ahead of time; one call each, timed on the host until its result
is ready, in turns, the first turn dropped. Lengths of prompts and answers are uniform between low and high.
The token axis of steps with prompts is rows + high for the batched side and high for the other.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shapes", default="135M", choices=CONFIGS)
    add("--requests", type=int, default=32)
    add("--rows", type=int, default=8)
    add("--low", type=int, default=16)
    add("--high", type=int, default=64)
    add("--rounds", type=int, default=3)
    add("--json", action="store_true")
    record.add_options(parser, "cpu_serving.json", tiny="a small model, in seconds")
    options = parser.parse_args()
    config = CONFIGS["tiny" if options.tiny else options.shapes]
    model = random_llama(config, jax.random.key(0))
    requests = workload(options.requests, options.low, options.high, config.vocab_size)
    pages = -(-2 * options.high // 16)
    sides = {
        "batched": Bench(model, requests, options.rows, 1 + options.rows * pages, 16, options.rows + options.high),
        "one by one": Bench(model, requests, 1, 1 + pages, 16, options.high),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(1 + options.rounds):
        for name, bench in sides.items():
            service, spans = bench.measure([2**30])
            figures = bench.figures(service, spans)
            seconds[name] += [figures["seconds"]] if turn else []
    tokens = figures["output_tokens"]
    lines = []
    for name, samples in seconds.items():
        summary = record.summary(samples)
        lines.append({"way": name, "seconds": summary, "output_tokens_per_s": tokens / summary["median"]})
        if not options.json:
            print(f"{name:<12}{lines[-1]['output_tokens_per_s']:10.1f} output tokens/s")
    ratio = lines[0]["output_tokens_per_s"] / lines[1]["output_tokens_per_s"]
    lines.append({"way": "batched / one by one", "ratio": ratio, "output_tokens": tokens})
    print(json.dumps(record.document("cpu_serving", lines, method=METHOD)) if options.json else f"ratio {ratio:.2f}")
    if options.save:
        print(record.write("cpu_serving", lines, method=METHOD))


if __name__ == "__main__":
    main()
