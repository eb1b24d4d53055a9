"""Whole decode steps and prefill on one GPU: random weights, bf16, block 16, greedy, through `pax.advance`.

    state = start(prompts) -- advance(the prefill steps) --> t_prefill -- advance(128 more) --> t_decode / 128

Beside each row stand the time that the bytes alone would take, what vLLM 0.24 took on the same card model, and where
a step goes by the profiler: kernels by name, and what is between them.
"""

import argparse
import collections
import functools
import math
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import programs
import record
from device_time import kernel_seconds

import paxattn as pax
from models.shapes import CONFIGS

VLLM = {  # (model, rows, prompt): prefill tokens a second, ms a step; vLLM 0.24, H100 80GB, random weights
    ("8B", 1, 128): (12_318, 6.504),
    ("8B", 8, 512): (43_419, 6.797),
    ("8B", 32, 512): (44_332, 7.617),
    ("8B", 32, 2048): (42_723, 9.827),
    ("8B", 128, 512): (43_532, 11.041),
    ("1B", 1, 128): (17_962, 2.267),
    ("1B", 32, 512): (253_683, 1.817),
    ("1B", 32, 2048): (261_080, 2.370),
    ("1B", 128, 512): (269_465, 3.114),
    ("135M", 1, 128): (11_835, 2.412),
    ("135M", 32, 512): (426_094, 2.995),
    ("135M", 128, 512): (439_925, 3.170),
}
BUDGET = 8192  # max_num_batched_tokens
NEW = 128  # steps that are timed
READ = 3.1e12  # bytes a second that the card reads
METHOD = """Prefill: prompt tokens / time of the steps that feed them, from a fresh state, host clock around a
blocking call. Decode: (time of the steps of 129 new tokens - time of the first) / 128. Medians; the samples are
in seconds. floor_ms: weights and live K/V read once at 3.1 TB/s. vLLM's figures were taken earlier on a card of
the same kind. kernels_ms: the same decode steps once more, under the profiler: milliseconds a step by kernel, XLA's
counters cut from the names, those below 0.3% together; idle_ms: ms_per_step without them. prefill_kernels_ms: the
prefill once more, under the profiler, in milliseconds of the whole; what its seconds have more is the host's."""


def lower(model, rows: int, prompt: int, new: int, attention: str) -> dict:
    """How to lower the two programs of a row, from the model's shapes."""
    budget = pax.prefill_budget((rows, prompt), BUDGET)
    limits = {"max_new_tokens": new + 1, "max_model_len": prompt + new + 1}
    start = jax.jit(lambda ids: pax.start(model, ids, np.full(rows, prompt), **limits))
    advance = functools.partial(pax.advance, budget=budget, attention=attention, shared=False)
    advance = jax.jit(advance, donate_argnames="state")

    def lower_advance():
        state = jax.eval_shape(start, programs.ids(rows, prompt))
        return advance.lower(model, state, steps=programs.number())

    return {"start": lambda: start.lower(programs.ids(rows, prompt)), "advance": lower_advance}


def kernels_ms(spans: dict[str, float], steps: int) -> dict[str, float]:
    """Milliseconds a step by kernel, the longest first, without XLA's counters; those below 0.3% are one, "others"."""
    total = collections.defaultdict(float)
    for name, seconds in spans.items():
        total[re.sub(r"(_?\d+)+$", "", name)] += 1e3 * seconds / steps
    least = 0.003 * sum(total.values())
    kept = {name: total[name] for name in sorted(total, key=total.__getitem__, reverse=True) if total[name] >= least}
    return kept | {"others": sum(total.values()) - sum(kept.values())}


def measure(name: str, model, compiled: dict, rows: int, prompt: int, new: int, repeats: int) -> dict:
    """One row of the table."""
    start, advance = (compiled[name, rows, prompt, which] for which in ("start", "advance"))
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (rows, prompt)).astype(np.int32)

    def run(state, steps):
        steps = jax.block_until_ready(jnp.int32(steps))
        began = time.perf_counter()
        state = jax.block_until_ready(advance(model, state, steps=steps))
        return state, time.perf_counter() - began

    prefill_steps = -(-rows * prompt // pax.prefill_budget((rows, prompt), BUDGET))
    prefill, decode = [], []
    repeats = repeats if rows * prompt > BUDGET // 8 else 3 * repeats  # milliseconds, mostly of the host, scatter
    for repeat in range(repeats + 1):  # the first warms
        state = jax.block_until_ready(start(jnp.asarray(ids)))
        state, first = run(state, prefill_steps)
        assert int(state.stats.prefill_steps) == prefill_steps
        assert (state.known == prompt + 1).all()
        state, rest = run(state, new)
        assert int(state.stats.steps) == prefill_steps + new
        assert not state.running.any()
        if repeat:
            prefill.append(first)
            decode.append(rest)
        del state
    state = jax.block_until_ready(start(jnp.asarray(ids)))
    prefill_kernels = kernels_ms(kernel_seconds(lambda: run(state, prefill_steps)), 1)
    state, _ = run(start(jnp.asarray(ids)), prefill_steps)
    kernels = kernels_ms(kernel_seconds(lambda: run(state, new)), new)
    ms_per_step = 1e3 * statistics.median(decode) / new
    weights = sum(x.nbytes for x in jax.tree.leaves(model))
    cached = rows * (prompt + new // 2) * model.cache_spec.bytes_per_token
    vllm_prefill, vllm_ms = VLLM.get((name, rows, prompt), (math.nan, math.nan))
    return {
        "model": name,
        "rows": rows,
        "prompt": prompt,
        "ms_per_step": ms_per_step,
        "prefill_tokens_per_s": rows * prompt / statistics.median(prefill),
        "floor_ms": 1e3 * (weights + cached) / READ,
        "vllm_ms_per_step": vllm_ms,
        "vllm_prefill_tokens_per_s": vllm_prefill,
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "prefill_kernels_ms": prefill_kernels,
        "kernels_ms": kernels,
        "idle_ms": ms_per_step - sum(kernels.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8B,1B,135M")
    parser.add_argument("--only", help="one row, like 32x512")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--threads", type=int, default=16, help="programs compiled at once")
    record.add_options(parser, "decode.json", tiny="a small model, in seconds on a CPU")
    options = parser.parse_args()
    chosen = [(name, rows, prompt) for name, rows, prompt in VLLM if name in options.models.split(",")]
    chosen = [case for case in chosen if options.only in (None, f"{case[1]}x{case[2]}")]
    chosen = [("tiny", 2, 32)] if options.tiny else chosen
    began = time.perf_counter()
    shapes = {name: programs.model_shapes(CONFIGS[name], "bfloat16") for name, _, _ in chosen}
    parts = {case: lower(shapes[case[0]], *case[1:], NEW, options.attention) for case in chosen}
    parts |= {(name,): {"make": functools.partial(programs.lower_maker, CONFIGS[name], "bfloat16")} for name in shapes}
    makes = {(*case, k): make for case, part in parts.items() for k, make in part.items()}
    compiled = programs.side_by_side(makes, options.threads)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    rows = []
    for name in shapes:
        model = programs.make(compiled[name, "make"])
        for num_rows, prompt in (case[1:] for case in chosen if case[0] == name):
            began = time.perf_counter()
            row = measure(name, model, compiled, num_rows, prompt, NEW, options.repeats)
            rows.append(row)
            ms, vllm_ms = row["ms_per_step"], row["vllm_ms_per_step"]
            rate, vllm_rate = row["prefill_tokens_per_s"], row["vllm_prefill_tokens_per_s"]
            print(
                f"{name:5} {num_rows:4} x {prompt:<5} {ms:7.3f} ms a step (vLLM {vllm_ms:.3f}, {vllm_ms / ms:.2f}x, "
                f"floor {row['floor_ms']:.2f})   prefill {rate:9,.0f} tok/s ({rate / vllm_rate:.2f}x, "
                f"{1e3 * num_rows * prompt / rate:.2f} ms, {sum(row['prefill_kernels_ms'].values()):.2f} in kernels)"
                f"   [{time.perf_counter() - began:.0f} s]",
                flush=True,
            )
            if options.save:  # after each row: a run that is cut leaves what it has
                record.write("decode", rows, method=METHOD)
        del model


if __name__ == "__main__":
    main()
