"""Eviction frees blocks while a row lives, and attention sees exactly what the row still holds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxattn as pax
from paxattn.decoding import eviction
from paxattn.decoding.eviction import Eviction, holes, sinks_and_window, sliding_window
from paxattn.typing import struct
from tests.toys import DIM, EMBED, HEADS, KV_HEADS, VOCAB, Toy, prompts, tokens_of

TOY, SIZE, NEW, CHUNK, WIDTH = Toy.create(), 4, 24, 16, 56
LENGTHS = (1, 5, 31, 16)
PROMPTS = prompts(LENGTHS)
OPTIONS = {"max_new_tokens": NEW, "max_model_len": WIDTH, "block_size": SIZE}


def small_keys_first(cache):
    """Worth of a page: how long its keys are (the norm says how much attention it may get)."""
    norm = jnp.linalg.norm(cache.layers[0].k, axis=-1).mean(axis=(1, 2))
    return norm[cache.table.pages]


EVICTIONS = {
    "sinks": sinks_and_window(2, 9),
    "norms": Eviction(small_keys_first, keep=4),
}


@functools.partial(jax.jit, static_argnames="evict")
def turn(state, evict):
    return eviction.turn(TOY, state, evict=evict, budget=CHUNK)


@jax.jit
def dense_logits(tokens, seen, last):
    """The toy's scores after token `last` of tokens [56], with no cache: query i sees the positions in seen[i]."""
    n = len(tokens)
    x = TOY.embed[tokens] + jnp.sin(jnp.arange(n)[:, None] * (1.3 ** -jnp.arange(EMBED)))
    for qkv, out in zip(TOY.qkv, TOY.out, strict=True):
        q, k, v = jnp.split(jnp.einsum("te,ehd->thd", x, qkv), [HEADS, HEADS + KV_HEADS], axis=1)
        q = q.reshape(n, KV_HEADS, HEADS // KV_HEADS, DIM)
        score = jnp.einsum("tkgd,jkd->tkgj", q, k) * DIM**-0.5
        weight = jax.nn.softmax(jnp.where(seen[:, None, None], score, -1e30), axis=-1)
        x = x + jnp.tanh(jnp.einsum("tkgj,jkd->tkgd", weight, v).reshape(n, -1) @ out)
    return TOY.logits(x[last][None])[0]


@functools.cache
def watched(name):
    """Every state of a run, a step apart, and which positions each fed token of each row could see."""
    states = [pax.start(TOY, *PROMPTS, **OPTIONS)]
    seen = np.zeros((len(LENGTHS), WIDTH, WIDTH), bool)
    while states[-1].running.any():
        before, after = states[-1], turn(states[-1], EVICTIONS[name])
        gone = np.repeat(np.asarray(holes(before.cache.table)), SIZE, axis=1)
        fed = np.where(after.running, after.cache.table.length, after.known - 1)
        for row in np.flatnonzero(before.running):
            for query in range(int(before.cache.table.length[row]), fed[row]):
                seen[row, query] = ~gone[row] & (np.arange(WIDTH) <= query)
        states.append(after)
    return states, seen


@pytest.mark.parametrize("name", EVICTIONS)
def test_attention_sees_what_a_row_still_holds(name):
    """Any score: tokens are those of dense attention over the positions that were not evicted by then."""
    states, seen = watched(name)
    end, peak = states[-1], 0
    for state in states:
        broken = pax.violations(state.cache.table)
        assert broken.pop("live page has no block") == holes(state.cache.table).sum()
        assert not any(broken.values())
        peak = max(peak, int(holes(state.cache.table).sum()))
    assert peak > 8, "this test evicts"
    assert int(end.stats.blocks_allocated) == int(end.stats.blocks_freed)
    assert end.stats.sharing.saving == 0, "what is evicted is not shared"
    for row, length in enumerate(LENGTHS):
        for at in range(length, length + NEW):
            scores = dense_logits(end.tokens[row], seen[row], at - 1)
            assert int(jnp.argmax(scores)) == int(end.tokens[row, at])


def test_sinks_and_window_hold_what_they_say():
    for state in watched("sinks")[0]:
        for length, gone in zip(np.asarray(state.cache.table.length), holes(state.cache.table), strict=True):
            kept = [p for p in range(-(-length // SIZE)) if p * SIZE < 2 or (p + 1) * SIZE > length - 9 + 1]
            assert kept == [p for p in range(-(-length // SIZE)) if not gone[p]]


def test_keep_bounds_what_a_row_holds():
    for state in watched("norms")[0]:
        assert (jnp.sum(state.cache.table.pages != 0, axis=1) <= 4).all()


@struct
class Near:
    """The toy whose layers attend to the last six tokens."""

    toy: Toy
    vocab_size = VOCAB
    cache_spec = Toy.cache_spec

    def __call__(self, tokens, plan, layers):
        attend, near = pax.attend, functools.partial(pax.attend, sliding_window=6)
        pax.attend = near
        try:
            return self.toy(tokens, plan, layers)
        finally:
            pax.attend = attend

    def logits(self, hidden):
        return self.toy.logits(hidden)


@functools.cache
def near(samples, **options):
    options |= {"max_num_batched_tokens": CHUNK, "temperature": 0.5, "num_return_sequences": samples, **OPTIONS}
    return jax.jit(lambda toy: pax.generate(Near(toy), *PROMPTS, **options))(TOY)


def test_a_window_model_does_not_notice():
    """Three samples of each prompt in a pool that holds the prompts and a window a row; the first is plain sampling."""
    window, rows = 6, 3 * len(LENGTHS)
    room = sum(-(-n // SIZE) for n in LENGTHS) + rows * (1 + -(-window // SIZE))
    whole, less = near(1), near(3, evict=sliding_window(window), num_blocks=1 + room)
    pax.check(less.status)
    assert tokens_of(less)[::3] == tokens_of(whole)
    assert int(less.stats.blocks_peak) <= room < rows * NEW // SIZE
    assert int(less.cache.table.blocks.num_used) == 0
    assert int(less.stats.blocks_allocated) == int(less.stats.blocks_freed)


SERVED = {"max_model_len": WIDTH, "block_size": SIZE, "max_num_batched_tokens": CHUNK}


def serve(model, sampling=(), **options):
    requests = pax.Requests.create(*PROMPTS, max_new_tokens=NEW, **dict(sampling))
    return jax.jit(lambda model: pax.serve(model, requests, **SERVED | options))(model)


@pytest.mark.parametrize("evict", [None, sliding_window(6)], ids=["kept", "evicted"])
def test_serving_in_a_pool_of_the_longest_request(evict):
    """More rows than the pool holds whole: where a window is evicted nobody is preempted; the tokens are the same."""
    room = -(-(max(LENGTHS) + NEW - 1) // SIZE)
    served = serve(Near(TOY), {"temperature": 0.5}.items(), max_num_seqs=4, num_blocks=1 + room, evict=evict)
    pax.check(served.status)
    assert tokens_of(served) == tokens_of(near(1))
    assert (int(served.preemptions.sum()) == 0) == (evict is not None)
    assert int(served.cache.table.blocks.num_used) == 0
    assert int(served.stats.blocks_allocated) == int(served.stats.blocks_freed)


def test_serving_everybody_at_once_is_generating():
    """With the same chunks a score evicts the same pages, whoever runs the loop."""
    options = {"evict": EVICTIONS["norms"], "max_num_batched_tokens": 64}
    generated = jax.jit(lambda toy: pax.generate(toy, *PROMPTS, **OPTIONS | options))(TOY)
    served = serve(TOY, max_num_seqs=len(LENGTHS), **options)
    assert tokens_of(served) == tokens_of(generated)
    assert int(served.stats.blocks_peak) == int(generated.stats.blocks_peak)


def test_a_preempted_row_gives_back_what_it_still_holds():
    """Any score, a pool that is too small for all: everybody ends, and each block is counted once."""
    served = serve(TOY, max_num_seqs=4, num_blocks=15, evict=EVICTIONS["norms"])
    pax.check(served.status)
    assert served.length.tolist() == [NEW] * len(LENGTHS)
    assert int(served.preemptions.sum()) > 0, "this test preempts"
    assert int(served.stats.blocks_peak) <= 14
    assert int(served.stats.blocks_allocated) == int(served.stats.blocks_freed)
    assert not served.cache.table.blocks.refcount.any()


def test_a_shared_block_stays_with_its_other_holders():
    cache = pax.Cache.create(TOY.cache_spec, num_blocks=9, block_size=2, max_num_seqs=2, max_model_len=8)
    table, _, _ = pax.append(cache.table, jnp.array([7, 0]))
    cache = dataclasses.replace(cache, table=pax.fork(table, jnp.array([0, 0])))
    only_first = Eviction(lambda cache: jnp.where(jnp.arange(2)[:, None] == 0, -jnp.inf, 0.0) + jnp.zeros((2, 4)))
    after = only_first(cache).table
    assert after.blocks.refcount.tolist() == [0, 1, 1, 1, 2, 0, 0, 0, 0], "the tail is not full: it stays"
    assert after.pages[1].tolist() == table.pages[0].tolist()


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Eviction(small_keys_first, keep=1), "keep is 1"),
    (lambda: sinks_and_window(-1, 4), "sinks is -1"),
    (lambda: sliding_window(0), "window 0"),
])  # fmt: skip
def test_wrong_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
