"""Speculation on a CPU against plain greedy decoding, in one run: SmolLM2-135M-Instruct, float32.

    round 1:  plain  ngram  self:8       every sample: one token, then one token and `new` more
    round 2:  self:8  ngram  plain       milliseconds a token = (long - short) / new

Two tasks whose answers repeat their prompts: a code edit, and a summary with quotes.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import record

import models
import paxattn as pax
from models.speculation import drafter

CODE = """def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("sizes must not be negative")
    return width * height

def perimeter(width, height):
    if width < 0 or height < 0:
        raise ValueError("sizes must not be negative")
    return 2 * (width + height)
"""
NOTES = """The harbour master said: "No ship leaves before the fog lifts." The pilot said: "I have seen worse fog than
this, and I was never late." The cook said: "Nobody eats before the ship leaves." The fog lifted at noon."""
TASKS = {
    "code edit": f"Repeat this code and rename the function area to surface:\n\n{CODE}",
    "summary with quotes": f"List what each person said, with the quotes word for word:\n\n{NOTES}",
}
METHOD = """Greedy, float32, no end token, one row, block 16; the prompt through the chat template. A round asks every
side in turn for 1 token and for 1 + new tokens; rounds reverse the order; round 0 compiles and is dropped.
ms_per_token = (time of 1 + new - time of 1) / new, of medians. times_plain is plain's ms_per_token over the side's.
tokens_per_step: tokens that came out of a verify step."""


def sides(lm: models.LM, hows: list[str], k: int) -> dict[str, Callable]:
    """Jitted programs by name; each gives a Generation and a tally or None."""
    plain = jax.jit(pax.generate, static_argnames="max_model_len")
    fast = jax.jit(pax.speculate, static_argnames=("max_model_len", "num_speculative_tokens"))
    made = {"plain": lambda *a, **o: (plain(lm.model, *a, **o), None)}
    for how in hows:
        guesser = drafter(how, lm)
        made[how] = functools.partial(fast, lm.model, drafter=guesser, num_speculative_tokens=k)
    return made


def measure(task: str, ids: list[int], sides: dict[str, Callable], width: int, new: int, rounds: int) -> list[dict]:
    """One line a side; prompts of all tasks are `width` wide, so that each side compiles once."""
    prompt, length = jnp.asarray([ids + [0] * (width - len(ids))]), jnp.asarray([len(ids)])
    seconds = {name: {1: [], 1 + new: []} for name in sides}
    last = {}
    for turn in range(rounds + 1):
        for name in list(sides) if turn % 2 else reversed(sides):
            for n in (1, 1 + new):
                began = time.perf_counter()
                last[name] = jax.block_until_ready(
                    sides[name](prompt, length, max_new_tokens=jnp.int32(n), max_model_len=width + 1 + new)
                )
                if turn:
                    seconds[name][n].append(time.perf_counter() - began)
    middle = {name: {n: float(np.median(s)) for n, s in samples.items()} for name, samples in seconds.items()}
    ms = {name: 1e3 * (m[1 + new] - m[1]) / new for name, m in middle.items()}
    lines = []
    for name, (result, tally) in last.items():
        line = {"task": task, "side": name, "prompt": len(ids), "new": new, "ms_per_token": ms[name]}
        line |= {"times_plain": ms["plain"] / ms[name]}
        line |= {"equal_tokens": bool((result.token_ids == last["plain"][0].token_ids).all())}
        if tally is not None:
            counts = {field: int(x[0]) for field, x in vars(tally).items()}
            line |= counts | {"tokens_per_step": counts["tokens"] / counts["steps"]}
        lines.append(line | {"seconds": {str(n): s for n, s in seconds[name].items()}})
    return lines


def table(lines: list[dict]) -> str:
    """One line a task and side."""
    text = [f"{'task':22}{'side':10}{'ms a token':>12}{'times plain':>13}{'tokens a step':>15}{'equal':>8}"]
    for line in lines:
        rate = f"{line['tokens_per_step']:.2f}" if "tokens_per_step" in line else ""
        text.append(f"{line['task']:22}{line['side']:10}{line['ms_per_token']:12.1f}{line['times_plain']:13.2f}"
                    f"{rate:>15}{line['equal_tokens']!s:>8}")  # fmt: skip
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speculate", default="ngram,self:8", help="sides beside plain decoding")
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the record instead of the table")
    record.add_options(parser, "cpu_speculative.json")
    options = parser.parse_args()
    lm = models.load("smollm2-135m")
    made = sides(lm, options.speculate.split(","), options.num_speculative_tokens)
    encoded = {task: lm.encode(text) for task, text in TASKS.items()}
    width, lines = max(map(len, encoded.values())), []
    for task, ids in encoded.items():
        lines += measure(task, ids, made, width, options.new, options.rounds)
    about = [{"num_speculative_tokens": options.num_speculative_tokens, **line} for line in lines]
    document = record.document("cpu_speculative", about, method=METHOD)
    print(json.dumps(document, indent=1) if options.json else table(lines))
    if options.save:
        print(f"written: {record.write('cpu_speculative', about, method=METHOD)}")


if __name__ == "__main__":
    main()
