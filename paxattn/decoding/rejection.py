"""Which token the target takes where a drafter has guessed one.

    guess x drawn from q      u < p(x) / q(x): x      else drawn from the positive part of p - q      together: p
    guess x certain           drawn from p as `pick` draws it, and compared with x: accepted with probability p(x)
    greedy                    the arg-max, compared with x

p is the row's distribution after all knobs. In the last two cases the tokens are those of plain decoding, one by one.
Noise: `pick`'s fold_in(key, position) draws tokens; the stream ACCEPT of the key, folded with the position, gives
u; a drafter draws from the stream DRAFT. What a rejected guess used is used again by the next one at that position:
nothing of it has reached the text. Leviathan et al. 2023, theorem 1; Chen et al. 2023.
"""

import jax
import jax.numpy as jnp

from paxattn.decoding.sampling import ACCEPT, Sampling, draw, penalise, pick, scores, stream
from paxattn.decoding.vocabulary import Scores, size, whole
from paxattn.typing import Array, Bool, Float32, Int32


def take(
    logits: Scores,
    sampling: Sampling | None,
    tokens: Int32[Array, "B M"],
    at: Int32[Array, "B k+1"],
    guess: Int32[Array, "B k+1"],
    real: Bool[Array, "B k+1"],
    probability: Float32[Array, "B k V"] | None,
) -> Int32[Array, "B k+1"]:
    """The token that the target takes at each place, given the guess before it; equal to the guess where it accepts.

    Args:
      logits: the target's scores, n = B * (k + 1).
      sampling: the knobs of the rows; None: every row is greedy.
      tokens: the known tokens and the guess behind them: a repetition penalty sees both.
      at: position of each place's token.
      guess: the drafter's tokens.
      real: places that have one.
      probability: that it was drawn from; None for a certain guess.
    """
    rows, places = guess.shape
    line = jnp.repeat(jnp.arange(rows), places)
    each = jax.tree.map(lambda knob: knob[line], sampling)
    known, guess, real = at.ravel(), guess.ravel(), real.ravel()

    def plain():
        return pick(logits, each, tokens, known, line)[0]

    # Drawing from p and comparing accepts with probability p(guess) = min(1, p / q).
    if probability is None or each is None:
        return plain().reshape(rows, places)
    check_vocabulary(probability.shape[-1], size(logits))

    def reject():
        drawn_from = scores(penalise(whole(logits), each, tokens, known, line), each)
        p = jax.nn.softmax(drawn_from, axis=-1)
        q = jnp.pad(probability, ((0, 0), (0, 1), (0, 0))).reshape(p.shape)
        u = jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at)))(stream(each, ACCEPT).key, known)
        tried = real & (each.temperature > 0)
        accepted = tried & (u * _chosen(q, guess) < _chosen(p, guess))
        rest = jnp.maximum(p - q, 0)
        left = rest.sum(axis=-1, keepdims=True) > 0  # rounding can leave nothing of p = q: then p itself
        drawn = draw(jnp.where(tried[:, None] & left, jnp.log(rest), drawn_from), each, known)
        return jnp.where(accepted, guess, drawn)

    return jax.lax.cond(jnp.any(each.temperature > 0), reject, plain).reshape(rows, places)


def check_vocabulary(drafter: int, model: int) -> None:
    """Refuses a drafter whose ids are not the model's."""
    if drafter != model:
        raise ValueError(f"the drafter's vocabulary has {drafter} tokens, the model's {model}; they must be the same.")


def _chosen(probability, token):
    return jnp.take_along_axis(probability, token[:, None], axis=-1)[:, 0]
