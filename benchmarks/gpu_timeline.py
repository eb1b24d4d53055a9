"""Where the time of a KV tile goes in the prefill kernel, by the kernel's own clock, and what the card does under it.

    warpgroup   | softmax | tile | turn | issue ......... | products |     one KV tile, in cycles of the SM
                  math      waits         until the last product is issued, then until it is done

Calls are run for seconds beside nvidia-smi: speed, clock, power, and why the clock is not higher. One call is then
traced with Pallas's profiler: the named scopes of pallas_kernels/prefill_compute.py.
"""

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import record
from gpu_kernels import KV_HEADS, Case, arguments
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import paged_attention
from pallas_kernels.mosaic import on_hopper

EVENTS = 500  # scopes a warpgroup: what fits shared memory beside the kernel
SMI = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,clocks_event_reasons.active", "--format=csv,noheader,nounits"]
METHOD = """sustained: calls one after the other for seconds, host clock; clock, power and the bits of what holds the
clock down (clocks_event_reasons; 4: the power cap) as nvidia-smi gives them meanwhile, ten times a second, medians
without the first second. cycles: one traced call; medians, in cycles of the SM's clock, over the KV tiles that fit the
trace of each compute warpgroup, of the time inside a scope; issue: from the end of turn to the begin of products; tile:
the distance of two tiles. Reading the clock keeps the compiler from moving work across it, so a traced tile takes
longer than an untraced one. tensor_cores: what both warpgroups' products of a tile need, 4 D 128 128 / 4096."""


def inputs(case: Case) -> tuple:
    """Of one call, in random pages of pools twice as large."""
    size = 2 * case.rows * case.context * KV_HEADS * case.head_dim
    pools = [jax.random.normal(jax.random.key(seed), (size,), jnp.bfloat16) for seed in (1, 2)]
    q, k, v, (table, *_), length, start = arguments(case, pools)
    return q, k, v, table, length, start


def sustained(case: Case, given, seconds: float) -> dict:
    """Speed over some seconds, and the card's state meanwhile."""
    run = jax.jit(functools.partial(paged_attention, implementation="mosaic"))
    jax.block_until_ready(run(*given))
    smi = subprocess.Popen([*SMI, "-lms", "100"], stdout=subprocess.PIPE, text=True)
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        jax.block_until_ready([run(*given) for _ in range(20)])
        calls += 20
    took = (time.perf_counter() - began) / calls
    smi.terminate()
    states = [line.split(", ") for line in smi.communicate()[0].splitlines()[10:]]
    return {
        "ms": 1e3 * took,
        "tflop_per_s": case.flop / took / 1e12,
        "sm_mhz": statistics.median(float(state[0]) for state in states),
        "power_w": statistics.median(float(state[1]) for state in states),
        "clocks_event_reasons": sorted({state[2] for state in states}),
    }


def traced(given) -> list[list[tuple[str, float, float]]]:
    """Of each compute warpgroup: name, begin and end of its scopes, in cycles."""
    jax.clear_caches()
    whole = plgpu.CompilerParams
    with tempfile.TemporaryDirectory() as folder:
        profile = {"profile_space": EVENTS, "profile_dir": folder, "profile_bounds_check": True}
        plgpu.CompilerParams = functools.partial(whole, **profile)
        try:
            jax.block_until_ready(jax.jit(functools.partial(paged_attention, implementation="mosaic"))(*given))
            jax.effects_barrier()
        finally:
            plgpu.CompilerParams = whole
            jax.clear_caches()
        (path,) = Path(folder).glob("*.json")
        return tracks(json.loads(path.read_text())["traceEvents"])


def tracks(events: list[dict]) -> list[list[tuple[str, float, float]]]:
    """The closed scopes of each warpgroup that has a softmax, in their order; the trace counts in thousands."""
    found, begun = defaultdict(list), {}
    for event in events:
        track = event["pid"], event["tid"]
        if event["ph"] == "B":
            begun[track, event["name"]] = 1e3 * event["ts"]
        elif event["ph"] == "E":
            found[track].append((event["name"], begun[track, event["name"]], 1e3 * event["ts"]))
    return [track for track in found.values() if any(name == "softmax" for name, *_ in track)]


def phases(found: list[list[tuple[str, float, float]]]) -> dict[str, float]:
    """Median cycles of each scope, of issuing, and from one tile to the next."""
    cycles = defaultdict(list)
    for track in found:
        for name, begin, end in track:
            cycles[name if name != "tile" else "tile wait"].append(end - begin)
        for (a, _, end), (b, begin, _) in itertools.pairwise(track):
            if (a, b) == ("turn", "products"):
                cycles["issue"].append(begin - end)
        starts = [begin for name, begin, _ in track if name == "softmax"]
        cycles["tile"] += [b - a for a, b in itertools.pairwise(starts)]
    return {name: statistics.median(times) for name, times in cycles.items() if len(times) > len(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of untraced calls")
    record.add_options(parser, "timeline.json")
    options = parser.parse_args()
    if not on_hopper():
        raise SystemExit("The kernel that is traced needs a Hopper GPU.")
    case = Case("prefill", 1, 16384, 128)
    given = inputs(case)
    parts = {"sustained": sustained(case, given, options.seconds), "cycles": phases(traced(given))}
    parts["cycles"]["tensor_cores"] = 4 * case.head_dim * 128 * 128 / 4096
    for name, figures in parts.items():
        print(name, ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()))
    if options.save:
        row = {"rows": case.rows, "tokens": case.context, "block_size": case.block, **parts}
        record.write("timeline", [row], method=METHOD)


if __name__ == "__main__":
    main()
