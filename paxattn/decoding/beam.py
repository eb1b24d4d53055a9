"""Beam search: one prompt, its `num_beams` best continuations, the cache reordered by remapping the page table.

    rows a b c d --feed--> log-probabilities + scores --top 2k of k * V--> candidates
      that end    -> hypotheses, kept apart, the k best by score / length ** length_penalty
      the k best that go on: `fork(parent)`, no block moves; the next write copies a shared tail, once a beam

    parent [0 0 2 0]      row 0: [ 3 | 1 ]      the beams of row 1 and 3 died, their own blocks are free;
                          row 1: [ 3 | 1 ]      three rows go on from row 0
                          row 2: [ 3 | 7 ]
                          row 3: [ 3 | 1 ]

Semantics and names are those of Hugging Face transformers 5. The score of a hypothesis is the sum of its
log-probabilities / its number of new tokens ** length_penalty, all in float32.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from paxattn.cache import Cache
from paxattn.decoding.fan_out import prefill
from paxattn.decoding.generate import MAX_NUM_BATCHED_TOKENS, prefill_budget, start
from paxattn.decoding.model import Model
from paxattn.decoding.step import Finish, State, Stats, feed
from paxattn.pages import fork
from paxattn.typing import Array, Bool, Float, Float32, Int32, static, struct

NEVER = -1e9
"""Score of what is no hypothesis: far below any sum of log-probabilities, and finite."""

EarlyStopping = bool | Literal["never"]


@struct
class Hypotheses:
    """Sequences of R prompts, k each, best first. An empty place is RUNNING and scores NEVER."""

    tokens: Int32[Array, "R k M"]  # prompt and new tokens
    logprobs: Float32[Array, "R k M"]
    score: Float32[Array, "R k"]
    length: Int32[Array, "R k"]  # of both
    finish: Int32[Array, "R k"]  # a `Finish`

    def best(self, score: Float32[Array, "R c"], k: int) -> tuple["Hypotheses", Int32[Array, "R k"]]:
        """The k with the highest of these scores, which become theirs, and where they stood."""
        score, at = jax.lax.top_k(score, k)
        row = jnp.arange(at.shape[0])[:, None]
        return dataclasses.replace(jax.tree.map(lambda x: x[row, at], self), score=score), at


@struct
class Search:
    """A beam search in flight: the live beams as rows of a batch, k a prompt, and the hypotheses that have ended."""

    rows: State
    score: Float32[Array, "R k"]  # of the live beams: the sum of log-probabilities
    ended: Hypotheses
    length_penalty: Float32[Array, ""]
    early_stopping: EarlyStopping = static()


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
      **options: block_size, num_blocks, max_model_len and eos_token_id, as in `generate`.

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
    )
    places = prompt_ids.shape[0], num_beams
    first = jnp.where(jnp.arange(num_beams) == 0, 0.0, NEVER)  # the beams are equal yet: one stands for all
    score = jnp.broadcast_to(first.astype(jnp.float32), places)
    tokens = jnp.zeros((*places, rows.tokens.shape[1]), jnp.int32)
    none = [jnp.full(places, value) for value in (jnp.float32(NEVER), jnp.int32(0), jnp.int32(Finish.RUNNING))]
    ended = Hypotheses(tokens, tokens.astype(jnp.float32), *none)
    return Search(rows, score, ended, jnp.asarray(length_penalty, jnp.float32), early_stopping)


def branch(model: Model, search: Search, *, budget: int, attention: str = "auto") -> Search:
    """Feeds each prompt once, forks it to its beams, and gives each beam its first token."""
    group = search.score.shape[1]
    rows, newest = prefill(model, search.rows, group=group, budget=budget, attention=attention)
    return expand(model, dataclasses.replace(search, rows=rows), newest)


def advance(
    model: Model, search: Search, *, steps: Int32[Array, ""] | int | None = None, attention: str = "auto"
) -> Search:
    """Runs until the search of every prompt has ended, or for `steps` more steps: one `lax.while_loop`."""
    end = jnp.int32(2**31 - 1) if steps is None else search.rows.stats.steps + steps

    def body(search):
        rows = search.rows
        rows, newest = feed(model, rows, rows.pending, budget=rows.known.size, attention=attention)
        return expand(model, dataclasses.replace(search, rows=rows), newest)

    return jax.lax.while_loop(lambda s: jnp.any(s.rows.running) & (s.rows.stats.steps < end), body, search)


def expand(model: Model, search: Search, newest: Float[Array, "B E"]) -> Search:
    """One step of the search proper: candidates, hypotheses that end, beams that go on."""
    rows, (prompts, k) = search.rows, search.score.shape
    logits = model.logits(newest)
    sick = jnp.isnan(logits).reshape(prompts, -1).any(axis=1)
    running = rows.running.reshape(prompts, k)[:, 0]  # the beams of a prompt begin and end together
    alive = running & ~sick

    candidates, parent = _candidates(search, jax.nn.log_softmax(logits))
    has_ended = candidates.finish != Finish.RUNNING
    live, at = candidates.best(jnp.where(has_ended, candidates.score + NEVER, candidates.score), k)
    ended = _keep(search, candidates, has_ended & alive[:, None])
    goes_on = alive & ~_is_over(search, live, ended)

    over = jnp.where(has_ended.all(axis=1), Finish.LENGTH, Finish.STOP)
    finish = jnp.where(running, jnp.where(sick, Finish.NOT_FINITE, over), rows.finish.reshape(prompts, k)[:, 0])
    finish = jnp.where(goes_on, Finish.RUNNING, finish).astype(jnp.int32)
    parent = jnp.where(goes_on[:, None], jnp.take_along_axis(parent, at, axis=1), -1)  # no parent: the row is emptied
    table = fork(rows.cache.table, parent.ravel())
    rows = dataclasses.replace(
        rows,
        cache=Cache(table, rows.cache.layers),
        tokens=live.tokens.reshape(rows.tokens.shape),
        logprobs=live.logprobs.reshape(rows.tokens.shape),
        known=jnp.where(jnp.repeat(goes_on, k), live.length.ravel(), rows.known),
        finish=jnp.repeat(finish, k),
        stats=rows.stats.freed(rows.cache.table, table),
    )
    return dataclasses.replace(search, rows=rows, score=live.score, ended=ended)


def _candidates(search: Search, logprob: Float32[Array, "B V"]) -> tuple[Hypotheses, Int32[Array, "R c"]]:
    """The best continuations by one token of each prompt's beams together, best first, and the rows they continue.

    Of c = (1 + eos ids) * k, and 2 * k at least, k or more do not end: a beam has one candidate an eos id.
    """
    rows, (prompts, k) = search.rows, search.score.shape
    score = logprob.reshape(prompts, k, -1) + search.score[:, :, None]
    score, at = _top_k(score.reshape(prompts, -1), max(2, 1 + rows.eos.size) * k)
    parent = jnp.arange(prompts)[:, None] * k + at // logprob.shape[1]
    token = at % logprob.shape[1]
    place = (*jnp.indices(at.shape), rows.known[parent])
    length = rows.known[parent] + 1
    at_limit = jnp.where(length >= rows.limit[parent], Finish.LENGTH, Finish.RUNNING)
    candidates = Hypotheses(
        rows.tokens[parent].at[place].set(token, mode="drop"),
        rows.logprobs[parent].at[place].set(logprob[parent, token], mode="drop"),
        score,
        length,
        jnp.where((token[..., None] == rows.eos).any(axis=-1), Finish.STOP, at_limit).astype(jnp.int32),
    )
    return candidates, parent


def _keep(search: Search, candidates: Hypotheses, has_ended: Bool[Array, "R c"]) -> Hypotheses:
    """The hypotheses so far and those among the first k candidates that have ended: the best k of both."""
    k = search.score.shape[1]
    counts = has_ended & (jnp.arange(has_ended.shape[1]) < k)
    new = candidates.length - search.rows.prompt_length[::k, None]
    arrived = dataclasses.replace(
        candidates,
        score=jnp.where(counts, candidates.score / new.astype(jnp.float32) ** search.length_penalty, NEVER),
        finish=jnp.where(counts, candidates.finish, Finish.RUNNING),
    )
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), search.ended, arrived)
    return both.best(both.score, k)[0]


def _is_over(search: Search, live: Hypotheses, ended: Hypotheses) -> Bool[Array, "R"]:
    """Whether a prompt's search ends here: no beam can go on, or none that does can be expected to be kept."""
    k = search.score.shape[1]
    limit, prompt = search.rows.limit[::k], search.rows.prompt_length[::k]
    length = live.length[:, 0]
    longest = (search.early_stopping == "never") & (search.length_penalty > 0)
    new = (jnp.where(longest, limit, length) - prompt).astype(jnp.float32)
    hopeless = live.score[:, 0] / new**search.length_penalty <= ended.score[:, -1]
    full = (ended.finish != Finish.RUNNING).all(axis=1) & (search.early_stopping is True)
    return hopeless | full | (length >= limit)


def _top_k(
    score: Float32[Array, "R n"], k: int, *, chunk: int = 128
) -> tuple[Float32[Array, "R k"], Int32[Array, "R k"]]:
    """`lax.top_k` of long rows, the first of equals included: the best k lie in the k chunks with the best maxima."""
    rows, n = score.shape
    if n <= chunk * k:
        return jax.lax.top_k(score, k)
    chunks = jnp.pad(score, ((0, 0), (0, -n % chunk)), constant_values=-jnp.inf).reshape(rows, -1, chunk)
    ids = jnp.sort(jax.lax.top_k(chunks.max(axis=2), k)[1], axis=1)
    score, at = jax.lax.top_k(jnp.take_along_axis(chunks, ids[:, :, None], axis=1).reshape(rows, -1), k)
    return score, jnp.take_along_axis(ids, at // chunk, axis=1) * chunk + at % chunk


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
    )
