"""Beam search and parallel sampling on one GPU, beside greedy decoding of as many rows and beside vLLM.

beams      1B shapes, 4 beams, 256 in, 128 out, 1, 8 and 32 prompts     milliseconds a step
samples    1B shapes, 8 samples, 1024 in, 128 out, 8 and 32 prompts     output tokens a second, prefill included
requests   8B shapes, 4 beams, 256 in, 256 out, 100 prompts             requests a second, prefill included

python benchmarks/gpu_beam.py --save           python benchmarks/gpu_beam.py --tiny
"""

import argparse
import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import programs
import record

import paxattn as pax
from models.shapes import CONFIGS
from paxattn.decoding import beam

VLLM_MS = {1: 9.67, 8: 26.94, 32: 85.43}
"""Beam search of vLLM 0.24, one H100 80GB, 1B shapes, 4 beams, 256 in, 128 out: ms a step by prompts."""
VLLM_TOKENS = {8: 19941.0, 32: 35372.0}
"""Parallel sampling of vLLM 0.24, one H100 80GB, 1B shapes, n = 8, 1024 in, 128 out: output tokens/s by prompts."""
VLLM_REQUESTS = 1.08
"""Published by vLLM: beam search, 8B, 256 in, 256 out, n = 4, 100 prompts, H100: requests a second."""

BUDGET = 8192  # max_num_batched_tokens
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


def lower_beams(shape, count: int, k: int, width: int, new: int, attention: str) -> dict:
    """How to lower the programs of `measure_beams`, from the model's shapes."""
    limits = {"max_new_tokens": new + 1, "max_model_len": width + new + 1}
    rows, budgets = count * k, [pax.prefill_budget((n, width), BUDGET) for n in (count, count * k)]
    ids, lengths = programs.ids(count, width), jax.ShapeDtypeStruct((count,), jnp.int32)
    many, many_lengths = programs.ids(rows, width), jax.ShapeDtypeStruct((rows,), jnp.int32)
    begin = jax.jit(lambda *p: beam.begin(shape, *p, num_beams=k, **limits))
    branch = jax.jit(functools.partial(beam.branch, budget=budgets[0], attention=attention), donate_argnums=1)
    search = jax.jit(functools.partial(beam.advance, attention=attention), donate_argnums=1)
    start = jax.jit(lambda *p: pax.start(shape, *p, **limits))
    decode = jax.jit(functools.partial(pax.advance, budget=budgets[1], attention=attention), donate_argnums=1)

    def begun():
        return jax.eval_shape(begin, ids, lengths)

    return {
        "begin": lambda: begin.lower(ids, lengths),
        "branch": lambda: branch.lower(shape, begun()),
        "search": lambda: search.lower(shape, jax.eval_shape(branch, shape, begun())),
        "start": lambda: start.lower(many, many_lengths),
        "decode": lambda: decode.lower(shape, jax.eval_shape(start, many, many_lengths), steps=programs.number()),
    }


def measure_beams(model, compiled: dict, name: str, count: int, k: int, width: int, new: int, repeats: int) -> dict:
    """A step of beam search, and a greedy step of as many rows."""
    last = None

    def search(state):
        nonlocal last
        last = compiled["search"](model, state)
        return last

    def fresh():
        nonlocal last
        last = None
        return compiled["branch"](model, compiled["begin"](*prompts(model, count, width)))

    samples = timed(search, fresh, repeats)
    ended, saving = np.asarray(last.ended.finish), float(last.rows.stats.sharing.saving)
    assert (ended == pax.Finish.LENGTH).all()
    last = None

    rows = count * k
    steps = -(-rows * width // pax.prefill_budget((rows, width), BUDGET))

    def prefilled():
        return compiled["decode"](model, compiled["start"](*prompts(model, rows, width)), steps=jnp.int32(steps))

    greedy = timed(lambda s: compiled["decode"](model, s, steps=jnp.int32(2**30)), prefilled, repeats)
    ms, greedy_ms = (1e3 * statistics.median(seconds) / new for seconds in (samples, greedy))
    vllm = VLLM_MS.get(count) if name == "1B" else None
    return {
        "model": name, "prompts": count, "num_beams": k, "in": width, "out": new, "ms_per_step": ms,
        "greedy_ms_per_step": greedy_ms, "vllm_ms_per_step": vllm, "times_greedy": ms / greedy_ms,
        "times_faster_than_vllm": vllm and vllm / ms, "sharing_saving": saving,
        "seconds": samples, "greedy_seconds": greedy,
    }  # fmt: skip


def lower_samples(shape, count: int, n: int, width: int, new: int, attention: str) -> jax.stages.Lowered:
    """The program of `measure_samples`."""

    def run(model, ids, length):
        result = pax.generate(
            model, ids, length, max_new_tokens=new, num_return_sequences=n, temperature=1.0,
            max_num_batched_tokens=BUDGET, attention=attention,
        )  # fmt: skip
        return result.token_ids, result.length, result.stats

    return jax.jit(run).lower(shape, programs.ids(count, width), jax.ShapeDtypeStruct((count,), jnp.int32))


def measure_samples(model, run, name: str, count: int, n: int, width: int, new: int, repeats: int) -> dict:
    """Parallel sampling from the prompts to the last token."""
    out = None

    def go(state):
        nonlocal out
        out = run(model, *state)
        return out

    samples = timed(go, lambda: prompts(model, count, width), repeats)
    assert (np.asarray(out[1]) == new).all()
    rate = count * n * new / statistics.median(samples)
    vllm = VLLM_TOKENS.get(count) if name == "1B" else None
    return {
        "model": name, "prompts": count, "num_return_sequences": n, "in": width, "out": new,
        "output_tokens_per_s": rate, "vllm_output_tokens_per_s": vllm, "times_vllm": vllm and rate / vllm,
        "sharing_saving": float(out[2].sharing.saving), "blocks_peak": int(out[2].blocks_peak), "seconds": samples,
    }  # fmt: skip


def lower_requests(shape, count: int, k: int, width: int, new: int, attention: str) -> jax.stages.Lowered:
    """The program of `measure_requests`."""

    def run(model, ids, length):
        found = pax.beam_search(
            model, ids, length, num_beams=k, max_new_tokens=new, num_return_sequences=k,
            max_num_batched_tokens=BUDGET, attention=attention,
        )  # fmt: skip
        return found.token_ids, found.status

    return jax.jit(run).lower(shape, programs.ids(count, width), jax.ShapeDtypeStruct((count,), jnp.int32))


def measure_requests(model, run, name: str, count: int, k: int, width: int, new: int, repeats: int) -> dict:
    """Beam search from the prompts to the last token."""
    samples = timed(lambda state: run(model, *state), lambda: prompts(model, count, width), repeats)
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
    record.add_options(parser, "beam.json", tiny="two small layers in float32, to see that this runs")
    options = parser.parse_args()

    tiny = dataclasses.replace(CONFIGS["135M"], num_hidden_layers=2, vocab_size=999)
    configs = {"small": tiny if options.tiny else CONFIGS["1B"], "large": tiny if options.tiny else CONFIGS["8B"]}
    names, dtype = ({}, "float32") if options.tiny else ({"small": "1B", "large": "8B"}, "bfloat16")
    counts, size, many = ((1, 2), 1 / 16, 2) if options.tiny else ((1, 8, 32), 1, 100)
    only = options.only.split(",")
    cases = [("beams", "small", n, 4, int(256 * size), int(128 * size)) for n in counts]
    cases += [("samples", "small", n, 8, int(1024 * size), int(128 * size)) for n in counts[1:]]
    cases += [("requests", "large", many, 4, int(256 * size), int(256 * size))]
    cases = [case for case in cases if case[0] in only]

    began = time.perf_counter()
    used = {which: programs.model_shapes(configs[which], dtype) for which in ("small", "large")}
    used = {which: shape for which, shape in used.items() if any(case[1] == which for case in cases)}
    makes = {which: functools.partial(programs.lower_maker, configs[which], dtype) for which in used}
    for case in cases:
        kind, which, *sizes = case
        given = used[which], *sizes, options.attention
        if kind == "beams":
            makes |= {(*case, part): make for part, make in lower_beams(*given).items()}
        else:
            how = lower_samples if kind == "samples" else lower_requests
            makes[case] = functools.partial(how, *given)
    compiled = programs.side_by_side(makes)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)

    rows = []
    for which in used:
        model = programs.make(compiled[which])
        for case in (case for case in cases if case[1] == which):
            kind, _, *sizes = case
            told = names.get(which, "tiny"), *sizes, options.repeats
            if kind == "beams":
                parts = {key[-1]: program for key, program in compiled.items() if key[:-1] == case}
                rows.append(measure_beams(model, parts, *told))
            else:
                measure = measure_samples if kind == "samples" else measure_requests
                rows.append(measure(model, compiled[case], *told))
            print({key: value for key, value in rows[-1].items() if "seconds" not in key}, flush=True)
            if options.save:  # after each row: a run that is cut leaves what it has
                record.write("beam", rows, method=METHOD)
        del model


if __name__ == "__main__":
    main()
