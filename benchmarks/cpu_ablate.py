"""Block size on a CPU, on a real model and on bare pools: what it wastes, what it costs.

cpu_ablate   pax.ablate on SmolLM2-135M-Instruct: waste, table, kernel, tokens/s, compile time, memory
simulator    pax.ablate on lengths alone, ShareGPT-like and Alpaca-like; then hundreds of pools in one program

python benchmarks/cpu_ablate.py --save         also writes two of the pictures of docs/ablations.md
"""

import argparse
import functools
import time
from pathlib import Path

import jax
import numpy as np
import record

import models
import paxattn as pax
from paxattn.ablation.plot import plot
from paxattn.ablation.pool import PoolRun

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SIZES = [1, 8, 16, 32, 64, 128, 256]
DRAWS, REQUESTS, STEPS = 256, 50, 4096
METHOD = """`pax.ablate`: random prompts, greedy, float32. One run in small pieces looks at the page table while rows
are running (wasted); then timed runs, host clock around blocking calls, medians. kernel_us: one attention call of one
layer at full length, from programs of 16 calls. compile_s: the programs of a run. peak_bytes: arguments, results and
temporaries of the decoding program, weights included. same_tokens: equal to the first row's."""
SIMULATED = """`pax.ablate` on lengths: 1,000 requests that all wait from the start, log-normal with the paper's means
and a spread of the logarithm of 1, cut to 1024; a pool of 16,384 tokens, 256 rows at most, page tables of 2,048 tokens
a row. wasted and requests_at_once as in occupancy.json. The rows with `draws` are one program of that many pools by
vmap, 50 requests and 4,096 tokens each, block 16, lengths cut to 512: wasted, its standard deviation over the draws,
and the seconds of a call."""


def pools(draws: int, requests: int, steps: int) -> list[dict]:
    """Many draws of lengths at once, each with a pool of its own: how far a single draw can be trusted."""
    sizes = {"num_blocks": 257, "block_size": 16, "max_num_seqs": 32, "max_model_len": 1024}
    many = jax.vmap(functools.partial(pax.simulate, steps=steps, max_num_batched_tokens=1024, **sizes))
    shape = jax.ShapeDtypeStruct((draws, requests), np.int32)
    program, rows = jax.jit(lambda prompt, answer: many(prompt, answer).use).lower(shape, shape).compile(), []
    for name in ("sharegpt", "alpaca"):
        drawn = [pax.draw_lengths(name, requests, seed=seed, longest=512) for seed in range(draws)]
        prompt, answer = np.stack(drawn, axis=1)
        began = time.perf_counter()
        use = jax.block_until_ready(program(prompt, answer))
        took = time.perf_counter() - began
        assert use.ended.all()
        wasted = np.asarray(jax.vmap(lambda use: use.wasted)(use))
        rows.append({"lengths": name, "draws": draws, "wasted": float(wasted.mean()), "wasted_sd": float(wasted.std())})
        rows[-1] |= {"seconds": took, "pool_steps": int(np.asarray(use.rows > 0).sum())}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("cpu_ablate", "simulator"))
    record.add_options(
        parser,
        "cpu_ablate.json and simulator.json, and docs/figures",
        tiny="a tiny model, few requests, to see that this runs",
    )
    options = parser.parse_args()
    sizes, requests, draws, bounds = SIZES, 1000, DRAWS, {}
    if options.tiny:
        options.model, options.context, options.new, sizes = "tests/golden/tiny_llama", 16, 4, [1, 16]
        requests, draws, bounds = 30, 8, {"pool_tokens": 4096, "max_num_seqs": 16}
    results = {}
    if options.only != "simulator":
        model = models.load(options.model).model
        asked = {"rows": options.rows, "context": options.context, "max_new_tokens": options.new}
        heads, repeats = model.config.num_attention_heads, options.repeats
        results["cpu_ablate"] = pax.ablate(model, block_size=sizes, query_heads=heads, repeats=repeats, **asked)
    if options.only != "cpu_ablate":
        fields = {"max_num_batched_tokens": PoolRun().max_num_batched_tokens, **bounds}
        named = {name: pax.draw_lengths(name, requests) for name in ("sharegpt", "alpaca")}
        rows = [{"lengths": name} | row for name, drawn in named.items() for row in pax.ablate(
            drawn, block_size=sizes, **fields)]  # fmt: skip
        results["simulator"] = rows + pools(draws, REQUESTS, STEPS)
    for name, rows in results.items():
        for row in rows:
            print({key: value for key, value in row.items() if key not in ("subject", "device", "tokens_sha256")})
        if options.save:
            print(record.write(name, rows, method=SIMULATED if name == "simulator" else METHOD))
            by = ("block_size", "lengths") if name == "simulator" else ("block_size",)
            plot([row for row in rows if "draws" not in row], FIGURES / f"{name}.svg", by=by)


if __name__ == "__main__":
    main()
