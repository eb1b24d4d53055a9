"""Generation as one pure function: prompts in, tokens out, the paged cache inside.

    generate = finish . advance . start

    start    checks, allocates an empty cache, puts the prompts on the token buffer
    fan_out  where a prompt has several rows: one feeds it, then they part (see fan_out.py)
    advance  chunked prefill, then decode: a lax.while_loop each (see step.py)
    finish   the new tokens of each row, why it ended, counters, and the cache

Wrap it in `jax.jit` as you like: called without, it compiles anew each time. Streaming calls `advance` a few steps at
a time.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from paxattn.cache import Cache
from paxattn.decoding import eviction
from paxattn.decoding.eviction import Eviction
from paxattn.decoding.fan_out import fan_out
from paxattn.decoding.model import Model
from paxattn.decoding.sampling import Sampling, sample_keys
from paxattn.decoding.step import Finish, State, Stats, advance, end_ids
from paxattn.sharing import COLUMNS
from paxattn.status import Status
from paxattn.typing import Array, Float32, Int32, struct

MAX_NUM_BATCHED_TOKENS = 512
"""Tokens a prefill step may feed, by default."""


@struct
class Generation:
    """What came out: rows in the order of the prompts, those of one prompt together.

    W is the widest row's number of new tokens allowed.
    """

    token_ids: Int32[Array, "B W"]  # new tokens, the eos token included if produced; 0 past `length`
    logprobs: Float32[Array, "B W"]  # of those tokens under the model, natural logarithm
    length: Int32[Array, "B"]
    finish_reason: Int32[Array, "B"]  # a `Finish`
    status: Int32[Array, ""]  # a `Status`: OK, or why the run ended early
    stats: Stats
    cache: Cache
    trace: Int32[Array, "steps 4"] | None = None  # of sharing, where it was asked for: see `paxattn.sharing`


def generate(
    model: Model,
    prompt_ids: Int32[Array, "B W"],
    prompt_length: Int32[Array, "B"],
    *,
    max_new_tokens: int | Int32[Array, "B"],
    num_return_sequences: int = 1,
    max_model_len: int | None = None,
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
    attention: str = "auto",
    evict: Eviction | None = None,
    **options,
) -> Generation:
    """Continues prompts through a paged KV cache: a pure function, ready for `jax.jit`.

    Args:
      model: see `paxattn.decoding.model.Model`.
      prompt_ids: one prompt a row, anything past its length.
      prompt_length: at least 1.
      max_new_tokens: for all prompts, or one value a prompt. As a traced array it needs `max_model_len`, at which a row
        ends whatever the values are.
      num_return_sequences: rows a prompt, static. The prompt is fed once and shared by its rows; row j of a prompt
        samples with a key of its own, see `sample_keys`.
      max_model_len: tokens that a row can hold, prompt included; static. Widest prompt + new tokens by default.
      max_num_batched_tokens: tokens a prefill step feeds at most; longer prompts are fed in chunks. Static.
      attention: implementation of paged attention, by name.
      evict: gives blocks back while rows live, see `paxattn.decoding.eviction`; nothing is evicted by default.
      **options: what `start` takes: block_size, num_blocks, eos_token_id, trace, and the sampling knobs temperature,
        top_k, top_p, min_p, repetition_penalty (a number or one a prompt), key.

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
        num_return_sequences=num_return_sequences,
        max_model_len=max_model_len,
        **options,
    )
    budget = prefill_budget(prompt_ids.shape, max_num_batched_tokens)
    if num_return_sequences > 1:
        state = fan_out(model, state, group=num_return_sequences, budget=budget, attention=attention, evict=evict)
    run = functools.partial(advance, shared=num_return_sequences > 1)
    run = run if evict is None else functools.partial(eviction.advance, evict=evict)
    return finish(run(model, state, budget=budget, attention=attention), width=answer_width(state, max_new_tokens))


def start(
    model: Model,
    prompt_ids: Int32[Array, "B W"],
    prompt_length: Int32[Array, "B"],
    *,
    max_new_tokens: int | Int32[Array, "B"],
    num_return_sequences: int = 1,
    max_model_len: int | None = None,
    block_size: int = 16,
    num_blocks: int | None = None,
    eos_token_id: int | Sequence[int] | Int32[Array, "eos"] = (),
    trace: int = 0,
    **sampling,
) -> State:
    """An empty cache and the prompts on the token buffer: the state that `advance` turns.

    Args:
      model: gives the cache's shape and the vocabulary.
      prompt_ids: as in `generate`.
      prompt_length: as in `generate`.
      max_new_tokens: as in `generate`.
      num_return_sequences: rows a prompt; where it is above 1, `fan_out` comes before `advance`.
      max_model_len: as in `generate`.
      block_size: tokens a block holds; any size, unobservable in the tokens.
      num_blocks: blocks in the pool, NULL included; by default enough for every row's limit, with what the rows of
        a prompt share counted once.
      eos_token_id: none, one or several ids that end a row.
      trace: record the block counts of so many steps; see `paxattn.sharing`.
      **sampling: see `Sampling.create`.
    """
    prompts, width = _sizes(prompt_ids, prompt_length)
    if max_model_len is None:
        if is_traced(max_new_tokens):
            raise ValueError("max_new_tokens is traced, so it cannot size the page table: pass max_model_len.")
        max_model_len = width + int(np.max(max_new_tokens))
    check_prompts(model, prompt_ids, prompt_length, max_new_tokens, max_model_len, block_size, num_blocks, sampling)
    if num_return_sequences < 1:
        raise ValueError(f"num_return_sequences is {num_return_sequences}; it must be at least 1.")
    if num_blocks is None:
        alone = num_return_sequences == 1 or is_traced(max_new_tokens)
        new = max_model_len if alone else int(np.max(max_new_tokens))
        num_blocks = pool_size(prompts, width, new, num_return_sequences, block_size, max_model_len)
    cache = Cache.create(
        model.cache_spec,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=prompts * num_return_sequences,
        max_model_len=max_model_len,
    )

    def rows(x):  # buffers of their own: the state may be donated
        return jnp.repeat(x, num_return_sequences, axis=0)

    knobs = Sampling.asked(prompts, **sampling)
    if knobs is not None:
        knobs = dataclasses.replace(jax.tree.map(rows, knobs), key=sample_keys(knobs.key, num_return_sequences))
    tokens = jnp.zeros((prompts, max(max_model_len, width)), jnp.int32).at[:, :width].set(prompt_ids)
    prompt_length = jnp.asarray(prompt_length, jnp.int32)
    new = jnp.minimum(jnp.asarray(max_new_tokens, jnp.int32), max_model_len - prompt_length)  # a sum might overflow
    return State(
        cache=cache,
        tokens=rows(tokens),
        logprobs=rows(jnp.zeros(tokens.shape, jnp.float32)),
        line=jnp.arange(prompts * num_return_sequences),
        known=jnp.array(rows(prompt_length)),
        prompt_length=rows(prompt_length),
        limit=rows(prompt_length + new),
        finish=rows(jnp.where(prompt_length >= 1, jnp.int32(Finish.RUNNING), jnp.int32(Finish.INVALID))),
        eos=end_ids(eos_token_id),
        sampling=knobs,
        status=jnp.int32(Status.OK),
        stats=Stats.zeros(),
        trace=jnp.zeros((trace, len(COLUMNS)), jnp.int32) if trace else None,
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
        trace=state.trace,
    )


def answer_width(state: State, max_new_tokens: int | Int32[Array, "R"]) -> int:
    """Columns that hold every answer: of the largest limit where it is known, and never more than a row has."""
    most = state.tokens.shape[1] - 1
    return most if is_traced(max_new_tokens) else min(most, int(np.max(max_new_tokens)))


def new_tokens(buffer: Array, prompt_length: Int32[Array, "R"], known: Int32[Array, "R"], width: int) -> Array:
    """What stands in each line of a buffer [R, M] between its prompt and its end: [R, width], 0 past it."""
    at = prompt_length[:, None] + jnp.arange(width)
    new = at < known[:, None]
    at = jnp.minimum(at, buffer.shape[1] - 1)
    return jnp.where(new, jnp.take_along_axis(buffer, at, axis=1), 0)


def pool_size(prompts: int, width: int, new: int, group: int, block_size: int, max_model_len: int) -> int:
    """Blocks, NULL included, that are enough for `group` rows a prompt: whole blocks of the prompt count once.

    Args:
      prompts: how many, of at most `width` tokens.
      width: of the widest prompt.
      new: tokens that each row may add.
      group: rows a prompt.
      block_size: tokens a block.
      max_model_len: tokens that a row can hold.
    """
    pages = -(-max_model_len // block_size)
    private = min(pages, -(-new // block_size) + 1)
    return 1 + prompts * min(group * pages, width // block_size + group * private)


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


def _sizes(prompt_ids, prompt_length) -> tuple[int, int]:
    """B and W."""
    if 0 in prompt_ids.shape:
        raise ValueError(f"prompt_ids has shape {prompt_ids.shape}; at least one prompt of one token is needed.")
    if prompt_ids.ndim != 2 or np.shape(prompt_length) != prompt_ids.shape[:1]:
        raise ValueError(
            f"prompt_ids has shape {prompt_ids.shape} and prompt_length {np.shape(prompt_length)}; they must be [B, W] "
            "and [B]."
        )
    return prompt_ids.shape


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

    _, width = _sizes(prompt_ids, prompt_length)
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
            lengths.astype(np.int64) + np.asarray(max_new_tokens),
            "prompt + max_new_tokens",
            lambda x: x <= max_model_len,
            limit,
        )
    if num_blocks is not None:
        need = -(-lengths // block_size)
        limit = f"the pool has {num_blocks - 1} to hand out, so it never fits; raise num_blocks."
        require(need, "blocks that the prompt takes", lambda x: x <= num_blocks - 1, limit)
