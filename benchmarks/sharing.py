"""Blocks that sharing saves, on the PagedAttention paper's metric: blocks saved / blocks without sharing.

    lengths    log-normal with the paper's means in and out: ShareGPT 161/338, Alpaca 19/58
    samples    the prompt forks to n rows, which part at the first token
    beams      the rows are remapped each step by parents that SmolLM2-135M's beam search really took
    replay     `paxattn.simulate.branch`: append and fork on page tables alone, sharing counted at every step

    python benchmarks/sharing.py --save            python benchmarks/sharing.py --tiny
Kwon et al. 2023, section 6.3 and figure 15.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import record

import models
import paxattn as pax
from paxattn.ablation.pool import branches
from paxattn.decoding import beam

NAMES = {"ShareGPT": "sharegpt", "Alpaca": "alpaca"}
PAPER = {  # per cent at n = 2 .. 6
    ("samples", "Alpaca"): (6.1, 9.8), ("samples", "ShareGPT"): (16.2, 30.5),
    ("beams", "Alpaca"): (37.6, 55.2), ("beams", "ShareGPT"): (44.3, 66.3),
}  # fmt: skip
BLOCK = 16
TEXTS = (
    "The capital of France is", "Once upon a time", "Water boils at", "def fibonacci(n):", "The history of Rome begins",
    "Dear Sir or Madam,", "To bake bread you need", "In mathematics, a group is",
)  # fmt: skip

METHOD = """Per request a page table of n rows, block size 16: the prompt is appended to row 0 and forked, then each
step appends one token to every row and, for beams, forks by the parents of that step. Saving = 1 - sum of blocks held /
sum of blocks without sharing, over all steps of all requests. Prompt and output lengths are log-normal with the paper's
means and a standard deviation of the logarithm of 1, cut to 1..1024. Parents: beam search of SmolLM2-135M-Instruct
(Q4_1, float32) on eight texts, no end token, recorded step by step; a request takes one text's parents, repeated from
their start as often as its output is long."""


def recorded(lm: models.LM, num_beams: int, steps: int) -> np.ndarray:
    """Parents int32 [texts, steps, num_beams] of a real search: a new beam's tokens but the last are its parent's."""
    prompts = [lm.model.config.vocab_size // 2 + np.arange(5) + i for i in range(len(TEXTS))]
    if lm.tokenizer:
        prompts = [lm.encode(text, chat=False) for text in TEXTS]
    ids = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    length = np.array(list(map(len, prompts)))
    search = beam.begin(lm.model, jnp.asarray(ids), length, num_beams=num_beams, max_new_tokens=steps + 2)
    advance = jax.jit(beam.advance, donate_argnums=1)
    search = jax.jit(beam.branch, static_argnames="budget", donate_argnums=1)(lm.model, search, budget=ids.size)
    parents = []
    for _ in range(steps):
        before, known = np.asarray(search.rows.tokens), np.asarray(search.rows.known)
        search = advance(lm.model, search, steps=1)
        after = np.asarray(search.rows.tokens)
        seen = np.arange(before.shape[1]) < known[:, None]
        before, after = (np.where(seen, x, -1).reshape(len(prompts), num_beams, -1) for x in (before, after))
        same = (after[:, :, None] == before[:, None]).all(axis=-1)
        assert (same.sum(axis=-1) == 1).all(), "live beams differ from each other"
        parents.append(same.argmax(axis=-1))
    return np.stack(parents, axis=1).astype(np.int32)


def measure(way: str, name: str, n: int, requests: int, parents: np.ndarray) -> dict:
    """One row of the result."""
    prompt, output = pax.draw_lengths(NAMES[name], requests)
    chosen = parents[np.arange(requests) % len(parents)]
    counts, copied, faults = branches(prompt, output, chosen, block_size=BLOCK)
    assert not faults.any(), "the allocator's own check"
    held, unshared, copied = (float(np.asarray(x, np.float64).sum()) for x in (counts.held, counts.unshared, copied))
    low, high = PAPER[way, name]
    row = {"way": way, "lengths": name, "n": n, "saving_percent": 100 * (1 - held / unshared), "requests": requests}
    row |= {"paper_percent_n2_to_n6": [low, high], "block_steps": {"held": held, "unshared": unshared}}
    row |= {"blocks_copied": copied, "tokens": {"in": float(prompt.mean()), "out": float(output.mean())}}
    print(f"{way:8} {name:9} n = {n}: {row['saving_percent']:.1f}% (paper {low} to {high}% for n = 2 to 6)", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--steps", type=int, default=64, help="steps of beam search that are recorded")
    parser.add_argument("--model", default="smollm2-135m")
    record.add_options(parser, "sharing.json", tiny="a tiny random model and few requests, to see that this runs")
    options = parser.parse_args()
    ways, names = (2, 4, 6), tuple(NAMES)
    if options.tiny:
        options.model, options.requests, options.steps = "tests/golden/tiny_llama", 8, 6
        ways, names = (2,), ("Alpaca",)
    lm = models.load(options.model)
    rows, moves = [], {}
    for n in ways:
        taken = recorded(lm, n, options.steps)
        moves[n] = taken.tolist()
        straight = np.broadcast_to(np.arange(n, dtype=np.int32), (1, 1, n))
        for name in names:
            rows.append(measure("samples", name, n, options.requests, straight))
            rows.append(measure("beams", name, n, options.requests, taken))
    if options.save:
        rows.append({"recorded_parents": {str(n): json.dumps(taken) for n, taken in moves.items()}})
        print(record.write("sharing", rows, method=METHOD))


if __name__ == "__main__":
    main()
