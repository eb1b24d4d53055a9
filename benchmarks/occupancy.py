"""KV memory wasted over time, paged against static allocation, with the length models of the PagedAttention paper.

    arrivals ──> rows of a pool of `--tokens` tokens; a request joins as soon as its room is there, first come first
    each step every row grows by a token and leaves at its length; reserved and live tokens are counted

    paged         blocks as they are needed; the latest comer is preempted when they run out (paxattn's own allocator)
    reserve-max   every row reserves the model's longest
    power-of-two  the length it will reach, rounded up to a power of two (known in advance: Orca's Pow2)
    oracle        exactly the length it will reach (Orca's Oracle)

No model: `paxattn.ablation.pool`, the allocator alone, in seconds on a CPU. Kwon et al. 2023, sections 3 and 6.
"""

import argparse
import json

import numpy as np
import record

import paxattn as pax
from paxattn.ablation.pool import WAYS, PoolRun, reserved, simulated
from paxattn.simulate import Use

NAMES = {"ShareGPT": "sharegpt", "Alpaca": "alpaca"}
LONGEST = 2048


def shares(use: Use) -> dict:
    """Waste and concurrency while requests still wait; waste at 64 moments of the whole run."""
    steps = int(use.steps)
    points = np.linspace(0, steps - 1, min(64, steps)).astype(int)
    live, taken = np.asarray(use.live)[points], np.asarray(use.reserved)[points]
    return {
        "wasted": float(use.wasted),
        "wasted_over_time": [round(float(1 - n / m), 4) if m else 0.0 for n, m in zip(live, taken, strict=True)],
        "requests_at_once": float(use.requests_at_once),
        "steps": steps,
    }


def measure(name: str, options: argparse.Namespace) -> list[dict]:
    """All ways of one length model."""
    lengths = pax.draw_lengths(NAMES[name], options.requests, longest=LONGEST // 2)
    sizes = {"pool_tokens": options.tokens, "max_num_seqs": options.rows, "max_model_len": LONGEST}
    sizes |= {"max_num_batched_tokens": LONGEST // 2 + options.rows}
    ways = {way: shares(reserved(lengths, PoolRun(way=way, **sizes))) for way in WAYS if way != "paged"}
    for size in options.block_size:
        out = simulated(lengths, PoolRun(block_size=size, **sizes))
        ways[f"paged, block {size}"] = shares(out.use) | {"preemptions": int(out.preemptions.sum())}
    return [{"lengths": name, "way": way, "pool_tokens": options.tokens, **figures} for way, figures in ways.items()]


METHOD = """
All requests wait from the start; one token a row and step; the pool holds as many tokens for every way. Wasted is
1 - live tokens / reserved tokens, summed over the steps in which requests still wait; requests_at_once is the mean
number of rows over the same steps. Lengths are log-normal with the paper's means and a standard deviation of the
logarithm of 1, each cut to 1024. The paged rows are `pax.simulate`: the serving loop's verbs
over the real allocator, without a model.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--requests", type=int, default=1000)
    add("--tokens", type=int, default=16384, help="that the pool holds")
    add("--rows", type=int, default=256, help="at most")
    add("--block-size", type=int, nargs="+", default=[16])
    add("--json", action="store_true")
    record.add_options(parser, "occupancy.json", tiny="fewer requests and a smaller pool")
    options = parser.parse_args()
    if options.tiny:
        options.requests, options.tokens, options.rows = 60, 4096, 32
    lines = [line for name in NAMES for line in measure(name, options)]
    if options.json:
        print(json.dumps(record.document("occupancy", lines, method=METHOD)))
    else:
        print(f"{'lengths':<10}{'way':<18}{'wasted':>8}{'at once':>9}{'steps':>8}")
        for line in lines:
            at_once = f"{line['requests_at_once']:9.1f}{line['steps']:8d}"
            print(f"{line['lengths']:<10}{line['way']:<18}{line['wasted']:8.1%}{at_once}")
    if options.save:
        print(record.write("occupancy", lines, method=METHOD))


if __name__ == "__main__":
    main()
