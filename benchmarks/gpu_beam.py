"""Beam search and parallel sampling on one GPU, beside greedy decoding of as many rows and beside vLLM.

beams      1B shapes, 4 beams, 256 in, 128 out, 1, 8 and 32 prompts     milliseconds a step
samples    1B shapes, 8 samples, 1024 in, 128 out, 8 and 32 prompts     output tokens a second, prefill included
requests   8B shapes, 4 beams, 256 in, 256 out, 100 prompts             requests a second, prefill included

python benchmarks/gpu_beam.py --save           python benchmarks/gpu_beam.py --tiny
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import record

import models
import paxattn as pax
from models.shapes import CONFIGS
from paxattn.decoding import beam

VLLM_MS = {1: 9.67, 8: 26.94, 32: 85.43}
"""Beam search of vLLM 0.24, one H100 80GB, 1B shapes, 4 beams, 256 in, 128 out: ms a step by prompts."""
VLLM_TOKENS = {8: 19941.0, 32: 35372.0}
"""Parallel sampling of vLLM 0.24, one H100 80GB, 1B shapes, n = 8, 1024 in, 128 out: output tokens/s by prompts."""
VLLM_REQUESTS = 1.08
"""Published by vLLM: beam search, 8B, 256 in, 256 out, n = 4, 100 prompts, H100: requests a second."""

METHOD = """Random weights and prompts, bf16, block 16, no end token. beams: one jitted call over all steps after the
first token, host clock around a blocking call, divided by the steps; greedy: the same of a decode loop with a row and a
prompt of its own for each beam. samples and requests: one jitted call from the prompts to the last token. The first run
of each shape, which compiles, is dropped; medians; samples in seconds."""


def timed(run, fresh, repeats: int) -> list[float]:
    """Seconds of each run but the first from a fresh state, which the run may consume."""
    samples = []
    for _ in range(repeats + 1):
        state = jax.block_until_ready(fresh())
        began = time.perf_counter()
        jax.block_until_ready(run(state))
        samples.append(time.perf_counter() - began)
    return samples[1:]


def prompts(model, count: int, width: int) -> tuple[jax.Array, jax.Array]:
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (count, width))
    return jnp.asarray(ids, jnp.int32), jnp.full(count, width, jnp.int32)


def measure_beams(model, name: str, count: int, k: int, width: int, new: int, options) -> dict:
    """A step of beam search, and a greedy step of as many rows."""
    limits = {"max_new_tokens": new + 1, "max_model_len": width + new + 1}
    common = {"budget": pax.prefill_budget((count, width), 8192), "attention": options.attention}
    begin = jax.jit(lambda *p: beam.begin(model_shape(model), *p, num_beams=k, **limits))
    branch = jax.jit(beam.branch, static_argnames=tuple(common), donate_argnums=1)
    advance = jax.jit(beam.advance, static_argnames="attention", donate_argnums=1)
    last = None

    def search(state):
        nonlocal last
        last = advance(model, state, attention=options.attention)
        return last

    def fresh():
        nonlocal last
        last = None
        return branch(model, begin(*prompts(model, count, width)), **common)

    samples = timed(search, fresh, options.repeats)
    ended, saving = np.asarray(last.ended.finish), float(last.rows.stats.sharing.saving)
    assert (ended == pax.Finish.LENGTH).all()
    last = None

    rows = count * k
    common["budget"] = pax.prefill_budget((rows, width), 8192)
    start = jax.jit(lambda *p: pax.start(model_shape(model), *p, **limits))
    decode = jax.jit(pax.advance, static_argnames=tuple(common), donate_argnums=1)
    prefill_steps = -(-rows * width // common["budget"])

    def prefilled():
        return decode(model, start(*prompts(model, rows, width)), steps=jnp.int32(prefill_steps), **common)

    greedy = timed(lambda s: decode(model, s, steps=jnp.int32(2**30), **common), prefilled, options.repeats)
    ms, greedy_ms = (1e3 * statistics.median(seconds) / new for seconds in (samples, greedy))
    vllm = VLLM_MS.get(count) if name == "1B" else None
    return {
        "model": name, "prompts": count, "num_beams": k, "in": width, "out": new, "ms_per_step": ms,
        "greedy_ms_per_step": greedy_ms, "vllm_ms_per_step": vllm, "times_greedy": ms / greedy_ms,
        "times_faster_than_vllm": vllm and vllm / ms, "sharing_saving": saving,
        "seconds": samples, "greedy_seconds": greedy,
    }  # fmt: skip


def model_shape(model):
    """What `start` asks of a model, so that the weights are no constants of the program."""
    return dataclasses.make_dataclass("Shape", ["cache_spec", "vocab_size"])(model.cache_spec, model.vocab_size)


def measure_samples(model, name: str, count: int, n: int, width: int, new: int, options) -> dict:
    """Parallel sampling from the prompts to the last token."""

    @jax.jit
    def run(model, ids, length):
        result = pax.generate(
            model, ids, length, max_new_tokens=new, num_return_sequences=n, temperature=1.0,
            max_num_batched_tokens=8192, attention=options.attention,
        )  # fmt: skip
        return result.token_ids, result.length, result.stats

    out = None

    def go(state):
        nonlocal out
        out = run(model, *state)
        return out

    samples = timed(go, lambda: prompts(model, count, width), options.repeats)
    assert (np.asarray(out[1]) == new).all()
    rate = count * n * new / statistics.median(samples)
    vllm = VLLM_TOKENS.get(count) if name == "1B" else None
    return {
        "model": name, "prompts": count, "num_return_sequences": n, "in": width, "out": new,
        "output_tokens_per_s": rate, "vllm_output_tokens_per_s": vllm, "times_vllm": vllm and rate / vllm,
        "sharing_saving": float(out[2].sharing.saving), "blocks_peak": int(out[2].blocks_peak), "seconds": samples,
    }  # fmt: skip


def measure_requests(model, name: str, count: int, k: int, width: int, new: int, options) -> dict:
    """Beam search from the prompts to the last token."""

    @jax.jit
    def run(model, ids, length):
        found = pax.beam_search(
            model, ids, length, num_beams=k, max_new_tokens=new, num_return_sequences=k,
            max_num_batched_tokens=8192, attention=options.attention,
        )  # fmt: skip
        return found.token_ids, found.status

    samples = timed(lambda state: run(model, *state), lambda: prompts(model, count, width), options.repeats)
    rate = count / statistics.median(samples)
    return {
        "model": name, "prompts": count, "num_beams": k, "in": width, "out": new, "requests_per_s": rate,
        "vllm_requests_per_s": VLLM_REQUESTS if name == "8B" else None, "seconds": samples,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="beams,samples,requests")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--tiny", action="store_true", help="two small layers in float32, to see that this runs")
    parser.add_argument("--save", action="store_true", help="write results/<folder>/beam.json")
    parser.add_argument("--folder", default="h100")
    options = parser.parse_args()

    def build(name: str):  # the name of the shapes that are measured, and the model
        config, dtype = CONFIGS[name], "bfloat16"
        if options.tiny:
            name, dtype = "tiny", "float32"
            config = dataclasses.replace(CONFIGS["135M"], num_hidden_layers=2, vocab_size=999)
        make = jax.jit(lambda key: models.random_llama(config, key, dtype))
        return jax.block_until_ready(make(jax.random.key(0))), name

    counts, size = ((1, 2), 1 / 16) if options.tiny else ((1, 8, 32), 1)
    only, rows = options.only.split(","), []

    def add(row: dict) -> None:
        print({key: value for key, value in row.items() if "seconds" not in key}, flush=True)
        rows.append(row)

    if {"beams", "samples"} & set(only):
        model, name = build("1B")
        for count in counts if "beams" in only else ():
            add(measure_beams(model, name, count, 4, int(256 * size), int(128 * size), options))
        for count in counts[1:] if "samples" in only else ():
            add(measure_samples(model, name, count, 8, int(1024 * size), int(128 * size), options))
        del model
    if "requests" in only:
        count = 2 if options.tiny else 100
        add(measure_requests(*build("8B"), count, 4, int(256 * size), int(256 * size), options))
    if options.save and not options.tiny:
        print(record.write("beam", rows, method=METHOD, folder=options.folder))


if __name__ == "__main__":
    main()
