"""One step of beam search: of all continuations by one token the best, those that end and those that go on.

    log-probabilities + scores [k, V] a prompt --top 2k--> candidates
      that end     -> hypotheses: the k best by score / length ** length_penalty are kept
      that go on   -> the k best are the new beams: fork(parent)

Semantics are those of Hugging Face transformers 5, all scores in float32.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from paxattn.cache import Cache
from paxattn.decoding.model import Model, logits_of
from paxattn.decoding.step import Finish, State
from paxattn.decoding.vocabulary import Scores, best, local, log_softmax, peak
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


def expand(model: Model, search: Search, newest: Float[Array, "B E"]) -> Search:
    """One step of the search proper: candidates, hypotheses that end, beams that go on."""
    rows, (prompts, k) = search.rows, search.score.shape
    logits = logits_of(model, newest)
    found = peak(logits)
    sick = jnp.isnan(found.top).reshape(prompts, k).any(axis=1)
    running = rows.running.reshape(prompts, k)[:, 0]  # the beams of a prompt begin and end together
    alive = running & ~sick

    candidates, parent = _candidates(search, log_softmax(logits, found))
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


def _candidates(search: Search, logprob: Scores) -> tuple[Hypotheses, Int32[Array, "R c"]]:
    """The best continuations by one token of each prompt's beams together, best first, and the rows they continue.

    Of c = (1 + eos ids) * k, and 2 * k at least, k or more do not end: a beam has one candidate an eos id.
    """
    rows, (prompts, k) = search.rows, search.score.shape
    values, first = local(logprob), jnp.arange(prompts)[:, None] * k
    score = values.reshape(prompts, k, -1) + search.score[:, :, None]
    score, at = top_k(score.reshape(prompts, -1), max(2, 1 + rows.eos.size) * k)
    beam, token = at // values.shape[1], at % values.shape[1]
    score, beam, token, new = best(logprob, score, beam, token, values[first + beam, token])
    parent = first + beam
    place = (*jnp.indices(at.shape), rows.known[parent])
    length = rows.known[parent] + 1
    at_limit = jnp.where(length >= rows.limit[parent], Finish.LENGTH, Finish.RUNNING)
    candidates = Hypotheses(
        rows.tokens[parent].at[place].set(token, mode="drop"),
        rows.logprobs[parent].at[place].set(new, mode="drop"),
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


def top_k(
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
