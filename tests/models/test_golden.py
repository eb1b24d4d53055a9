"""Hugging Face transformers is the referee: logits, greedy tokens and text of real checkpoints."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import paxattn as pax
from tests.paths import GOLDEN

TINY = ("tiny_llama", "tiny_llama3_rope_tied")


@functools.cache
def tiny(name):
    return models.load(GOLDEN / name), json.loads((GOLDEN / name / "expected.json").read_text())


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_hugging_faces(name):
    lm, expected = tiny(name)
    wanted = np.load(GOLDEN / name / "logits.npz")
    for i, prompt in enumerate(expected["prompts"]):
        for block_size in (1, 16):
            got = lm.logits(prompt, block_size=block_size)
            np.testing.assert_allclose(got, wanted[f"logits_{i}"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_greedy_tokens_equal_hugging_faces(name, block_size):
    lm, expected = tiny(name)
    run = lm.generate(expected["prompts"], max_new_tokens=40, block_size=block_size, eos_token_id=())
    assert [output.token_ids for output in run.outputs] == expected["greedy"]


def test_biases_and_sliding_window_reach_the_result():
    """Against a dense forward in float64, written once more by hand, for switches no golden file has."""
    config = models.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, max_position_embeddings=64, attention_bias=True,
        mlp_bias=True, sliding_window=5,
    )  # fmt: skip
    key = iter(jax.random.split(jax.random.key(0), 100))
    model = models.Llama(config, lambda name, shape: jax.random.normal(next(key), shape) * 0.4)
    lm = models.LM(model, None, "biased")
    ids = list(range(3, 20))
    got = lm.logits(ids, block_size=3)

    p = {name: np.asarray(value, np.float64) for name, value in model.parameters().items()}
    n, (heads, kv_heads, dim) = len(ids), (4, 2, 8)
    norm = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w  # noqa: E731
    angle = np.arange(n)[:, None, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim)
    turn = np.exp(1j * angle)

    def rope(x):
        z = (x[..., : dim // 2] + 1j * x[..., dim // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    at = np.arange(n)
    seen = (at[None] <= at[:, None]) & (at[None] > at[:, None] - 5)
    x = p["embed"][ids]
    for i in range(2):
        w = {k.split(".")[2]: v for k, v in p.items() if k.startswith(f"layers.{i}.")}
        qkv = np.einsum("te,ekgd->tkgd", norm(x, w["attention_norm"]), w["qkv"]) + w["qkv_bias"]
        q, k, v = rope(qkv[:, :, :-2].reshape(n, heads, dim)), rope(qkv[:, :, -2]), qkv[:, :, -1]
        k, v = np.repeat(k, heads // kv_heads, 1), np.repeat(v, heads // kv_heads, 1)
        score = np.where(seen, np.einsum("thd,jhd->htj", q, k) / dim**0.5, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        x = x + np.einsum("htj,jhd->thd", weight, v).reshape(n, -1) @ w["out"] + w["out_bias"]
        gate_up = np.einsum("te,ecf->tcf", norm(x, w["mlp_norm"]), w["gate_up"]) + w["gate_up_bias"]
        x = x + (gate_up[:, 0] / (1 + np.exp(-gate_up[:, 0])) * gate_up[:, 1]) @ w["down"] + w["down_bias"]
    np.testing.assert_allclose(got, norm(x, p["norm"]) @ p["head"], atol=2e-4, rtol=1e-4)


@functools.cache
def smollm2():
    return models.load("smollm2-135m"), json.loads((GOLDEN / "smollm2_expected.json").read_text())["rows"]


def agrees(got, row):
    """Equal up to the first place where Hugging Face itself was within 0.02 of another token."""
    for i, (token, wanted, margin) in enumerate(zip(got, row["greedy"], row["margin"], strict=False)):
        if token != wanted:
            assert margin <= 0.02, f"token {i} of {row['text']!r} is {token}, should be {wanted} (margin {margin})"
            return
    assert len(got) == len(row["greedy"])


def test_real_prompts_become_hugging_faces_ids():
    lm, rows = smollm2()
    for row in rows:
        assert lm.encode(row["text"], chat=row["chat"]) == row["input_ids"]


@pytest.mark.parametrize(("block_size", "max_num_seqs"), [(1, 64), (16, 64), (64, 64), (16, 1)])
def test_smollm2_in_one_batch_and_one_by_one(block_size, max_num_seqs):
    """With one row a request begins when the last has ended."""
    lm, rows = smollm2()
    prompts = [row["input_ids"] for row in rows]
    outputs = lm.generate(prompts, max_new_tokens=48, block_size=block_size, max_num_seqs=max_num_seqs).outputs
    for row, output in zip(rows, outputs, strict=True):
        agrees(output.token_ids, row)


def test_another_call_of_the_same_bucket_compiles_nothing():
    """But that greedy batches have a program without sampling: a second one, for all values of the knobs."""
    from models import lm as module

    lm, _ = tiny("tiny_llama")
    first, others = [[82, 154, 252], [87]], [[9, 9, 4, 3, 2], [5, 6, 7, 8, 9, 10, 11]]

    def compiled(prompts, new, **knobs):
        lm.generate(prompts, max_new_tokens=new, max_num_seqs=2, **knobs)
        return module._advance._cache_size()

    greedy = compiled(first, 5)
    assert compiled(others, 9) == greedy
    assert compiled(others, 9, temperature=0.7, top_p=0.9, top_k=5, seed=3) == greedy + 1
    assert compiled(first, 5, temperature=1.1, min_p=0.1, repetition_penalty=1.2, seed=4) == greedy + 1


def test_a_step_of_the_real_model_moves_no_pool_and_is_planned_once():
    """Pools aliased; temporaries far below the pools; what all layers share is not worked out in each."""
    lm, _ = smollm2()
    ids = jnp.ones((2, 16), jnp.int32)
    state = pax.start(lm.model, ids, np.array([16, 16]), max_new_tokens=16, num_blocks=1500)
    pools = sum(x.nbytes for x in jax.tree.leaves(state.cache.layers))
    step = jax.jit(pax.advance, static_argnames="budget", donate_argnames="state")
    compiled = step.lower(lm.model, state, budget=32).compile()
    if jax.default_backend() == "cpu":  # the compiler that the barriers are for
        assert compiled.as_text().count(" cosine(") == 2  # of the body with prompts, and of the one without
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pools
    assert memory.temp_size_in_bytes < pools / 10
