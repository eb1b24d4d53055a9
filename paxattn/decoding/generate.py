"""Generation as one pure function: prompts in, tokens out, the paged cache inside.

    generate = finish . advance . start

    start    checks, allocates an empty cache, puts the prompts on the token buffer
    advance  chunked prefill, then decode, in one lax.while_loop (see step.py)
    finish   the new tokens of each row, why it ended, counters, and the cache

Wrap it in `jax.jit` as you like; streaming calls `advance` a few steps at a time.
"""

import math
from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from paxattn.cache import Cache
from paxattn.decoding.model import Model
from paxattn.decoding.sampling import Sampling
from paxattn.decoding.step import Finish, State, Stats, advance
from paxattn.status import Status
from paxattn.typing import Array, Float32, Int32, struct

MAX_NUM_BATCHED_TOKENS = 512
"""Tokens a prefill step may feed, by default."""


@struct
class Generation:
    """What came out. Rows are in the order of the prompts; W is the widest row's number of new tokens allowed."""

    token_ids: Int32[Array, "B W"]  # new tokens, the eos token included if produced; 0 past `length`
    logprobs: Float32[Array, "B W"]  # of those tokens under the model, natural logarithm
    length: Int32[Array, "B"]
    finish_reason: Int32[Array, "B"]  # a `Finish`
    status: Int32[Array, ""]  # a `Status`: OK, or why the run ended early
    stats: Stats
    cache: Cache


def generate(
    model: Model,
    prompt_ids: Int32[Array, "B W"],
    prompt_length: Int32[Array, "B"],
    *,
    max_new_tokens: int | Int32[Array, "B"],
    max_model_len: int | None = None,
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
    attention: str = "auto",
    **options,
) -> Generation:
    """Continues prompts through a paged KV cache: a pure function, ready for `jax.jit`.

    Args:
      model: see `paxattn.decoding.model.Model`.
      prompt_ids: one prompt a row, anything past its length.
      prompt_length: at least 1.
      max_new_tokens: for all rows, or one value a row. As a traced array it needs `max_model_len`.
      max_model_len: tokens that a row can hold, prompt included; static. Widest prompt + new tokens by default.
      max_num_batched_tokens: tokens a prefill step feeds at most; longer prompts are fed in chunks. Static.
      attention: implementation of paged attention, by name.
      **options: what `start` takes: block_size, num_blocks, eos_token_id, and the sampling knobs temperature,
        top_k, top_p, min_p, repetition_penalty (a number or one a row), key.

    Returns:
      A `Generation`. Running out of blocks is no exception here: see its status, and `paxattn.check`.

    Raises:
      ValueError: arguments that can be seen to be wrong before anything runs.
    """
    state = start(
        model,
        prompt_ids,
        prompt_length,
        max_new_tokens=max_new_tokens,
        max_model_len=max_model_len,
        **options,
    )
    budget = prefill_budget(prompt_ids.shape, max_num_batched_tokens)
    width = state.tokens.shape[1] - 1 if is_traced(max_new_tokens) else int(np.max(max_new_tokens))
    return finish(advance(model, state, budget=budget, attention=attention), width=width)


def start(
    model: Model,
    prompt_ids: Int32[Array, "B W"],
    prompt_length: Int32[Array, "B"],
    *,
    max_new_tokens: int | Int32[Array, "B"],
    max_model_len: int | None = None,
    block_size: int = 16,
    num_blocks: int | None = None,
    eos_token_id: int | Sequence[int] | Int32[Array, "eos"] = (),
    **sampling,
) -> State:
    """An empty cache and the prompts on the token buffer: the state that `advance` turns.

    Args:
      model: gives the cache's shape and the vocabulary.
      prompt_ids: as in `generate`.
      prompt_length: as in `generate`.
      max_new_tokens: as in `generate`.
      max_model_len: as in `generate`.
      block_size: tokens a block holds; any size, unobservable in the tokens.
      num_blocks: blocks in the pool, NULL included; enough for every row's limit by default.
      eos_token_id: none, one or several ids that end a row.
      **sampling: see `Sampling.create`.
    """
    rows, width = prompt_ids.shape
    if max_model_len is None:
        if is_traced(max_new_tokens):
            raise ValueError("max_new_tokens is traced, so it cannot size the page table: pass max_model_len.")
        max_model_len = width + int(np.max(max_new_tokens))
    check_prompts(model, prompt_ids, prompt_length, max_new_tokens, max_model_len, block_size, num_blocks, sampling)
    if num_blocks is None:
        num_blocks = 1 + rows * -(-max_model_len // block_size)
    cache = Cache.create(
        model.cache_spec,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=rows,
        max_model_len=max_model_len,
    )
    prompt_length = jnp.array(prompt_length, jnp.int32)  # buffers of its own: the state may be donated
    tokens = jnp.zeros((rows, max(max_model_len, width)), jnp.int32)
    return State(
        cache=cache,
        tokens=tokens.at[:, :width].set(prompt_ids),
        logprobs=jnp.zeros(tokens.shape, jnp.float32),
        line=jnp.arange(rows),
        known=jnp.array(prompt_length),
        prompt_length=prompt_length,
        limit=prompt_length + jnp.asarray(max_new_tokens, jnp.int32),
        finish=jnp.full(rows, Finish.RUNNING, jnp.int32),
        eos=jnp.atleast_1d(jnp.asarray(eos_token_id, jnp.int32)),
        sampling=Sampling.create(rows, **sampling),
        status=jnp.int32(Status.OK),
        stats=Stats.zeros(),
    )


def finish(state: State, *, width: int) -> Generation:
    """The new tokens of each row, cut to `width` columns, and everything that was counted."""
    return Generation(
        token_ids=new_tokens(state.tokens, state.prompt_length, state.known, width),
        logprobs=new_tokens(state.logprobs, state.prompt_length, state.known, width),
        length=state.known - state.prompt_length,
        finish_reason=state.finish,
        status=state.status,
        stats=state.stats,
        cache=state.cache,
    )


def new_tokens(buffer: Array, prompt_length: Int32[Array, "R"], known: Int32[Array, "R"], width: int) -> Array:
    """What stands in each line of a buffer [R, M] between its prompt and its end: [R, width], 0 past it."""
    at = prompt_length[:, None] + jnp.arange(width)
    new = at < known[:, None]
    at = jnp.minimum(at, buffer.shape[1] - 1)
    return jnp.where(new, jnp.take_along_axis(buffer, at, axis=1), 0)


def prefill_budget(prompt_shape: tuple[int, ...], max_num_batched_tokens: int) -> int:
    """Length of the token axis while prompts are fed: as many steps as the limit asks for, of equal length."""
    if max_num_batched_tokens < 1:
        raise ValueError(f"max_num_batched_tokens is {max_num_batched_tokens}; it must be at least 1.")
    tokens = math.prod(prompt_shape)
    steps = -(-tokens // max_num_batched_tokens)
    return -(-tokens // steps)


def is_traced(value) -> bool:
    """Whether a value is known only when the program runs."""
    return isinstance(value, jax.core.Tracer)


def check_prompts(
    model, prompt_ids, prompt_length, max_new_tokens, max_model_len, block_size, num_blocks, sampling
) -> None:
    """Refuses what can be seen to be wrong on the host; traced values are the caller's own responsibility."""

    def require(value, name: str, good, limit: str) -> None:
        if value is None or is_traced(value):
            return
        values = np.atleast_1d(np.asarray(value))
        bad = ~good(values)
        if bad.any():
            where = f" in row {int(np.argmax(bad))}" if values.size > 1 else ""
            raise ValueError(f"{name} is {values[bad][0]}{where}; {limit}")

    rows, width = prompt_ids.shape
    if rows == 0 or width == 0:
        raise ValueError(f"prompt_ids has shape {prompt_ids.shape}; at least one prompt of one token is needed.")
    require(block_size, "block_size", lambda x: x >= 1, "it must be at least 1 token.")
    require(num_blocks, "num_blocks", lambda x: x >= 2, "it must be at least 2, as block 0 is never handed out.")
    require(prompt_length, "prompt_length", lambda x: x >= 1, "a prompt cannot be empty; give at least one token.")
    require(prompt_length, "prompt_length", lambda x: x <= width, f"prompt_ids has {width} columns.")
    require(max_new_tokens, "max_new_tokens", lambda x: x >= 1, "it must be at least 1.")
    knobs = {
        "temperature": (
            lambda x: (x >= 0) & np.isfinite(x),
            "it must be finite and at least 0 (0 is greedy).",
        ),
        "top_k": (lambda x: x >= 0, "it must be at least 0 (0 turns it off)."),
        "top_p": (lambda x: (x > 0) & (x <= 1), "it must be in (0, 1] (1 turns it off)."),
        "min_p": (lambda x: (x >= 0) & (x <= 1), "it must be in [0, 1] (0 turns it off)."),
        "repetition_penalty": (lambda x: (x > 0) & np.isfinite(x), "it must be finite and above 0 (1: off)."),
    }
    unknown = sorted(set(sampling) - {*knobs, "key"})
    if unknown:
        raise ValueError(f"unknown options {', '.join(unknown)}; sampling takes {', '.join((*knobs, 'key'))}.")
    for name, (good, limit) in knobs.items():
        require(sampling.get(name), name, good, limit)
    if is_traced(prompt_length):
        return
    lengths = np.asarray(prompt_length)
    if not is_traced(prompt_ids):
        ids = np.asarray(prompt_ids)[np.arange(width) < lengths[:, None]]
        require(
            ids,
            "a token id",
            lambda x: (x >= 0) & (x < model.vocab_size),
            f"ids are in [0, {model.vocab_size}).",
        )
    if not is_traced(max_new_tokens):
        limit = f"a row holds max_model_len = {max_model_len} tokens; shorten the prompt or raise max_model_len."
        require(
            lengths + np.asarray(max_new_tokens),
            "prompt + max_new_tokens",
            lambda x: x <= max_model_len,
            limit,
        )
    if num_blocks is not None:
        need = -(-lengths // block_size)
        limit = f"the pool has {num_blocks - 1} to hand out, so it never fits; raise num_blocks."
        require(need, "blocks that the prompt takes", lambda x: x <= num_blocks - 1, limit)
