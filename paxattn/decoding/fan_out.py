"""One prompt, several rows: the first row of each group feeds the prompt, then the group forks from it.

    prefill   row 0 [ p p p p p ]  ->  [ 3 | 1 ]     one prompt, fed once
              row 1 [ p p p p p ]      [ 3 | 1 ]     fork: every block shared
              row 2 [ p p p p p ]      [ 3 | 1 ]     the first write copies block 1, not full yet

Parallel sampling goes on from here with a token of its own in each row, beam search with the best ones.
"""

import dataclasses

import jax
import jax.numpy as jnp

from paxattn.cache import Cache
from paxattn.decoding.eviction import Eviction, Forgetful, evicted
from paxattn.decoding.model import Model
from paxattn.decoding.step import State, feed, settle, share
from paxattn.pages import fork
from paxattn.typing import Array, Float


def fan_out(
    model: Model, state: State, *, group: int, budget: int, attention: str = "auto", evict: Eviction | None = None
) -> State:
    """Feeds each prompt once for its `group` rows, which then pick their first tokens: `advance` goes on from there.

    Args:
      model: the model.
      state: what `start` made with num_return_sequences = group.
      group: rows a prompt, static.
      budget: tokens a step feeds at most.
      attention: implementation of paged attention, by name.
      evict: gives blocks back while the prompt is fed, as in `generate`.
    """
    state, newest = prefill(model, state, group=group, budget=budget, attention=attention, evict=evict)
    return settle(model, state, newest, picks=state.running)


def prefill(
    model: Model, state: State, *, group: int, budget: int, attention: str = "auto", evict: Eviction | None = None
) -> tuple[State, Float[Array, "B E"]]:
    """Feeds each prompt through the first row of its group and forks that row; also the last token's hidden state."""
    row = jnp.arange(state.known.size)
    leader = row // group * group
    model = model if evict is None else Forgetful(model)

    def pending(state):
        return jnp.where(row == leader, state.pending, 0)

    def body(carry):
        state, newest = carry
        count = share(pending(state), budget)
        state, fed = feed(model, state, count, budget=budget, attention=attention)
        state = state if evict is None else evicted(state, evict)
        return state, jnp.where((count > 0)[:, None], fed, newest)

    hidden = jax.eval_shape(lambda s: feed(model, s, s.known * 0, budget=budget, attention=attention)[1], state)
    carry = state, jnp.zeros(hidden.shape, hidden.dtype)
    state, newest = jax.lax.while_loop(lambda carry: jnp.any(pending(carry[0]) > 0), body, carry)
    cache = Cache(fork(state.cache.table, leader), state.cache.layers)
    return dataclasses.replace(state, cache=cache), newest[leader]
