"""One run of a model, measured: rows x context random prompts through the loops as users call them.

prepare   start, prefill and decode as compiled programs: compile time, bytes
measure   once a few steps at a time, looking at the page table; then timed, `repeats` times; then the kernel alone
"""

import dataclasses
import functools
import hashlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.api import IMPLEMENTATIONS, paged_attention
from pallas_kernels.config import without_sizes
from paxattn.ablation.checks import check_count, check_number
from paxattn.blocks import NULL
from paxattn.cache import CacheSpec
from paxattn.decoding import beam, step
from paxattn.decoding.fan_out import fan_out
from paxattn.decoding.generate import MAX_NUM_BATCHED_TOKENS, prefill_budget, start
from paxattn.decoding.generate import finish as finish_rows
from paxattn.decoding.model import Model
from paxattn.decoding.step import State
from paxattn.pages import PageTable
from paxattn.status import Status

LOOKS = 32
"""How often a run's page table is looked at, about."""
CALLS = 16
"""Kernel calls in one program: what the call of a program costs is a sixteenth of what is added to each."""


@dataclasses.dataclass(frozen=True)
class ModelRun:
    """What a model is asked for; every field can be swept. Names are those of `generate` and `beam_search`."""

    rows: int = 4  # prompts
    context: int = 128  # tokens of each
    max_new_tokens: int = 32
    block_size: int = 16
    num_blocks: int | None = None
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    num_return_sequences: int = 1
    num_beams: int = 1
    temperature: float = 0.0
    attention: str = "auto"
    seed: int = 0  # of prompts and sampling

    def __post_init__(self):
        for name in ("rows", "context", "block_size", "max_num_batched_tokens", "num_return_sequences", "num_beams"):
            check_count(name, getattr(self, name))
        check_count("max_new_tokens", self.max_new_tokens, least=2)  # the first ends the prefill
        check_count("seed", self.seed, least=0, most=2**32 - 1)
        check_number("temperature", self.temperature)
        if self.num_blocks is not None:
            check_count("num_blocks", self.num_blocks, least=1 + -(-self.context // self.block_size))  # a prompt, NULL
        known = ("auto", *IMPLEMENTATIONS)
        if type(self.attention) is not str or without_sizes(self.attention)[0] not in known:
            raise ValueError(f"attention {self.attention!r} is unknown; choose one of {', '.join(known)}.")
        if self.num_beams > 1 and (self.num_return_sequences > 1 or self.temperature):
            raise ValueError("beams are neither sampled nor multiplied; leave out num_return_sequences, temperature.")

    @property
    def group(self) -> int:
        """Rows of the page table a prompt."""
        return self.num_beams * self.num_return_sequences


@dataclasses.dataclass(frozen=True)
class Programs:
    """A run, compiled: `begin` makes a state, `prefill` feeds its prompts, `decode` goes on for so many steps."""

    run: ModelRun
    spec: CacheSpec
    begin: Callable[[], Any]
    prefill: Callable[[Any], Any]
    decode: Callable[[Any, int], Any]
    rows: Callable[[Any], State]
    tokens: Callable[[Any], jax.Array]
    compile_s: float
    peak_bytes: int
    kernel: Callable[[], Callable[[], Any]] | None  # makes what it needs, gives CALLS attention calls; None: not wanted


def prepare(model: Model, run: ModelRun, query_heads: int | None = None) -> Programs:
    """Compiles what a run needs.

    Raises:
      ValueError: query heads that the model's KV heads cannot be dealt to.
    """
    if query_heads is not None and query_heads % (kv_heads := model.cache_spec.num_kv_heads):
        raise ValueError(f"query_heads is {query_heads}, must be a multiple of the model's {kv_heads} KV heads.")
    tokens = run.rows * run.context
    budget = prefill_budget((run.rows, run.context), run.max_num_batched_tokens)
    begun, feed, more = _verbs(model, run, budget)
    began = time.perf_counter()
    begin, shapes = jax.jit(begun).lower().compile(), jax.eval_shape(begun)
    decode = jax.jit(lambda model, state, steps: more(model, state, steps=steps), donate_argnums=1)
    decode = decode.lower(model, shapes, jnp.int32(0)).compile()
    branch = None if feed is None else jax.jit(feed, donate_argnums=1).lower(model, shapes).compile()
    took, memory = time.perf_counter() - began, decode.memory_analysis()
    size = {part: getattr(memory, f"{part}_size_in_bytes") for part in ("argument", "output", "temp", "alias")}

    def advance(state, steps):
        return decode(model, state, jnp.int32(steps))

    def prefill(state):
        return advance(state, -(-tokens // budget)) if branch is None else branch(model, state)

    return Programs(
        run=run,
        spec=model.cache_spec,
        begin=begin,
        prefill=prefill,
        decode=advance,
        rows=(lambda search: search.rows) if run.num_beams > 1 else lambda state: state,
        tokens=functools.partial(_tokens, run),
        compile_s=took,
        peak_bytes=size["argument"] + size["output"] + size["temp"] - size["alias"],
        kernel=None if query_heads is None else kernel(model.cache_spec, run, query_heads),
    )


def _verbs(model: Model, run: ModelRun, budget: int) -> tuple[Callable, Callable | None, Callable]:
    """How a run begins, how its prompts are fed where that is another program, and how it goes on."""
    rng = np.random.default_rng(run.seed)
    ids = jnp.asarray(rng.integers(0, model.vocab_size, (run.rows, run.context)), jnp.int32)
    length = jnp.full(run.rows, run.context, jnp.int32)
    options = {"budget": budget, "attention": run.attention}
    sizes: dict[str, Any] = {name: getattr(run, name) for name in ("max_new_tokens", "block_size", "num_blocks")}
    if run.num_beams > 1:
        begun = functools.partial(beam.begin, model, ids, length, num_beams=run.num_beams, **sizes)
        more = functools.partial(beam.advance, attention=run.attention)
        return begun, functools.partial(beam.branch, **options), more
    sizes |= {"num_return_sequences": run.num_return_sequences, "temperature": run.temperature}
    begun = functools.partial(start, model, ids, length, key=jax.random.key(run.seed), **sizes)
    feed = functools.partial(fan_out, group=run.group, **options) if run.group > 1 else None
    return begun, feed, functools.partial(step.advance, shared=run.group > 1, **options)


def _tokens(run: ModelRun, state: Any) -> jax.Array:
    if run.num_beams > 1:
        return beam.finish(state, num_return_sequences=run.num_beams, width=run.max_new_tokens).token_ids
    return finish_rows(state, width=run.max_new_tokens).token_ids


def measure(programs: Programs, *, repeats: int) -> dict[str, Any]:
    """The figures of one run."""
    run = programs.run
    end, looks = watch(programs)
    digests = [_digest(programs.tokens(end))]
    timed = []
    for _ in range(repeats):
        after, *seconds = once(programs)
        timed.append(seconds)
        digests.append(_digest(programs.tokens(after)))
    live, reserved = np.sum(looks, axis=0) if looks else (0, 0)
    state = programs.rows(end)
    table, prefill, decode = state.cache.table, *(statistics.median(column) for column in zip(*timed, strict=True))
    fed = int(state.stats.tokens_fed) - run.rows * run.context
    steps = int(state.stats.steps - state.stats.prefill_steps)
    figures = {
        "status": Status(int(state.status)).name,
        "tokens_sha256": digests[0],
        "repeatable": len(set(digests)) == 1,
        "wasted": float(1 - live / reserved) if reserved else None,
        "saving": float(state.stats.sharing.saving),
        "blocks_peak": int(state.stats.blocks_peak),
        "blocks_copied": int(state.stats.blocks_copied),
        "table_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(table)),
        "pool_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache.layers)),
        "peak_bytes": programs.peak_bytes,
        "compile_s": programs.compile_s,
        "prefill_s": prefill,
        "decode_s": decode,
        "prefill_tokens_per_s": run.rows * run.context / prefill,
        "decode_tokens_per_s": fed / decode,
        "ms_per_step": 1e3 * decode / max(steps, 1),
    }
    return figures | ({} if programs.kernel is None else {"kernel_us": 1e6 * median_s(programs.kernel()) / CALLS})


def once(programs: Programs) -> tuple[Any, float, float]:
    """A whole run: the state at its end, seconds of prefill and of decoding."""
    state = jax.block_until_ready(programs.begin())
    began = time.perf_counter()
    state = jax.block_until_ready(programs.prefill(state))
    between = time.perf_counter()
    state = jax.block_until_ready(programs.decode(state, 2**30))
    return state, between - began, time.perf_counter() - between


def watch(programs: Programs) -> tuple[Any, list[tuple[int, int]]]:
    """A whole run in small pieces: slots that hold a token, and slots taken, whenever it stops with rows running."""
    state, looks = programs.prefill(programs.begin()), []
    while bool(programs.rows(state).running.any()):
        table = programs.rows(state).cache.table
        looks.append((live_slots(table), int(table.blocks.num_used) * table.block_size))
        state = programs.decode(state, -(-programs.run.max_new_tokens // LOOKS))
    return state, looks


def live_slots(table: PageTable) -> int:
    """Slots of the pool that hold a token; one that several rows share counts once. On the host."""
    pages, length = np.asarray(table.pages), np.asarray(table.length)
    begin = np.arange(pages.shape[1]) * table.block_size
    filled = np.zeros(table.blocks.refcount.shape, np.int64)
    np.maximum.at(filled, pages, np.clip(length[:, None] - begin, 0, table.block_size))
    filled[NULL] = 0
    return int(filled.sum())


def kernel(spec: CacheSpec, run: ModelRun, query_heads: int) -> Callable[[], Callable[[], Any]]:
    """Attention calls of a decode step at full length, one layer, random pages: CALLS of them, one after the other."""
    rows, length = run.rows * run.group, run.context + run.max_new_tokens
    pages = -(-length // run.block_size)
    table = np.random.default_rng(run.seed).permutation(rows * pages).reshape(rows, pages) + 1
    shape = (rows * pages + 1, spec.num_kv_heads, run.block_size, spec.head_dim)

    def draw():
        keys = jax.random.split(jax.random.key(run.seed), 3)
        shapes = (rows, query_heads, spec.head_dim), shape, shape
        arrays = (jax.random.normal(key, shape, spec.dtype) for key, shape in zip(keys, shapes, strict=True))
        return *arrays, jnp.asarray(table, jnp.int32), jnp.full(rows, length), jnp.arange(rows + 1)

    def calls(q, k, v, pages, lengths, starts):
        def call(_, q):
            return paged_attention(q, k, v, pages, lengths, starts, max_queries=1, implementation=run.attention)[0]

        return jax.lax.fori_loop(0, CALLS, call, q)

    inputs, program = jax.jit(draw).lower().compile(), jax.jit(calls).lower(*jax.eval_shape(draw)).compile()
    return lambda: functools.partial(program, *inputs())


def median_s(program: Callable[[], Any], *, repeats: int = 5) -> float:
    """The median time of a call, after one that warms."""
    samples = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(program())
        samples.append(time.perf_counter() - began)
    return statistics.median(samples[1:])


def _digest(tokens: jax.Array) -> str:
    return hashlib.sha256(np.asarray(tokens).tobytes()).hexdigest()[:16]
