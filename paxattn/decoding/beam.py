"""Beam search: one prompt, its `num_beams` best continuations, the cache reordered by remapping the page table.

    begin   an empty cache, num_beams rows a prompt
    branch  each prompt is fed once, forked to its beams, and each beam gets its first token
    advance feed, expand (see expand.py), feed, expand ... in one lax.while_loop
    finish  the best hypotheses of each prompt

    fork(parent = [0 0 2 0])    row 0: [ 3 | 1 ]     the beams of rows 1 and 3 died, their own blocks are free;
                                row 1: [ 3 | 1 ]     three rows go on from row 0. No block moves: the next write
                                row 2: [ 3 | 7 ]     copies the shared tail, once a beam, and the last holder
                                row 3: [ 3 | 1 ]     keeps it

Semantics and names are those of Hugging Face transformers 5. The score of a hypothesis is the sum of its
log-probabilities / its number of new tokens ** length_penalty, all in float32.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from paxattn.cache import Cache
from paxattn.decoding.expand import NEVER, EarlyStopping, Hypotheses, Search, expand
from paxattn.decoding.fan_out import prefill
from paxattn.decoding.generate import MAX_NUM_BATCHED_TOKENS, prefill_budget, start
from paxattn.decoding.model import Model
from paxattn.decoding.step import Finish, Stats, feed, going
from paxattn.typing import Array, Float32, Int32, struct


@struct
class Beams:
    """What came out: n sequences a prompt, best first. W is the number of new tokens allowed."""

    token_ids: Int32[Array, "R n W"]  # new tokens, the eos token included; 0 past `length`
    logprobs: Float32[Array, "R n W"]  # of those tokens under the model, natural logarithm
    score: Float32[Array, "R n"]  # sum of logprobs / length ** length_penalty; NEVER for an empty place
    length: Int32[Array, "R n"]
    finish_reason: Int32[Array, "R n"]  # a `Finish`; for an empty place why the search of the prompt ended
    status: Int32[Array, ""]
    stats: Stats
    cache: Cache
    trace: Int32[Array, "steps 4"] | None = None  # of sharing, where it was asked for: see `paxattn.sharing`


def beam_search(
    model: Model,
    prompt_ids: Int32[Array, "R W"],
    prompt_length: Int32[Array, "R"],
    *,
    num_beams: int,
    max_new_tokens: int,
    num_return_sequences: int = 1,
    length_penalty: float | Float32[Array, ""] = 1.0,
    early_stopping: EarlyStopping = False,
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
    attention: str = "auto",
    **options,
) -> Beams:
    """Finds likely continuations of several prompts at once: a pure function, ready for `jax.jit`.

    Args:
      model: see `paxattn.decoding.model.Model`.
      prompt_ids: one prompt a row, anything past its length.
      prompt_length: at least 1.
      num_beams: live beams a prompt, static.
      max_new_tokens: of each sequence, static.
      num_return_sequences: sequences a prompt, at most num_beams; static.
      length_penalty: exponent of the length that divides a score; above 0 it favours long sequences.
      early_stopping: True ends a prompt once num_beams hypotheses have ended; False when the best live beam, were it
        to end now, beats none of them; "never" when no live beam can. Static.
      max_num_batched_tokens: tokens a prefill step feeds at most. Static.
      attention: implementation of paged attention, by name.
      **options: block_size, num_blocks, max_model_len, eos_token_id and trace, as in `generate`.

    Returns:
      `Beams`. When blocks run out its status says so, and the hypotheses that had ended are whole.

    Raises:
      ValueError: arguments that can be seen to be wrong before anything runs.
    """
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(f"num_return_sequences is {num_return_sequences}; it must be in [1, num_beams = {num_beams}].")
    search = begin(
        model,
        prompt_ids,
        prompt_length,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        **options,
    )
    budget = prefill_budget(prompt_ids.shape, max_num_batched_tokens)
    search = branch(model, search, budget=budget, attention=attention)
    search = advance(model, search, attention=attention)
    return finish(search, num_return_sequences=num_return_sequences, width=max_new_tokens)


def begin(
    model: Model,
    prompt_ids: Int32[Array, "R W"],
    prompt_length: Int32[Array, "R"],
    *,
    num_beams: int,
    max_new_tokens: int | Int32[Array, "R"],
    length_penalty: float | Float32[Array, ""] = 1.0,
    early_stopping: EarlyStopping = False,
    max_model_len: int | None = None,
    block_size: int = 16,
    num_blocks: int | None = None,
    eos_token_id: int | Sequence[int] | Int32[Array, "eos"] = (),
    trace: int = 0,
) -> Search:
    """A search whose prompts are not fed yet; arguments as in `beam_search` and `generate`."""
    if not (isinstance(early_stopping, bool) or early_stopping == "never"):
        raise ValueError(f"early_stopping is {early_stopping!r}; it must be True, False or 'never'.")
    rows = start(
        model,
        prompt_ids,
        prompt_length,
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_beams,
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=num_blocks,
        eos_token_id=eos_token_id,
        trace=trace,
    )
    places = prompt_ids.shape[0], num_beams
    first = jnp.where(jnp.arange(num_beams) == 0, 0.0, NEVER)  # the beams are equal yet: one stands for all
    score = jnp.broadcast_to(first.astype(jnp.float32), places)
    tokens = jnp.zeros((*places, rows.tokens.shape[1]), jnp.int32)
    none = [jnp.full(places, value) for value in (jnp.float32(NEVER), jnp.int32(0), jnp.int32(Finish.RUNNING))]
    ended = Hypotheses(tokens, tokens.astype(jnp.float32), *none)
    # A buffer of its own: the search may be donated.
    return Search(rows, score, ended, jnp.array(length_penalty, jnp.float32), early_stopping)


def branch(model: Model, search: Search, *, budget: int, attention: str = "auto") -> Search:
    """Feeds each prompt once, forks it to its beams, and gives each beam its first token."""
    group = search.score.shape[1]
    rows, newest = prefill(model, search.rows, group=group, budget=budget, attention=attention)
    return expand(model, dataclasses.replace(search, rows=rows), newest)


def advance(
    model: Model, search: Search, *, steps: Int32[Array, ""] | int | None = None, attention: str = "auto"
) -> Search:
    """Runs until the search of every prompt has ended, or for `steps` more steps: one `lax.while_loop`."""
    more = going(search.rows, steps)

    def body(search):
        rows = search.rows
        rows, newest = feed(model, rows, rows.pending, budget=rows.known.size, attention=attention, max_queries=1)
        return expand(model, dataclasses.replace(search, rows=rows), newest)

    return jax.lax.while_loop(lambda search: more(search.rows), body, search)


def finish(search: Search, *, num_return_sequences: int, width: int) -> Beams:
    """The best hypotheses of each prompt, their new tokens cut to `width` columns, and everything that was counted."""
    rows, k = search.rows, search.score.shape[1]
    ended = jax.tree.map(lambda x: x[:, :num_return_sequences], search.ended)
    reason = jnp.where(ended.finish == Finish.RUNNING, rows.finish[::k, None], ended.finish)
    start = rows.prompt_length[::k, None]
    at = start[..., None] + jnp.arange(width)
    new = at < ended.length[..., None]
    at = jnp.broadcast_to(jnp.minimum(at, rows.tokens.shape[1] - 1), new.shape)

    def taken(buffer):
        return jnp.where(new, jnp.take_along_axis(buffer, at, axis=2), 0)

    return Beams(
        token_ids=taken(ended.tokens),
        logprobs=taken(ended.logprobs),
        score=ended.score,
        length=jnp.where(ended.finish == Finish.RUNNING, 0, ended.length - start),
        finish_reason=reason,
        status=rows.status,
        stats=rows.stats,
        cache=rows.cache,
        trace=rows.trace,
    )
