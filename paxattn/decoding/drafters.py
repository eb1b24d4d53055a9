"""Drafters: who guesses the next k tokens of each row before the target verifies them.

    tokens  [ a b c d e a b ]           NGram       the longest suffix seen before, and what followed it: c d e
                      \\ known           DraftModel  k steps of a smaller model through a paged cache of its own

A drafter is a pytree with three pure functions; what it remembers lives in the loop's carry. The target's tokens do
not depend on it, only their speed does. Saxena 2023 (prompt lookup); Leviathan et al. 2023 (a smaller model).
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from paxattn.cache import Cache, extend
from paxattn.decoding.model import Model, logits_of
from paxattn.decoding.sampling import DRAFT, draw, penalise, pick, scores, stream
from paxattn.decoding.step import State, share
from paxattn.decoding.vocabulary import size, whole
from paxattn.pages import truncate
from paxattn.typing import Array, Float32, Int32, static, struct

CATCH_UP = 512
"""Tokens that a draft model feeds at most in one go while it reads the prompts."""


@struct
class Draft:
    """A guess at what follows the known tokens of each row."""

    tokens: Int32[Array, "B k"]
    count: Int32[Array, "B"]  # how many of them are meant; 0 is plain decoding
    probability: Float32[Array, "B k V"] | None  # that each was drawn from; None: they are certain given the text


class Drafter(Protocol):
    """A pytree that guesses. `carry` is any pytree of arrays whose shapes stay; it goes through `lax.while_loop`."""

    def init(self, state: State, k: int) -> Any:
        """The carry before anything was drafted."""
        ...

    def propose(self, carry: Any, state: State, k: int) -> tuple[Draft, Any]:
        """Guesses from `state.tokens[:, :known]`; all rows are decoding, those not `running` do not matter.

        A guess that is drawn at random gives the probabilities it was drawn from, and takes its noise from
        `stream(state.sampling, DRAFT)`, or the verdict on it is biased. Without `state.sampling` every row is greedy.
        """
        ...

    def settle(self, carry: Any, state: State) -> Any:
        """Told what became of the guess: `state` after the verdict. Rolls back what is not known after all."""
        ...


@struct
class NGram:
    """Prompt lookup: finds the last n tokens earlier in the row and guesses what followed them there.

    The longest match of at most `n` tokens counts, the latest of equals. Where what followed runs into the row's end it
    is taken to go round: after "a b a b a" comes "b a b a ...".
    """

    n: int = static(default=3)

    def init(self, state: State, k: int) -> tuple[()]:
        """Remembers nothing: the tokens are all it needs."""
        if self.n < 1:
            raise ValueError(f"n is {self.n}, must be at least 1 token to look for.")
        return ()

    def propose(self, carry: tuple[()], state: State, k: int) -> tuple[Draft, tuple[()]]:
        """Rows without a match guess nothing."""
        tokens, known = state.tokens, state.known[:, None]
        end = jnp.arange(tokens.shape[1])  # a match ends before this column
        matched, agrees = jnp.zeros(tokens.shape, jnp.int32), (end > 0) & (end < known)
        for back in range(1, self.n + 1):
            suffix = jnp.take_along_axis(tokens, jnp.maximum(known - back, 0), axis=1)
            agrees &= (jnp.roll(tokens, back, axis=1) == suffix) & (end >= back)
            matched += agrees
        start = jnp.argmax(matched * tokens.shape[1] + end, axis=1)[:, None]
        at = start + jnp.arange(k) % jnp.maximum(known - start, 1)
        guess = jnp.take_along_axis(tokens, jnp.minimum(at, tokens.shape[1] - 1), axis=1)
        return Draft(guess, jnp.where(jnp.any(matched > 0, axis=1), k, 0), None), carry

    def settle(self, carry: tuple[()], state: State) -> tuple[()]:
        """Nothing to roll back."""
        return carry


@struct
class DraftModel:
    """A smaller model of the same vocabulary, with a paged cache of its own; the first layers of the target serve too.

    It samples as the target does, with the row's knobs. Its pool holds every row in full, so it never runs out.
    """

    model: Model
    attention: str = static(default="auto")

    @property
    def vocab_size(self) -> int:
        """Must be the target's; a drafter that says it is checked before anything runs."""
        return self.model.vocab_size

    def init(self, state: State, k: int) -> Cache:
        """An empty cache in the target's block size, with room for a guess past the row's end."""
        rows, width = state.tokens.shape
        size = state.cache.table.block_size
        return Cache.create(
            self.model.cache_spec,
            num_blocks=1 + rows * -(-(width + k) // size),
            block_size=size,
            max_num_seqs=rows,
            max_model_len=width + k,
        )

    def propose(self, carry: Cache, state: State, k: int) -> tuple[Draft, Cache]:
        """Reads what it has not read yet, then k steps of one token a row."""
        rows, width = state.tokens.shape
        tokens = jnp.pad(state.tokens, ((0, 0), (0, k)))
        sampling = None if state.sampling is None else stream(state.sampling, DRAFT)

        def behind(cache):
            return jnp.where(state.running, state.known - cache.table.length, 0)

        def read(cache):  # all but the newest token, whose scores are wanted below
            budget = min(CATCH_UP, rows * width)
            return self._feed(cache, tokens, share(jnp.maximum(behind(cache) - 1, 0), budget), budget)[0]

        # A guess that held in full leaves two tokens unread: its last and the target's own.
        cache = jax.lax.while_loop(lambda cache: jnp.any(behind(cache) > 2), read, carry)

        def guess(drafting, i, most=1):
            cache, tokens = drafting
            count = behind(cache) + jnp.where(state.running, i, 0)
            cache, hidden = self._feed(cache, tokens, count, most * rows, most)
            token, probability = _guess(logits_of(self.model, hidden), sampling, tokens, state.known + i)
            tokens = tokens.at[jnp.arange(rows), state.known + i].set(token)
            return (cache, tokens), (token, probability)

        drafting, first = guess((cache, tokens), 0, most=2)
        (cache, _), rest = jax.lax.scan(guess, drafting, jnp.arange(1, k))
        token, probability = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]).swapaxes(0, 1), first, rest)
        return Draft(token, jnp.full(rows, k, jnp.int32), probability), cache

    def settle(self, carry: Cache, state: State) -> Cache:
        """What it read of rejected tokens goes back at once, and all of a finished row."""
        return Cache(truncate(carry.table, jnp.where(state.running, state.known - 1, 0)), carry.layers)

    def _feed(self, cache, tokens, count, budget, most=None):
        """One step of at most `most` tokens a row; hidden states of the newest token of each row."""
        cache, plan, _ = extend(cache, count, budget=budget, attention=self.attention, max_queries=most)
        fed = jnp.where(plan.live, tokens[plan.row, plan.position], 0)
        hidden, layers = self.model(fed, plan, cache.layers)
        return Cache(cache.table, layers), hidden[plan.last]


def _guess(logits, sampling, tokens, known):
    """A token a row and the distribution that it was drawn from; zeros where no row samples, None if none ever does."""
    if sampling is None:
        return pick(logits, None, tokens, known)[0], None

    def sample():
        drawn_from = scores(penalise(whole(logits), sampling, tokens, known), sampling)
        return draw(drawn_from, sampling, known), jax.nn.softmax(drawn_from, axis=-1)

    def greedy():
        token, _ = pick(logits, sampling, tokens, known)
        return token, jnp.zeros((token.size, size(logits)), jnp.float32)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), sample, greedy)
