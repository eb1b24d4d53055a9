"""Picking the next token: every knob is an array with one value a row, so that a sweep compiles once.

    logits -- repetition penalty -- temperature -- top-k -- top-p -- min-p -- + Gumbel noise -- arg-max
                                    0: greedy       cutoffs: "keep what is >= a threshold"

What no row of the batch uses is skipped at run time. Noise comes from fold_in(row's key, position), so a
row's tokens depend on neither its batch mates nor its place. Order and names are Hugging Face's; ties at a
cutoff are all kept. Top-p: Holtzman et al. 2020. Min-p: Nguyen et al. 2024. Penalty: Keskar et al. 2019.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from paxattn.decoding.vocabulary import Scores, peak, score_of, whole
from paxattn.typing import Array, Bool, Float32, Int32, Key, struct

DRAFT, ACCEPT = 2**31, 2**31 + 1
"""Streams of a row's key beside the one that its tokens are drawn from: numbers that no position reaches."""


@struct
class Sampling:
    """How each row picks. The defaults of `create` are greedy."""

    temperature: Float32[Array, "B"]
    top_k: Int32[Array, "B"]
    top_p: Float32[Array, "B"]
    min_p: Float32[Array, "B"]
    repetition_penalty: Float32[Array, "B"]
    key: Key[Array, "B"]

    @staticmethod
    def create(
        num_rows: int,
        *,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        key: Key[Array, "..."] | None = None,
    ) -> "Sampling":
        """Numbers or [B] arrays for each knob; one key (folded with the row number) or one a row."""
        key = jax.random.key(0) if key is None else key
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (num_rows,)):
            raise ValueError(
                f"key is {key.dtype}{list(key.shape)}; give one of `jax.random.key(seed)`, or {num_rows}, one a row."
            )
        keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_rows))

        def per_row(value, dtype):
            return jnp.broadcast_to(jnp.asarray(value, dtype), (num_rows,))

        return Sampling(
            per_row(temperature, jnp.float32),
            per_row(top_k, jnp.int32),
            per_row(top_p, jnp.float32),
            per_row(min_p, jnp.float32),
            per_row(repetition_penalty, jnp.float32),
            keys,
        )

    @staticmethod
    def asked(num_rows: int, **knobs) -> "Sampling | None":
        """What `create` gives, or None where plain numbers say that every row is greedy.

        That is known when a program is traced, so that it holds nothing else.
        """
        numbers = [knobs.get(name, off) for name, off in (("temperature", 0.0), ("repetition_penalty", 1.0))]
        plain = all(isinstance(number, int | float) for number in numbers) and numbers[0] <= 0 and numbers[1] == 1
        return None if plain else Sampling.create(num_rows, **knobs)

    @property
    def is_greedy(self) -> Bool[Array, ""]:
        """Whether every row takes the model's arg-max as it is."""
        return jnp.all((self.temperature <= 0) & (self.repetition_penalty == 1))


def sample_keys(key: Key[Array, "R"], n: int) -> Key[Array, "B"]:
    """The keys of n samples a prompt, prompt by prompt.

    Sample 0 has the prompt's own key, so asking for more samples changes none; sample j > 0 has fold_in(key, -j).
    `pick` folds positions, which are never negative.
    """
    folded = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(key, -jnp.arange(n))
    return jnp.where(jnp.arange(n) > 0, folded, key[:, None]).ravel()


def pick(
    logits: Scores,
    sampling: Sampling | None,
    tokens: Int32[Array, "R M"],
    known: Int32[Array, "B"],
    line: Int32[Array, "B"] | None = None,
    *,
    greedy: bool = False,
) -> tuple[Int32[Array, "B"], Float32[Array, "B"]]:
    """The next token of each row, and its log-probability under the model (before any knob).

    Args:
      logits: the model's scores; where they are cut over a mesh axis, rows that use a knob gather them.
      sampling: the knobs; None: every row is greedy.
      tokens: prompt and generated tokens so far, for the repetition penalty.
      known: how many of `tokens` count; also the position that the new token takes.
      line: which line of `tokens` is the row's; line b by default.
      greedy: True promises that no row uses a knob (`sampling.is_greedy`): none is looked at.

    Returns:
      Tokens and log-probabilities; NaN logits give a NaN log-probability.
    """
    found = peak(logits)
    token, score = found.token, found.top
    if not greedy and sampling is not None:  # asked in one piece: on a GPU each condition waits for the host
        general = functools.partial(_general, logits, sampling, tokens, known, line)
        token, score = jax.lax.cond(sampling.is_greedy, lambda: (found.token, found.top), general)
    return token, score - found.top - jnp.log(found.total)


def _general(logits, sampling, tokens, known, line):
    every = whole(logits)
    penalised = penalise(every, sampling, tokens, known, line)
    token = jax.lax.cond(
        jnp.any(sampling.temperature > 0),
        lambda: draw(scores(penalised, sampling), sampling, known),
        lambda: peak(penalised).token,
    )
    return token, score_of(every, token)


def logprob(logits: Scores, token: Int32[Array, "B"]) -> Float32[Array, "B"]:
    """Log-probability of one token a row under the model; NaN where a logit of the row is."""
    found = peak(logits)
    return score_of(logits, token) - found.top - jnp.log(found.total)


def penalise(
    logits: Float32[Array, "B V"],
    sampling: Sampling,
    tokens: Int32[Array, "R M"],
    known: Int32[Array, "B"],
    line: Int32[Array, "B"] | None = None,
) -> Float32[Array, "B V"]:
    """The scores after the repetition penalty; arguments as in `pick`."""
    return jax.lax.cond(
        jnp.any(sampling.repetition_penalty != 1),
        lambda: _penalise(logits, sampling.repetition_penalty, tokens if line is None else tokens[line], known),
        lambda: logits,
    )


def scores(penalised: Float32[Array, "B V"], sampling: Sampling) -> Float32[Array, "B V"]:
    """What `draw` draws from: the softmax of a row that samples is its distribution after all knobs.

    Cut tokens have -inf. A greedy row (temperature 0) has its scores as they are: their arg-max is its token.
    """
    greedy = sampling.temperature <= 0
    scaled = penalised / jnp.where(greedy, 1, sampling.temperature)[:, None]
    filters = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    kept = jax.lax.cond(jnp.any(filters), lambda: keep(scaled, sampling), lambda: jnp.ones(scaled.shape, bool))
    return jnp.where(greedy[:, None], penalised, jnp.where(kept, scaled, -jnp.inf))


def draw(scores: Float32[Array, "B V"], sampling: Sampling, known: Int32[Array, "B"]) -> Int32[Array, "B"]:
    """One token a row by the Gumbel-max trick, the noise from fold_in(row's key, position); greedy: the arg-max."""
    noise = jax.vmap(lambda k, at: jax.random.gumbel(jax.random.fold_in(k, at), scores.shape[1:]))
    greedy = (sampling.temperature <= 0)[:, None]
    return peak(jnp.where(greedy, scores, scores + noise(sampling.key, known))).token


def stream(sampling: Sampling, which: int) -> Sampling:
    """The same knobs with other noise: DRAFT for what a drafter draws, ACCEPT for the verdict on it."""
    return dataclasses.replace(sampling, key=jax.vmap(lambda key: jax.random.fold_in(key, which))(sampling.key))


def _penalise(logits, penalty, tokens, known):
    row = jnp.arange(logits.shape[0])[:, None]
    counted = jnp.arange(tokens.shape[1]) < known[:, None]
    seen = jnp.zeros(logits.shape, bool).at[row, jnp.where(counted, tokens, logits.shape[1])].set(True, mode="drop")
    scaled = jnp.where(logits > 0, logits / penalty[:, None], logits * penalty[:, None])
    return jnp.where(seen, scaled, logits)


def keep(logits: Float32[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    """Tokens that survive top-k, then top-p of what is left, then min-p."""
    vocabulary = logits.shape[1]
    ones = jnp.ones_like(logits)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocabulary), vocabulary)
    kept = logits >= _cutoff(logits, ones, k.astype(jnp.float32))[:, None]
    probability = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    nucleus = logits >= _cutoff(logits, probability, sampling.top_p)[:, None]
    kept &= nucleus | (sampling.top_p >= 1)[:, None]
    top = jnp.max(probability, axis=-1, keepdims=True)
    return kept & (probability >= sampling.min_p[:, None] * top)


def _cutoff(value: Float32[Array, "B V"], weight: Float32[Array, "B V"], goal: Float32[Array, "B"]):
    """The largest t with sum(weight where value >= t) >= goal: top-k and top-p without sorting V.

    Bisection on the bits of a float, whose order as integers is that of the floats: 32 halvings are exact.
    """
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    order = jnp.where(bits < 0, ~bits ^ jnp.int32(-(2**31)), bits)

    def halve(_, bounds):
        low, high = bounds  # low always reaches the goal
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounds up, never overflows
        mass = jnp.sum(jnp.where(order >= middle[:, None], weight, 0), axis=-1)
        reached = mass >= goal
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, halve, (jnp.min(order, axis=-1), jnp.max(order, axis=-1)))
    back = jnp.where(low < 0, ~(low ^ jnp.int32(-(2**31))), low)
    return jax.lax.bitcast_convert_type(back, jnp.float32)
