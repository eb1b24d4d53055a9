"""The laws of the whole flow, on a toy: what must be unobservable in the tokens, and what a run may cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paxattn as pax
from paxattn.decoding.step import share
from tests.toys import VOCAB, Toy, prompts, tokens_of

TOY = Toy.create()
LENGTHS, NEW = (1, 5, 16, 17, 40), 12


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "max_model_len", "block_size", "num_blocks",
                                             "max_num_batched_tokens", "attention"))  # fmt: skip
def generate(ids, length, max_new_tokens=NEW, **options):
    return pax.generate(TOY, ids, length, max_new_tokens=max_new_tokens, **{"max_model_len": 64, **options})


@functools.cache
def baseline():
    return tokens_of(generate(*prompts(LENGTHS), attention="reference"))


def assert_clean(result):
    """All blocks are back and no invariant is broken."""
    assert int(result.cache.table.blocks.num_used) == 0
    assert not any(pax.violations(result.cache.table).values())
    assert int(result.stats.blocks_allocated) == int(result.stats.blocks_freed)


def test_the_baseline_is_the_definition():
    """Greedy decoding with no cache at all: feed everything from scratch for each token."""
    ids, _ = prompts(LENGTHS)
    for row, (length, got) in enumerate(zip(LENGTHS, baseline(), strict=True)):
        sequence = ids[row, :length].tolist()
        for _ in range(3):
            cache = pax.Cache.create(TOY.cache_spec, num_blocks=9, block_size=8, max_num_seqs=1, max_model_len=64)
            cache, plan, _ = pax.extend(cache, jnp.array([len(sequence)]), budget=64, attention="reference")
            fed = jnp.zeros(64, jnp.int32).at[: len(sequence)].set(jnp.array(sequence))
            hidden, _ = TOY(fed, plan, cache.layers)
            sequence.append(int(jnp.argmax(TOY.logits(hidden[plan.last])[0])))
        assert sequence[length:] == got[:3]


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 64, 256])
@pytest.mark.parametrize("attention", ["reference", "xla"])
def test_block_size_is_unobservable(block_size, attention):
    result = generate(*prompts(LENGTHS), block_size=block_size, attention=attention)
    assert tokens_of(result) == baseline()
    assert_clean(result)


@pytest.mark.parametrize("budget", [1, 2, 5, 7, 19, 64, 512])
def test_chunking_of_prefill_is_unobservable(budget):
    result = generate(*prompts(LENGTHS), max_num_batched_tokens=budget, block_size=3)
    assert tokens_of(result) == baseline()
    assert int(result.stats.tokens_fed) == sum(LENGTHS) + len(LENGTHS) * (NEW - 1)


@pytest.mark.parametrize(("limit", "steps"), [(8, 4), (11, 3), (16, 2), (31, 2), (32, 1), (512, 1)])
def test_prompts_take_no_more_steps_than_their_tokens_need(limit, steps):
    """Rows whose prompt ends early do not crowd out the prompts of the others."""
    ids = jnp.ones((4, 8), jnp.int32)
    stats = generate(ids, jnp.full(4, 8), max_num_batched_tokens=limit).stats
    assert int(stats.prefill_steps) == steps
    assert int(stats.steps) == steps + NEW - 1


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 20))
def test_a_share_wastes_no_room(pending, budget):
    count = np.asarray(share(jnp.array(pending), budget))
    assert count.sum() == min(sum(pending), budget)
    assert (count >= 0).all()
    assert (count <= pending).all()
    if any(c for c, p in zip(count, pending, strict=True) if p == 1):
        assert all(c == p for c, p in zip(count, pending, strict=True) if p > 1)


def test_batch_mates_and_row_order_are_unobservable():
    ids, length = prompts(LENGTHS)
    order = jnp.array([3, 0, 4, 2, 1])
    shuffled = tokens_of(generate(ids[order], length[order]))
    assert shuffled == [baseline()[i] for i in order]
    for row in range(len(LENGTHS)):
        assert tokens_of(generate(ids[row : row + 1], length[row : row + 1])) == [baseline()[row]]


def test_what_lies_past_a_prompt_is_unobservable():
    ids, length = prompts(LENGTHS)
    other = jnp.where(jnp.arange(ids.shape[1]) < length[:, None], ids, 0)
    assert tokens_of(generate(other, length)) == baseline()


def started(**options):
    return pax.start(TOY, *prompts(LENGTHS), max_new_tokens=NEW, max_model_len=64, block_size=3, **options)


run = jax.jit(lambda state, steps: pax.advance(TOY, state, budget=19, steps=steps))


def tokens_of_state(state):
    return tokens_of(pax.finish(state, width=NEW))


def test_garbage_in_unowned_slots_is_unobservable():
    state = started()
    poisoned = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.ndim == 4 else x, state)
    assert tokens_of_state(run(poisoned, 999)) == baseline()


@pytest.mark.parametrize("seed", range(3))
def test_block_names_are_unobservable(seed):
    """Blocks held by somebody else push the rows onto other blocks; the tokens do not notice."""
    state = started(num_blocks=300)
    taken = jnp.asarray(np.random.default_rng(seed).random(300) < 0.5).at[0].set(False)
    table = state.cache.table
    table = pax.PageTable(table.pages, table.length, pax.Blocks(taken.astype(jnp.int32)), 3)
    moved = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state))
    moved = pax.State(**{**vars(moved), "cache": pax.Cache(table, state.cache.layers)})
    result = run(moved, 999)
    assert tokens_of_state(result) == baseline()
    assert (result.cache.table.blocks.refcount == taken).all(), "blocks of others are as they were"


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_running_a_few_steps_at_a_time_is_unobservable(steps):
    state = started()
    for _ in range(200):
        state = run(state, steps)
        assert not any(pax.violations(state.cache.table).values())
        if not state.running.any():
            break
    assert tokens_of_state(state) == baseline()


def test_a_step_for_fewer_rows_than_there_are_picks_the_same():
    state = pax.stop(run(started(), 8), jnp.arange(len(LENGTHS)) == 0)
    count = jnp.minimum(state.pending, 1)
    after = [
        pax.step(TOY, state, budget=budget, count=count, max_queries=1) for budget in (count.size, int(count.sum()))
    ]
    assert (after[0].known > state.known).sum() == count.sum() == len(LENGTHS) - 1
    assert tokens_of_state(after[0]) == tokens_of_state(after[1])


@pytest.mark.parametrize("num_blocks", range(15, 60, 4))
def test_running_out_stops_cleanly(num_blocks):
    """Tokens before the stop are those of the unbounded run, finished rows are whole, and nothing leaks."""
    limits = jnp.array([3, NEW, 2, NEW, 5], jnp.int32)
    want = [row[:n] for row, n in zip(baseline(), limits.tolist(), strict=True)]
    ids, length = prompts(LENGTHS)
    state = pax.start(TOY, ids, length, max_new_tokens=limits, max_model_len=64, block_size=3, num_blocks=num_blocks)
    result = pax.finish(run(state, 999), width=NEW)
    assert_clean(result)
    reasons = [pax.Finish(int(f)) for f in result.finish_reason]
    for reason, got, full in zip(reasons, tokens_of(result), want, strict=True):
        assert got == full[: len(got)]
        assert (reason is pax.Finish.LENGTH) == (len(got) == len(full))
    stopped = pax.Finish.OUT_OF_BLOCKS in reasons
    assert stopped == (pax.Status(int(result.status)) is pax.Status.OUT_OF_BLOCKS)


def test_running_out_happens_and_is_never_spurious():
    ids, length = prompts((7, 7))
    need = 2 * -(-(7 + 5) // 3)
    for blocks, reason in (need, pax.Finish.LENGTH), (need - 1, pax.Finish.OUT_OF_BLOCKS):
        # The last token is picked and never fed: a row of 7 + 6 tokens holds 12.
        result = generate(ids, length, max_new_tokens=6, block_size=3, num_blocks=blocks + 1)
        assert pax.Finish(int(result.finish_reason[0])) is reason
        assert int(result.stats.blocks_peak) <= blocks


def test_rows_end_on_eos_and_free_at_once():
    row, at = 2, 3
    eos = baseline()[row][at]
    result = generate(*prompts(LENGTHS), eos_token_id=jnp.array([eos, VOCAB - 1]))
    for got, full, reason in zip(tokens_of(result), baseline(), result.finish_reason, strict=True):
        ends = [i for i, t in enumerate(full) if t in (eos, VOCAB - 1)]
        assert got == full[: ends[0] + 1 if ends else NEW]
        assert pax.Finish(int(reason)) is (pax.Finish.STOP if ends else pax.Finish.LENGTH)
    state = run(started(eos_token_id=eos), 30)
    ended = state.finish != pax.Finish.RUNNING
    assert not (state.cache.table.length * ended).any()


def test_max_new_tokens_is_per_row():
    limits = [1, NEW, 2, 7, 3]
    result = jax.jit(lambda n: pax.generate(TOY, *prompts(LENGTHS), max_new_tokens=n, max_model_len=64))(
        jnp.array(limits)
    )
    assert tokens_of(result) == [row[:n] for row, n in zip(baseline(), limits, strict=True)]


def test_nan_logits_end_that_row_only():
    """Token 5 is never picked (its score is far below the others) and is fed by one prompt only."""
    bad = 5
    ids, length = prompts(LENGTHS)
    ids = jnp.where(ids == bad, bad + 1, ids)
    head = TOY.head.at[:, bad].set(0)
    unpicked = Toy(TOY.embed, head, TOY.qkv, TOY.out)
    sick = Toy(TOY.embed.at[bad, 0].set(jnp.nan), head, TOY.qkv, TOY.out)

    def run(toy, ids):
        logits = toy.logits
        object.__setattr__(toy, "logits", lambda hidden: logits(hidden).at[:, bad].add(-1e9))
        return pax.generate(toy, ids, length, max_new_tokens=NEW, max_model_len=64)

    healthy, result = run(unpicked, ids), run(sick, ids.at[1, 2].set(bad))
    reasons = [pax.Finish(int(f)) for f in result.finish_reason]
    assert reasons[1] is pax.Finish.NOT_FINITE
    assert int(result.length[1]) == 0
    others = [0, 2, 3, 4]
    assert [tokens_of(result)[i] for i in others] == [tokens_of(healthy)[i] for i in others]
    assert_clean(result)


def test_logprobs_are_the_models():
    result = generate(*prompts((5, 9)), max_new_tokens=4)
    assert result.logprobs.shape == (2, 4)
    assert (result.logprobs < 0).all()
    cache = pax.Cache.create(TOY.cache_spec, num_blocks=9, block_size=8, max_num_seqs=1, max_model_len=64)
    cache, plan, _ = pax.extend(cache, jnp.array([5]), budget=5)
    hidden, _ = TOY(prompts((5, 9))[0][0, :5], plan, cache.layers)
    want = jax.nn.log_softmax(TOY.logits(hidden[plan.last])[0])[int(result.token_ids[0, 0])]
    np.testing.assert_allclose(result.logprobs[0, 0], want, rtol=1e-5)


def test_other_values_compile_nothing():
    traces = 0

    @jax.jit
    def sweep(ids, length, n, temperature, top_p, key):
        nonlocal traces
        traces += 1
        return pax.generate(TOY, ids, length, max_new_tokens=n, max_model_len=64, temperature=temperature,
                            top_p=top_p, key=key)  # fmt: skip

    for seed in range(4):
        ids, _ = prompts(LENGTHS, seed=seed)
        sweep(ids, jnp.array(LENGTHS) - seed % 2 * 0 + 0, jnp.full(5, 3 + seed), seed * 0.5, 1 - seed * 0.1,
              jax.random.key(seed))  # fmt: skip
    assert traces == 1
    assert sweep._cache_size() == 1


def test_a_state_keeps_its_types():
    """What goes into a step comes out of it, weak types included: calling `advance` again compiles nothing."""
    state = pax.start(TOY, *prompts(LENGTHS), max_new_tokens=NEW, max_model_len=64)
    after = jax.eval_shape(lambda s: pax.advance(TOY, s, budget=19), state)

    def types(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)

    assert types(jax.tree.map(lambda x: x.aval, state)) == types(after)


def big_state():
    return pax.start(TOY, *prompts(LENGTHS), max_new_tokens=NEW, max_model_len=64, num_blocks=20_000)


def test_a_run_moves_no_pool():
    """The pools are updated in place: donated buffers are aliased, temporaries are far below one pool."""
    state = big_state()
    pool = state.cache.layers[0].k.nbytes
    compiled = jax.jit(lambda s: pax.advance(TOY, s, budget=19), donate_argnums=0).lower(state).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * pool
    assert memory.temp_size_in_bytes < pool / 4


def test_no_host_transfer_inside_the_loop():
    state = big_state()
    compiled = jax.jit(lambda s: pax.advance(TOY, s, budget=19)).lower(state).compile()
    with jax.transfer_guard("disallow"):
        compiled(state).tokens.block_until_ready()
    text = compiled.as_text()
    assert not any(word in text for word in ("infeed", "outfeed", "callback", " send(", " recv("))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_length": jnp.array([0])}, "prompt_length is 0.*cannot be empty"),
        ({"prompt_length": jnp.array([4])}, "prompt_length is 4.*has 3 columns"),
        ({"prompt_ids": jnp.zeros((0, 3), jnp.int32)}, "at least one prompt"),
        ({"prompt_ids": jnp.array([[1, VOCAB, 2]])}, r"a token id is 37.*\[0, 37\)"),
        ({"prompt_ids": jnp.array([[1, -1, 2]])}, "a token id is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_model_len": 8}, r"prompt \+ max_new_tokens is 13; a row holds max_model_len = 8"),
        ({"num_blocks": 3, "block_size": 1}, "blocks that the prompt takes is 3; the pool has 2"),
        ({"num_blocks": 1}, "num_blocks is 1"),
        ({"block_size": 0}, "block_size is 0"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"num_beam": 3}, "unknown options num_beam"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
        ({"attention": "flash"}, "'flash' is unknown"),
    ],
)
def test_bad_input_is_refused_before_anything_is_allocated(change, message):
    good = {"prompt_ids": jnp.array([[1, 2, 3]]), "prompt_length": jnp.array([3]), "max_new_tokens": 10}
    arguments = {**good, **change}
    with pytest.raises(ValueError, match=message):
        pax.generate(TOY, arguments.pop("prompt_ids"), arguments.pop("prompt_length"), **arguments)


def test_traced_limits_need_a_row_size():
    with pytest.raises(ValueError, match="pass max_model_len"):
        jax.jit(lambda n: pax.generate(TOY, *prompts((3,)), max_new_tokens=n))(4)


def test_a_packed_model_is_the_model_and_shares_its_program():
    packed, again = pax.pack(TOY), pax.pack(Toy.create())
    assert packed.structure == again.structure
    assert jax.tree.structure(packed) == jax.tree.structure(again)
    assert (packed.vocab_size, packed.cache_spec) == (TOY.vocab_size, TOY.cache_spec)
    run = jax.jit(lambda model, *p: pax.generate(model, *p, max_new_tokens=NEW, max_model_len=64).token_ids)
    for model in (packed, again):
        np.testing.assert_array_equal(run(model, *prompts(LENGTHS)), generate(*prompts(LENGTHS)).token_ids)
    assert run._cache_size() == 1
    assert packed.structure != pax.pack((TOY, TOY)).structure
