"""Whole loops with their default options as programs for an H100, made without one: Mosaic kernels and all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import models
import paxattn as pax
from models.shapes import CONFIGS
from pallas_kernels import mosaic
from paxattn.decoding import step

ROWS, WIDTH = 3, 40
IDS = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.int32)
LENGTH = jax.ShapeDtypeStruct((ROWS,), jnp.int32)


def serve(model, ids, length):
    requests = pax.Requests.create(ids, length, max_new_tokens=jnp.full(ROWS, 8))
    return pax.serve(model, requests, max_num_seqs=2, max_model_len=WIDTH + 8)


def speculate(model, ids, length, **options):
    return pax.speculate(model, ids, length, drafter=pax.DraftModel(model.first(1)), max_new_tokens=8, **options)


LOOPS = {
    "beams": functools.partial(pax.beam_search, max_new_tokens=8, num_beams=4),
    "speculation": speculate,
    "speculation, sampled, k = 4": functools.partial(speculate, temperature=1.0, num_speculative_tokens=4),
    "serving": serve,
}


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(mosaic, "on_hopper", lambda: True)
    monkeypatch.setattr(step, "questions_wait", lambda: True)
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=None)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        yield
    jax.clear_caches()  # layers traced with kernels that are not here


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize(("loop", "shapes"), [
    ("beams", "135M"),
    ("speculation", "135M"),  # 5 queries of 3 heads a KV head
    ("speculation, sampled, k = 4", "1B"),  # of 4 heads
    ("serving", "8B"),
])  # fmt: skip
def test_a_loop_lowers_for_an_h100(loop, shapes):
    config = dataclasses.replace(CONFIGS[shapes], num_hidden_layers=1, vocab_size=512)
    model = jax.eval_shape(lambda: models.random_llama(config, jax.random.key(0), "bfloat16"))
    text = jax.jit(LOOPS[loop]).trace(model, IDS, LENGTH).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
