"""What a verify step costs beside a decode step, and what speculation gains end to end, on one GPU.

    cost   k = 3, 7, 15 guesses a row that never hold: one token a step stays, so steps are what is timed
    gain   a drafter that reads the answer and is right with a set chance a token: no draft model to wait for

Random weights, bf16, block 16, greedy. The answer comes from a run through the same shapes, as greedy tokens of random
weights in bf16 differ between shapes; the share of guesses that held is measured, not assumed.
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
from paxattn.decoding.speculative import advance, begin
from paxattn.typing import Array, struct

METHOD = """One jitted call of paxattn's loop over many steps from the end of prefill, host clock around a blocking
call, the first run of each shape dropped; medians, samples in seconds. cost: milliseconds a step of k guesses a row,
none of which holds, over milliseconds a step of plain decoding in the same process. gain: new tokens a second of all
rows; limit: (tokens that came out of a verify step of a row, measured) / (milliseconds of a plain decode step), what
would be reached if verifying cost no more than decoding and drafting nothing; of_limit is the part of it reached."""
NEW = 128


@struct
class Oracle:
    """Guesses the answer, each token rightly with a set chance."""

    answer: Array  # [B, M]
    wrong: Array  # bool [B, M]: positions that are spoiled

    def init(self, state, k):
        """Remembers nothing."""
        return ()

    def propose(self, carry, state, k):
        """The next k positions of the answer; a spoiled token differs in its last bit."""
        at = jnp.minimum(state.known[:, None] + jnp.arange(k), self.answer.shape[1] - 1)
        right, wrong = (jnp.take_along_axis(x, at, axis=1) for x in (self.answer, self.wrong))
        return pax.Draft(right ^ wrong, jnp.full(len(right), k), None), carry

    def settle(self, carry, state):
        """Nothing to roll back."""
        return carry


def lower(model, rows: int, prompt: int, ks: list[int]) -> dict:
    """How to lower the programs of one number of rows, from the model's shapes."""
    budget, width = pax.prefill_budget((rows, prompt), 8192), prompt + NEW + 1
    start = jax.jit(
        lambda ids: pax.start(model, ids, np.full(rows, prompt), max_new_tokens=NEW + 1, max_model_len=width)
    )
    plain = jax.jit(functools.partial(pax.advance, budget=budget, shared=False), donate_argnums=1)
    state = functools.partial(jax.eval_shape, start, programs.ids(rows, prompt))
    blank = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    oracle = Oracle(blank, jax.ShapeDtypeStruct((rows, width), jnp.bool_))

    def lower_verify(k):
        verify = jax.jit(functools.partial(advance, k=k, budget=budget), donate_argnums=2)
        begun = jax.eval_shape(functools.partial(begin, k=k), oracle, state())
        return verify.lower(model, oracle, begun)

    return {
        "start": lambda: start.lower(programs.ids(rows, prompt)),
        "plain": lambda: plain.lower(model, state(), steps=programs.number()),
        **{k: functools.partial(lower_verify, k) for k in ks},
    }


def timed(run, fresh, repeats: int):
    """The last state, and the seconds of each run but the first from a fresh state, which compiles."""
    samples = []
    for _ in range(repeats + 1):
        state = jax.block_until_ready(fresh())
        began = time.perf_counter()
        state = jax.block_until_ready(run(state))
        samples.append(time.perf_counter() - began)
    return state, samples[1:]


def measure(model, compiled: dict, rows: int, prompt: int, ks: list[int], chances: list[float], repeats: int) -> list:
    """All figures of one number of rows."""
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (rows, prompt)).astype(np.int32)
    steps = jnp.int32(-(-rows * prompt // pax.prefill_budget(ids.shape, 8192)))
    width = prompt + NEW + 1

    def prefilled():
        return compiled["plain"](model, compiled["start"](jnp.asarray(ids)), steps=steps)

    def line(case, samples, **facts):
        print(case, {name: round(x, 3) for name, x in facts.items()}, flush=True)
        return {"case": case, "rows": rows, "prompt": prompt, **facts, "seconds": samples}

    _, samples = timed(lambda s: compiled["plain"](model, s, steps=jnp.int32(2**30)), prefilled, repeats)
    decode = 1e3 * statistics.median(samples) / NEW
    lines = [line(f"{rows} rows, decode", samples, ms_per_step=decode, tokens_per_s=1e3 * rows / decode)]
    for k in ks:

        def run(drafter, repeats, k=k):
            turn = functools.partial(compiled[k], model, drafter)
            return timed(turn, lambda: begin(drafter, prefilled(), k=k), repeats)

        blank = jnp.zeros((rows, width), jnp.int32)
        answer = jnp.array(run(Oracle(blank, jnp.ones_like(blank, bool)), 0)[0].tokens)
        state, samples = run(Oracle(answer, jnp.ones_like(answer, bool)), repeats)
        verify = 1e3 * statistics.median(samples) / float(state.tally.steps.max())
        lines.append(line(f"{rows} rows, verify k = {k}", samples, k=k, ms_per_step=verify, cost=verify / decode))
        for chance in chances if k == 7 else ():
            wrong = jnp.asarray(np.random.default_rng(1).random(answer.shape) >= chance)
            state, samples = run(Oracle(answer, wrong), repeats)
            facts = {"k": k, "chance": chance, **gain(state, samples, rows, decode, verify)}
            lines.append(line(f"{rows} rows, k = {k}, right with {chance:.0%}", samples, **facts))
    return lines


def gain(state, samples, rows: int, decode: float, verify: float) -> dict:
    """Tokens a second of an end-to-end run, and the arithmetic limit."""
    tally = jax.tree.map(lambda x: float(x.sum()), state.tally)
    longest = float(state.tally.steps.max())
    per_s = tally.tokens / statistics.median(samples)
    per_step = tally.tokens / rows / longest  # the slowest row sets the number of steps
    limit = 1e3 * rows * per_step / decode
    return {
        "accepted_share": tally.accepted / max(tally.drafted, 1),
        "tokens_per_row_step": tally.tokens / tally.steps,
        "tokens_per_s": per_s,
        "times_plain": per_s * decode / (1e3 * rows),
        "limit_tokens_per_s": limit,
        "of_limit": per_s / limit,
        "of_limit_at_verify_cost": per_s * verify / (1e3 * rows * per_step),
        "blocks_reserved": tally.blocks_reserved,
        "blocks_rolled_back": tally.blocks_rolled_back,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8B", choices=CONFIGS)
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--k", default="3,7,15")
    parser.add_argument("--repeats", type=int, default=3)
    record.add_options(parser, "speculative.json", tiny="two layers of 135M in float32, to see that this runs")
    options = parser.parse_args()
    config, dtype = CONFIGS[options.model], "bfloat16"
    if options.tiny:
        config, dtype = dataclasses.replace(CONFIGS["135M"], num_hidden_layers=2, vocab_size=999), "float32"
    shapes, ks = programs.model_shapes(config, dtype), list(map(int, options.k.split(",")))
    makes = {"make": functools.partial(programs.lower_maker, config, dtype)}
    counts = list(map(int, options.rows.split(",")))
    for rows in counts:
        makes |= {(rows, part): make for part, make in lower(shapes, rows, options.prompt, ks).items()}
    compiled = programs.side_by_side(makes)
    model = programs.make(compiled["make"])
    lines, name = [], "tiny" if options.tiny else options.model
    for rows in counts:
        parts = {key[1]: program for key, program in compiled.items() if key[0] == rows}
        for line in measure(model, parts, rows, options.prompt, ks, [0.6, 0.8], options.repeats):
            lines.append({"model": name, **line})
        if options.save:  # after each number of rows: a run that is cut leaves what it has
            print(record.write("speculative", lines, method=METHOD))


if __name__ == "__main__":
    main()
