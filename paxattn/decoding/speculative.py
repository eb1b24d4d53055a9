"""Speculative decoding: guess k tokens, verify them in one step, roll the page table back to what held.

    known  [ a b c d ]     guess  e f g h           extend + 5 tokens     [ 3 | 7 | 9 ]
    target takes           e f x          g, h were guessed on a wrong f
    known  [ a b c d e f x ]                        truncate              [ 3 | 7 ]      block 9 is free again

The target takes a token at each place from its own scores (see rejection.py); the guess holds as far as it agrees,
and the first token beyond that is the target's own: a bonus where all held. Every row has its own number each step.
Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; Chen et al. 2023.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from paxattn.cache import Cache, extend
from paxattn.decoding.drafters import Draft, Drafter
from paxattn.decoding.generate import MAX_NUM_BATCHED_TOKENS, Generation, answer_width, finish, prefill_budget, start
from paxattn.decoding.model import Model, logits_of
from paxattn.decoding.rejection import check_vocabulary, take
from paxattn.decoding.sampling import logprob
from paxattn.decoding.step import Finish, State, extended, going, prompts_first, step
from paxattn.pages import PageTable, tails_to_copy, truncate
from paxattn.status import Status
from paxattn.typing import Array, Bool, Int32, struct


@struct
class Tally:
    """What speculation did, a row. Blocks are those past what the row's next token alone would have taken."""

    steps: Int32[Array, "B"]  # verify steps
    tokens: Int32[Array, "B"]  # that came out of them
    drafted: Int32[Array, "B"]
    accepted: Int32[Array, "B"]
    blocks_reserved: Int32[Array, "B"]  # for guessed tokens
    blocks_rolled_back: Int32[Array, "B"]  # of those, because tokens were rejected

    @staticmethod
    def zeros(num_rows: int) -> "Tally":
        """Nothing counted yet."""
        return Tally(*(jnp.zeros(num_rows, jnp.int32) for _ in range(6)))


@struct
class Speculation(State):
    """A batch in flight that also guesses: a `State`, so that `step`, `stop` and `finish` serve it too."""

    carry: Any  # the drafter's
    origin: Int32[Array, "B"]  # `known` when the last prompt was fed, where all rows set out together
    wary: Bool[Array, "B"]  # scores were NaN with a guess behind them: one step without, to see whose NaN it is
    tally: Tally


def speculate(
    model: Model,
    prompt_ids: Int32[Array, "B W"],
    prompt_length: Int32[Array, "B"],
    *,
    drafter: Drafter,
    max_new_tokens: int | Int32[Array, "B"],
    num_speculative_tokens: int = 4,
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
    attention: str = "auto",
    **options,
) -> tuple[Generation, Tally]:
    """`generate`, several tokens a step where the drafter guesses well: a pure function, ready for `jax.jit`.

    Args:
      model: the target; see `paxattn.decoding.model.Model`.
      prompt_ids: one prompt a row.
      prompt_length: at least 1.
      drafter: who guesses; `NGram`, `DraftModel` or your own `Drafter`.
      max_new_tokens: for all rows, or one value a row. As a traced array it needs `max_model_len`.
      num_speculative_tokens: k, tokens guessed a step at most. Static.
      max_num_batched_tokens: tokens a prefill step feeds at most. Static.
      attention: implementation of paged attention, by name.
      **options: what `start` takes, but for num_return_sequences: a prompt is answered once.

    Returns:
      The `Generation`, greedy tokens equal to those of `generate`, and what was guessed. A full pool shortens guesses
      and holds rows back, down to plain decoding; it ends a run only where it would have ended `generate`.

    Raises:
      ValueError: arguments that can be seen to be wrong before anything runs.
    """
    if (sequences := options.get("num_return_sequences", 1)) != 1:
        raise ValueError(f"num_return_sequences is {sequences}; speculation answers a prompt once, leave it out.")
    state = start(model, prompt_ids, prompt_length, max_new_tokens=max_new_tokens, **options)
    state = begin(drafter, state, k=num_speculative_tokens)
    budget = prefill_budget(prompt_ids.shape, max_num_batched_tokens)
    state = advance(model, drafter, state, k=num_speculative_tokens, budget=budget, attention=attention)
    return finish(state, width=answer_width(state, max_new_tokens)), state.tally


def begin(drafter: Drafter, state: State, *, k: int) -> Speculation:
    """A started batch that will guess k tokens a step."""
    if k < 1:
        raise ValueError(f"num_speculative_tokens is {k}, must be at least 1.")
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(State)}
    # Buffers of its own: the state may be donated.
    return Speculation(
        **parts,
        carry=drafter.init(state, k),
        origin=jnp.array(state.known),
        wary=jnp.zeros(state.known.size, bool),
        tally=Tally.zeros(state.known.size),
    )


def advance(
    model: Model,
    drafter: Drafter,
    state: Speculation,
    *,
    k: int,
    budget: int,
    steps: Int32[Array, ""] | int | None = None,
    attention: str = "auto",
) -> Speculation:
    """`paxattn.advance` whose decoding body guesses and verifies: k + 1 tokens a row, of which one at least stays."""
    check_vocabulary(getattr(drafter, "vocab_size", model.vocab_size), model.vocab_size)

    def feed(state):
        state = step(model, state, budget=budget, attention=attention)
        return dataclasses.replace(state, origin=state.known)

    def decode(state):
        draft, carry = drafter.propose(state.carry, state, k)
        state = verify(model, dataclasses.replace(state, carry=carry), draft, attention=attention)
        return dataclasses.replace(state, carry=drafter.settle(state.carry, state))

    return prompts_first(state, going(state, steps), feed=feed, decode=decode)


def verify(model: Model, state: Speculation, draft: Draft, *, attention: str = "auto") -> Speculation:
    """Feeds each row's last token and its guess, keeps what holds, rolls the cache back to that.

    When not even one token a row finds room the rows still running end as OUT_OF_BLOCKS, as in `step`.
    """
    rows, k = draft.tokens.shape
    count = _counts(state, jnp.where(state.wary, 0, draft.count), k)
    cache, plan, status = extend(state.cache, count, budget=rows * (k + 1), attention=attention, max_queries=k + 1)
    picks = (status == Status.OK) & (count > 0)

    place = jnp.arange(k + 1)
    at = state.known[:, None] + place  # where the target's token of each place goes
    real = place < count[:, None] - 1  # places whose token was guessed
    guess = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
    tokens = _put(state.tokens, at, guess, real)
    hidden, layers = model(jnp.where(plan.live, tokens[plan.row, plan.position], 0), plan, cache.layers)
    fed = plan.query_start[:-1, None] + jnp.minimum(place, jnp.maximum(count[:, None] - 1, 0))
    logits = logits_of(model, hidden[jnp.minimum(fed, rows * (k + 1) - 1).ravel()])
    taken = take(logits, state.sampling, tokens, at, guess, real, draft.probability)
    logprobs = logprob(logits, taken.ravel()).reshape(rows, k + 1)
    finite = ~jnp.isnan(logprobs)

    # A place counts when the guess held before it, none of its tokens ended the row, and all scores are numbers.
    ends = (taken[..., None] == state.eos).any(axis=-1)
    agrees = real & (taken == guess)
    due = picks[:, None] & _before(agrees & ~ends)
    kept = due & finite & _before(finite)
    known = state.known + kept.sum(axis=1, dtype=jnp.int32)
    ended = jnp.where(known >= state.limit, Finish.LENGTH, Finish.RUNNING)
    ended = jnp.where((kept & ends).any(axis=1), Finish.STOP, ended)
    sick = (due & ~kept).any(axis=1)
    ended = jnp.where(sick & (count == 1), Finish.NOT_FINITE, ended)
    counted = extended(state, cache.table, count, plan, status)
    after = dataclasses.replace(
        counted,
        tokens=_put(state.tokens, at, taken, kept),
        logprobs=_put(state.logprobs, at, logprobs, kept),
        known=known,
        finish=jnp.where(picks & state.running, ended, counted.finish).astype(jnp.int32),
        wary=sick & (count > 1),
    )
    table = truncate(cache.table, jnp.where(after.running, after.known - 1, 0))
    after = dataclasses.replace(after, cache=Cache(table, layers))
    accepted = (kept & agrees).sum(axis=1, dtype=jnp.int32)
    return _counted(state, after, cache.table, accepted)


def _put(buffer, at, values, where):
    """Writes values [B, k + 1] to the columns `at` of a buffer [B, M], in the places of a mask."""
    row = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[row, jnp.where(where, at, buffer.shape[1])].set(values, mode="drop")


def _before(held):
    """Whether a mask [B, k + 1] holds in all places before each."""
    return jnp.pad(jnp.cumprod(held[:, :-1], axis=1), ((0, 0), (1, 0)), constant_values=1).astype(bool)


def _counts(state: Speculation, guessed: Int32[Array, "B"], k: int) -> Int32[Array, "B"]:
    """Tokens that each row feeds: its last and as much of its guess as its limit and the pool allow.

    A row may run ahead only as far as the pool would hold all running rows there: so a fast row never takes
    the block with which a slow one would have gone on in plain decoding, where they move together. Shared tails are
    copied before any guess is.
    """
    table, limit = state.cache.table, state.limit
    ahead = (state.known - state.origin)[:, None] + 1 + jnp.arange(k + 1)
    end = jnp.minimum(state.origin + ahead[..., None], limit) - 1  # what all rows would have cached: [B, k + 1, B]
    fresh = jnp.maximum(table.pages_for(end) - table.pages_for(table.length), 0)
    copies = jnp.sum(tails_to_copy(table, state.running.astype(jnp.int32)))
    fits = jnp.sum(jnp.where(state.running, fresh, 0), axis=-1) + copies <= table.blocks.num_free
    count = jnp.minimum(jnp.minimum(1 + guessed, limit - state.known), fits.sum(axis=-1, dtype=jnp.int32))
    count = jnp.where(jnp.any(state.running & (count > 0)), count, 1)  # no row can move: `extend` says so
    return jnp.where(state.running, count, 0)


def _counted(before: Speculation, after: Speculation, reserved: PageTable, accepted: Int32[Array, "B"]) -> Speculation:
    """Counts what a verify step guessed and rolled back; `reserved` is the table between `extend` and `truncate`."""
    fed, pages = reserved.length - before.cache.table.length, reserved.pages_for(reserved.length)
    plain = before.known  # what the row would have cached after a step of plain decoding
    new = Tally(
        steps=jnp.minimum(fed, 1),
        tokens=after.known - before.known,
        drafted=jnp.maximum(fed - 1, 0),
        accepted=accepted,
        blocks_reserved=jnp.where(fed > 0, pages - reserved.pages_for(plain), 0),
        blocks_rolled_back=jnp.where(fed > 0, pages - reserved.pages_for(jnp.maximum(after.known - 1, plain)), 0),
    )
    stats = after.stats.freed(reserved, after.cache.table)
    return dataclasses.replace(after, stats=stats, tally=jax.tree.map(jnp.add, before.tally, new))
