"""Draws the README's pictures from one real run: `python docs/pictures/draw.py`.

Two prompts, two samples each, a small Llama of random weights: fed once and forked, decoded, then with guesses.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp

import models
import paxattn as pax
from models.shapes import CONFIGS
from paxattn.decoding import speculative


def run() -> tuple[pax.viz.Recording, pax.PageTable]:
    """The frames of the run, and its page table in the middle."""
    llama = models.random_llama(dataclasses.replace(CONFIGS["tiny"], num_hidden_layers=1), jax.random.key(0))
    prompts = jax.random.randint(jax.random.key(1), (2, 22), 0, 8)
    new, knobs = jnp.array([30, 22]), {"temperature": jnp.array([0.0, 0.3])}
    state = pax.start(llama, prompts, jnp.array([22, 13]), max_new_tokens=new, max_model_len=52, block_size=4,
                      num_return_sequences=2, **knobs)  # fmt: skip
    film, drafter = pax.viz.Recording(), pax.NGram(1)
    film.see(state)
    state = film.see(jax.jit(functools.partial(pax.fan_out, llama, group=2, budget=48))(state))
    decode = jax.jit(functools.partial(pax.advance, llama, budget=4, steps=1))
    for _ in range(6):
        state = film.see(decode(state))
    middle = state.cache.table
    state = speculative.begin(drafter, state, k=4)
    guess = jax.jit(functools.partial(speculative.advance, llama, drafter, k=4, budget=20, steps=1))
    while bool(state.running.any()):
        state = film.see(guess(state=state))
    return film, middle


if __name__ == "__main__":
    film, middle = run()
    here = Path(__file__).parent
    pictures = {"page_map": pax.viz.page_map(middle), "timeline": pax.viz.timeline(film), "flow": pax.viz.flow(film)}
    for name, picture in pictures.items():
        picture.save(here / f"{name}.svg")
        print(picture, "\n")
