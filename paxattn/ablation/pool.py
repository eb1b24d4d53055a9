"""A bare pool over a trace of lengths: waste, admission, preemption and sharing of one setting, no model.

lengths [2, R]  --simulate or reserve-->  Use [steps]  -->  wasted, requests at once, preemptions, ...
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paxattn.ablation.checks import check_count, check_number
from paxattn.serving.policy import Order, Policy, first_come
from paxattn.simulate import Simulation, Use, branch, reserve, simulate
from paxattn.typing import Int32

WAYS = ("paged", "reserve-max", "power-of-two", "oracle")
"""Blocks as they are needed; or room for the longest row, for the length rounded up to a power of two, for the length
itself, from the start (the last two as if the length were known: Orca's Pow2 and Oracle of Kwon et al. 2023)."""


@dataclasses.dataclass(frozen=True)
class PoolRun:
    """One setting of a pool; every field can be swept."""

    way: str = "paged"
    block_size: int = 16
    pool_tokens: int = 16384
    max_num_seqs: int = 256
    max_model_len: int = 2048
    max_num_batched_tokens: int = 2048
    admit: Order = first_come
    keep: Order = first_come
    watermark: float = 0.01
    num_return_sequences: int = 1  # rows a prompt, for `saving` alone: each request on its own, forked once

    def __post_init__(self):
        if self.way not in WAYS:
            raise ValueError(f"way {self.way!r} is unknown; choose one of {', '.join(WAYS)}.")
        for name in ("block_size", "pool_tokens", "max_num_seqs", "max_model_len", "max_num_batched_tokens",
                     "num_return_sequences"):  # fmt: skip
            check_count(name, getattr(self, name))
        for name in ("admit", "keep"):
            if not callable(order := getattr(self, name)):
                raise ValueError(
                    f"{name} is {order!r}, must be an order of `paxattn.serving.policy`: first_come, shortest_prompt, "
                    "highest_priority or a function like them."
                )
        check_number("watermark", self.watermark, most=1)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, must be at least max_num_seqs = "
                f"{self.max_num_seqs}: decoding rows go first, a token each."
            )

    @property
    def pages(self) -> int:
        """Pages a row."""
        return -(-self.max_model_len // self.block_size)


def measure(lengths: Int32[np.ndarray, "2 R"], run: PoolRun) -> dict[str, Any]:
    """The figures of one setting."""
    lengths = check_lengths(lengths, run)
    simulation = simulated(lengths, run) if run.way == "paged" else None
    use = reserved(lengths, run) if simulation is None else simulation.use
    figures = {
        "wasted": float(use.wasted),
        "requests_at_once": float(use.requests_at_once),
        "steps": int(use.steps),
        "pool_used_peak": int(use.reserved.max()),
    }
    if simulation is not None:
        waited = simulation.times.admitted - simulation.times.arrival
        figures |= {
            "preemptions": int(simulation.preemptions.sum()),
            "mean_wait_steps": float(np.mean(waited)),
            "table_bytes": 4 * (run.max_num_seqs * (run.pages + 1) + 1 + run.pool_tokens // run.block_size),
            "saving": saving(lengths, run),
        }
    return figures


def check_lengths(lengths: Any, run: PoolRun) -> Int32[np.ndarray, "2 R"]:
    """Lengths as int32; refused where a request could never end."""
    lengths = np.asarray(lengths)
    if lengths.ndim != 2 or lengths.shape[0] != 2 or not lengths.shape[1] or lengths.dtype.kind not in "iu":
        raise ValueError(f"lengths are {lengths.dtype} {lengths.shape}; they must be integers [2, R], R at least 1.")
    if lengths.min() < 1:
        raise ValueError("a length is below 1; prompts and answers have at least one token.")
    whole = lengths.astype(np.int64).sum(axis=0)
    longest, room = int(whole.max()), min(run.max_model_len, run.pool_tokens)
    need = int(reservation(whole, run).max())
    if max(need, longest) > room or -(-(longest - 1) // run.block_size) > run.pool_tokens // run.block_size:
        raise ValueError(
            f"a request takes {need} tokens of room; max_model_len is {run.max_model_len} and pool_tokens "
            f"{run.pool_tokens}: raise them."
        )
    return lengths.astype(np.int32)


def simulated(lengths: Int32[np.ndarray, "2 R"], run: PoolRun) -> Simulation:
    """The paged way, run until every request has ended."""
    still = dataclasses.replace(run, watermark=0.0, num_return_sequences=1)  # values that compile nothing
    return _complete(
        lambda steps: _simulate(*lengths, run.watermark, still, steps), lengths, lengths[0] + lengths[1] // 2, run
    )


def reservation(whole: np.ndarray, run: PoolRun) -> np.ndarray:
    """Tokens of room that a request of so many takes, in blocks not rounded up."""
    if run.way == "reserve-max":
        return np.full_like(whole, run.max_model_len)
    return 2 ** np.ceil(np.log2(whole)).astype(whole.dtype) if run.way == "power-of-two" else whole


def reserved(lengths: Int32[np.ndarray, "2 R"], run: PoolRun) -> Use:
    """The other ways, run until every request has ended."""
    room = reservation(lengths.sum(axis=0, dtype=np.int32), run)
    return _complete(
        lambda steps: _reserve(*lengths, room, run.pool_tokens, run.max_num_seqs, steps), lengths, room, run
    )


def saving(lengths: Int32[np.ndarray, "2 R"], run: PoolRun) -> float:
    """Part of the blocks that `num_return_sequences` rows of each prompt save by sharing it."""
    if run.num_return_sequences == 1:
        return 0.0
    rows = np.arange(run.num_return_sequences, dtype=np.int32)[None]
    parents = np.broadcast_to(rows, (lengths.shape[1], *rows.shape))
    counts, _, faults = branches(lengths[0], lengths[1], parents, block_size=run.block_size)
    assert not faults.any(), "the allocator's own check"
    held, unshared = (np.asarray(count, np.float64).sum() for count in (counts.held, counts.unshared))
    return float(1 - held / unshared)


def branches(prompt, answer, parents: Int32[np.ndarray, "R t n"], *, block_size: int):
    """`branch` for all requests at once: one program."""
    steps, longest = int(np.max(answer)), int(np.max(prompt))
    return _branches(prompt, answer, parents, steps, block_size, longest + steps)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _branches(prompt, answer, parents, steps, block_size, max_model_len):
    one = functools.partial(branch, steps=steps, block_size=block_size, max_model_len=max_model_len)
    return jax.vmap(one)(prompt, answer, parents)


@functools.partial(jax.jit, static_argnames=("run", "steps"))
def _simulate(prompt, answer, watermark, run: PoolRun, steps: int) -> Simulation:
    names = ("block_size", "max_num_seqs", "max_model_len", "max_num_batched_tokens")
    sizes = {name: getattr(run, name) for name in names}
    policy, blocks = Policy(run.admit, run.keep, watermark), 1 + run.pool_tokens // run.block_size
    return simulate(prompt, answer, steps=steps, num_blocks=blocks, policy=policy, **sizes)


_reserve = jax.jit(
    lambda prompt, answer, room, tokens, rows, steps: reserve(
        prompt, answer, room, steps=steps, pool_tokens=tokens, max_num_seqs=rows
    ),
    static_argnums=(4, 5),
)


def _complete(program, lengths, room, run: PoolRun):
    """The program with enough steps for all to end: about what the pool could hold at best, doubled until it is."""
    answer = lengths[1].astype(np.int64)
    best = max(float((room * answer).sum()) / run.pool_tokens, float(answer.sum()) / run.max_num_seqs)
    steps = 1024 * math.ceil((1.1 * best + int(answer.max())) / 1024)
    while not bool(jnp.all(getattr(out := program(steps), "use", out).ended)):
        steps *= 2
    return out
