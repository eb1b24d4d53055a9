"""bfloat16 on a GPU: what must not show in the tokens may turn a close choice, and nothing else.

    tokens [ a b c d . . ]    as told alone
           [ a b c e . . ]    in another way: the first that differs had a rival within 0.1

Two kernels, two batches, two chunkings add up in other orders. Where the best two scores are further apart than that,
the tokens are the same, with kernels of our own or without, together or alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import paxattn as pax
from models.shapes import CONFIGS
from pallas_kernels import mosaic

CLOSE = 0.1
PROMPTS, WIDTH, NEW = 12, 200, 64

pytestmark = pytest.mark.skipif(not mosaic.on_hopper(), reason="needs a Hopper GPU")


@functools.cache
def model():
    """Random weights, scores spread as far as a trained model's: their own margins would all be close."""
    config = dataclasses.replace(CONFIGS["135M"], num_hidden_layers=3)
    model = jax.jit(lambda key: models.random_llama(config, key, "bfloat16"))(jax.random.key(0))
    model.norm[...] = 20 * model.norm[...]
    return model


def prompts():
    rng = np.random.default_rng(0)
    return rng.integers(0, model().vocab_size, (PROMPTS, WIDTH)), rng.integers(1, WIDTH + 1, PROMPTS)


@jax.jit
def margins(model, tokens, count):
    """How far the best score after each token is from the next best; float32 [M]."""
    pages = -(-tokens.size // 16)
    cache = pax.Cache.create(model.cache_spec, num_blocks=1 + pages, block_size=16, max_num_seqs=1,
                             max_model_len=tokens.size)  # fmt: skip
    cache, plan, _ = pax.extend(cache, count[None], budget=tokens.size)
    hidden, _ = model(jnp.where(plan.live, tokens, 0), plan, cache.layers)
    best, _ = jax.lax.top_k(model.logits(hidden).astype(jnp.float32), 2)
    return best[:, 0] - best[:, 1]


@functools.cache
def alone():
    """Each prompt in a batch of its own, and the margin of each of its choices."""
    run = jax.jit(lambda model, ids, length: pax.generate(model, ids, length, max_new_tokens=NEW))
    answers, apart = [], []
    for ids, length in zip(*prompts(), strict=True):
        answers.append(np.asarray(run(model(), ids[None], length[None]).token_ids[0]))
        text = np.concatenate([ids[:length], answers[-1], np.zeros(WIDTH - length, int)])
        apart.append(np.asarray(margins(model(), text, jnp.int32(length + NEW)))[length - 1 :][:NEW])
    return np.array(answers), np.array(apart)


def served(**options):
    ids, length = prompts()
    requests = pax.Requests.create(ids, length, max_new_tokens=NEW)
    run = jax.jit(functools.partial(pax.serve, max_num_seqs=5, max_model_len=WIDTH + NEW, **options))
    return run(model(), requests)


def test_choices_are_mostly_not_close():
    assert np.mean(alone()[1] > CLOSE) > 0.3


@pytest.mark.parametrize("way", ["xla", "together", "served", "speculated"])
def test_tokens_differ_where_the_choice_was_close_alone(way):
    ids, length = prompts()
    if way == "served":
        result = served(num_blocks=1 + 30, max_num_batched_tokens=48)
        assert result.preemptions.any()
    else:
        run = functools.partial(pax.generate, max_num_batched_tokens=500)
        if way == "speculated":
            run = lambda *given, **how: pax.speculate(*given, drafter=pax.NGram(1), **how)[0]  # noqa: E731
        how = {"max_new_tokens": NEW, "block_size": 8} | ({"attention": "xla"} if way == "xla" else {})
        result = jax.jit(functools.partial(run, **how))(model(), ids, jnp.asarray(length))
    answers, apart = alone()
    differs = np.asarray(result.token_ids)[:, :NEW] != answers
    for row in np.flatnonzero(differs.any(axis=1)):
        assert apart[row, np.argmax(differs[row])] <= CLOSE, row
