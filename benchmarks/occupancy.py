"""KV memory wasted over time, paged against static allocation, with the length models of the PagedAttention paper.

    arrivals ──> rows of a pool of `--tokens` tokens; a request joins as soon as its room is there, first come first
    each step every row grows by a token and leaves at its length; reserved and live tokens are counted

    paged         blocks as they are needed; the latest comer is preempted when they run out (paxattn's own allocator)
    reserve-max   every row reserves the model's longest
    power-of-two  the length it will reach, rounded up to a power of two (known in advance: Orca's Pow2)
    oracle        exactly the length it will reach (Orca's Oracle)

Allocator only: the model is a hash, so that it runs in seconds on a CPU. Kwon et al. 2023, sections 3 and 6.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import record

import paxattn as pax
from paxattn.serving import trace as tracing
from paxattn.typing import struct

MEANS = {"ShareGPT": (161, 338), "Alpaca": (19, 58)}  # tokens in and out; log-normal
LONGEST = 2048
SPREAD = 1.0  # standard deviation of the logarithm


@struct
class Nothing:
    """A model that stores nothing and always answers 0: what is left is the allocator and the loop."""

    nothing: jax.Array
    vocab_size = 2
    cache_spec = pax.CacheSpec(0, 1, 1, jnp.float32)

    def __call__(self, tokens, plan, layers):
        """Nothing is written."""
        return jnp.zeros((tokens.shape[0], 1)), layers

    def logits(self, hidden):
        """All equal."""
        return jnp.zeros((hidden.shape[0], 2))


def lengths(name: str, count: int, seed: int = 0) -> np.ndarray:
    """Prompt and answer lengths [2, count]: log-normal with the paper's means, cut so that both fit into LONGEST."""
    rng, means = np.random.default_rng(seed), np.array(MEANS[name])[:, None]
    drawn = rng.lognormal(np.log(means) - SPREAD**2 / 2, SPREAD, (2, count))
    return np.clip(np.rint(drawn), 1, LONGEST // 2).astype(np.int32)


def static(reserved: np.ndarray, prompt: np.ndarray, answer: np.ndarray, tokens: int, rows: int) -> dict:
    """First come, first served where each request reserves its room for its whole life."""
    waiting, live, use = 0, [], []
    while waiting < len(reserved) or live:
        room = tokens - sum(reserved[r] for r, _ in live)
        while waiting < len(reserved) and len(live) < rows and reserved[waiting] <= room:
            room -= reserved[waiting]
            live.append([waiting, prompt[waiting]])
            waiting += 1
        use.append(
            (sum(reserved[r] for r, _ in live), sum(held for _, held in live), len(live), waiting < len(reserved))
        )
        live = [[r, held + 1] for r, held in live if held + 1 < prompt[r] + answer[r]]
    return shares(np.array(use))


def shares(use: np.ndarray) -> dict:
    """Waste and concurrency while requests still wait: [steps, (reserved, live, rows, somebody waits)]."""
    busy = use[use[:, 3] > 0] if (use[:, 3] > 0).any() else use
    wasted = 1 - busy[:, 1].sum() / busy[:, 0].sum()
    points = np.linspace(0, len(use) - 1, min(64, len(use))).astype(int)
    over_time = [round(1 - use[i, 1] / use[i, 0], 4) if use[i, 0] else 0.0 for i in points]
    return {
        "wasted": float(wasted),
        "wasted_over_time": over_time,
        "requests_at_once": float(busy[:, 2].mean()),
        "steps": len(use),
    }


def paged(prompt: np.ndarray, answer: np.ndarray, tokens: int, rows: int, block_size: int) -> dict:
    """The real loop over the real allocator: what each iteration held is in its trace."""
    requests = pax.Requests.create(np.zeros((len(prompt), LONGEST // 2), np.int32), prompt, max_new_tokens=answer)
    room = 8 * int(answer.sum() + prompt.sum()) * max(LONGEST // tokens, 1) // rows + 20_000  # iterations traced

    @jax.jit
    def go(model, requests):
        return pax.serve(model, requests, max_num_seqs=rows, max_model_len=LONGEST, num_blocks=1 + tokens // block_size,
                         block_size=block_size, max_num_batched_tokens=LONGEST // 2 + rows, trace=room)  # fmt: skip

    out = go(Nothing(jnp.zeros(1)), requests)
    steps = int(out.stats.steps)
    assert steps <= room, "the trace was too short"
    assert (np.asarray(out.length) == answer).all()
    columns = tracing.columns(out.trace, steps)
    held = columns["blocks_used"] * block_size
    use = np.stack([held, columns["tokens_held"], columns["rows"], columns["waiting"] > 0], axis=1)
    return shares(use) | {"preemptions": int(out.preemptions.sum())}


def measure(name: str, options: argparse.Namespace) -> list[dict]:
    """All ways of one length model."""
    prompt, answer = lengths(name, options.requests)
    whole = prompt + answer
    reserved = {
        "reserve-max": np.full_like(whole, LONGEST),
        "power-of-two": 2 ** np.ceil(np.log2(whole)).astype(np.int64),
        "oracle": whole,
    }
    ways = {way: static(room, prompt, answer, options.tokens, options.rows) for way, room in reserved.items()}
    for size in options.block_size:
        ways[f"paged, block {size}"] = paged(prompt, answer, options.tokens, options.rows, size)
    return [{"lengths": name, "way": way, "pool_tokens": options.tokens, **figures} for way, figures in ways.items()]


METHOD = """
All requests wait from the start; one token a row and step; the pool holds as many tokens for every way. Wasted is
1 - live tokens / reserved tokens, summed over the steps in which requests still wait; requests_at_once is the mean
number of rows over the same steps. Lengths are log-normal with the paper's means and a standard deviation of the
logarithm of 1, each cut to 1024. The paged rows are paxattn's loop with a model that stores nothing.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--requests", type=int, default=1000)
    add("--tokens", type=int, default=16384, help="that the pool holds")
    add("--rows", type=int, default=256, help="at most")
    add("--block-size", type=int, nargs="+", default=[16])
    add("--tiny", action="store_true", help="fewer requests and a smaller pool")
    add("--json", action="store_true")
    add("--save", action="store_true", help="write results/<machine>/occupancy.json")
    options = parser.parse_args()
    if options.tiny:
        options.requests, options.tokens, options.rows = 60, 4096, 32
    lines = [line for name in MEANS for line in measure(name, options)]
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
