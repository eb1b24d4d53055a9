"""What happens at the edges: values that a traced argument may take, counts that cannot be fed, dtypes, counters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxattn as pax
from paxattn.decoding import beam, speculative
from paxattn.typing import struct
from tests.toys import VOCAB, Chain, Toy, prompts, tokens_of

CHAIN, TOY = Chain(jnp.int32(7)), Toy.create()
GREATEST = 2**31 - 1


def answers(ids, length, new):
    return [CHAIN.answer(ids[row, :n], k) for row, (n, k) in enumerate(zip(length.tolist(), new, strict=True))]


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("most", [9, GREATEST, GREATEST - 4])
def test_a_traced_limit_ends_where_the_row_does(block_size, most):
    """Nobody can refuse it; the row has its true tokens up to max_model_len, whatever the last block could hold."""
    ids, length = prompts((4, 3))
    run = jax.jit(
        lambda new: pax.generate(CHAIN, ids, length, max_new_tokens=new, max_model_len=10, block_size=block_size)
    )
    result = run(jnp.array([most, 6]))
    assert tokens_of(result) == answers(ids, length, (6, 6))
    assert result.finish_reason.tolist() == [pax.Finish.LENGTH] * 2
    assert int(result.status) == pax.Status.OK


@pytest.mark.parametrize("answers_to", [pax.generate, pax.serve])
def test_more_tokens_than_an_integer_holds_are_refused(answers_to):
    ids, length = prompts((4, 3))
    new = np.array([GREATEST, 1], np.int32)
    if answers_to is pax.serve:
        run = functools.partial(pax.serve, CHAIN, pax.Requests.create(ids, length, max_new_tokens=new), max_num_seqs=2)
    else:
        run = functools.partial(pax.generate, CHAIN, ids, length, max_new_tokens=new)
    with pytest.raises(ValueError, match=str(GREATEST + 4)):
        run(max_model_len=10)


@pytest.mark.parametrize("program", [
    pax.generate,
    functools.partial(pax.generate, num_return_sequences=2, temperature=1.0),
    functools.partial(pax.beam_search, num_beams=2),
    lambda *given, **how: pax.speculate(*given, drafter=pax.NGram(1), **how)[0],
], ids=["generate", "samples", "beams", "speculation"])  # fmt: skip
def test_a_prompt_without_a_token_is_answered_by_none(program):
    """Traced, nobody can refuse it; the others do not notice."""
    ids, length = prompts((5, 3))
    run = jax.jit(functools.partial(program, max_new_tokens=4, max_model_len=16))
    both, alone = (run(CHAIN, ids, jnp.array([length[0], n])) for n in (0, 3))
    rows = both.token_ids.shape[0] // 2
    assert both.finish_reason.reshape(2, -1)[1].tolist() == [pax.Finish.INVALID] * (both.finish_reason.size // 2)
    assert not both.length.reshape(2, -1)[1].any()
    assert both.token_ids[:rows].tolist() == alone.token_ids[:rows].tolist()
    assert not any(pax.violations(both.cache.table).values())
    assert not both.cache.table.blocks.refcount.any()


@pytest.mark.parametrize("count", [GREATEST, GREATEST - 4])
def test_counts_that_overflow_are_refused_bit_for_bit(count):
    table = pax.PageTable.create(num_blocks=9, block_size=4, max_num_seqs=2, max_model_len=16)
    table, _, _ = pax.append(table, jnp.array([5, 0]))
    after, _, status = pax.append(table, jnp.array([count, 0]))
    assert int(status) == pax.Status.ROW_FULL
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), after, table))
    cache = pax.Cache(
        table, pax.Cache.create(CHAIN.cache_spec, num_blocks=9, block_size=4, max_num_seqs=2, max_model_len=16).layers
    )
    same, plan, status = pax.extend(cache, jnp.array([count, count]), budget=8)
    assert int(status) == pax.Status.OVER_BUDGET
    assert int(plan.query_start[-1]) == 0
    assert (same.table.length == table.length).all()


def test_a_step_that_cannot_be_fed_says_why():
    """Wrong counts end all rows; a full row ends alone, and the others go on."""
    ids, length = prompts((5, 4))
    state = pax.start(CHAIN, ids, length, max_new_tokens=4, block_size=4)
    wrong = pax.step(CHAIN, state, budget=4, count=jnp.array([5, 4]))
    assert int(wrong.status) == pax.Status.OVER_BUDGET
    assert [pax.Finish(int(f)).label for f in wrong.finish] == ["invalid"] * 2

    ids, length = prompts((9, 1))
    state = pax.start(CHAIN, ids, length, max_new_tokens=4, block_size=4)
    state = dataclasses.replace(state, limit=jnp.array([99, 12]))  # a row holds 16
    state = pax.advance(CHAIN, state, budget=10)
    assert int(state.status) == pax.Status.ROW_FULL
    assert [pax.Finish(int(f)).label for f in state.finish] == ["length"] * 2
    assert state.known.tolist() == [17, 12]
    assert state.tokens[1, 1:12].tolist() == CHAIN.answer(ids[1, :1], 11)
    assert int(state.cache.table.blocks.num_used) == 0


def test_as_many_steps_as_an_integer_holds_are_no_fewer():
    state = pax.step(CHAIN, pax.start(CHAIN, *prompts((3, 2)), max_new_tokens=5), budget=5)
    assert not pax.advance(CHAIN, state, budget=5, steps=GREATEST).running.any()


@struct
class Half:
    """A model whose scores are not float32."""

    model: Toy

    vocab_size, cache_spec = VOCAB, Toy.cache_spec

    def __call__(self, tokens, plan, layers):
        return self.model(tokens, plan, layers)

    def logits(self, hidden):
        return self.model.logits(hidden).astype(jnp.bfloat16)


@struct
class Rounded(Half):
    """The same scores as float32."""

    def logits(self, hidden):
        return self.model.logits(hidden).astype(jnp.bfloat16).astype(jnp.float32)


@pytest.mark.parametrize("program", [
    functools.partial(pax.generate, max_new_tokens=6, temperature=jnp.array([0.0, 1.0]), top_k=5, top_p=0.9),
    functools.partial(pax.beam_search, max_new_tokens=6, num_beams=2),
    lambda model, *given: pax.speculate(
        model, *given, max_new_tokens=6, drafter=pax.DraftModel(model), temperature=1.0
    )[0],
])  # fmt: skip
def test_scores_of_half_the_bits_are_decided_in_float32(program):
    got, want = (jax.jit(functools.partial(program, kind(TOY)))(*prompts((5, 3))) for kind in (Half, Rounded))
    assert np.array_equal(got.token_ids, want.token_ids)
    assert got.logprobs.dtype == jnp.float32
    assert np.array_equal(got.logprobs, want.logprobs)


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": 1.0, "key": jax.random.PRNGKey(0)}, r"key is uint32\[2\]; give one of `jax.random.key\(seed\)`"),
    ({"temperature": 1.0, "key": jax.random.split(jax.random.key(0), 3)}, r"\[3\]; give one of .*, or 2, one a row"),
    ({"prompt_length": jnp.array([3])}, r"prompt_ids has shape \(2, 5\) and prompt_length \(1,\)"),
    ({"prompt_ids": jnp.array([3, 4])}, r"prompt_ids has shape \(2,\)"),
])  # fmt: skip
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_wrong_shapes_and_keys_are_refused(wrap, options, message):
    ids, length = prompts((5, 3))
    given = {"prompt_ids": ids, "prompt_length": length} | options
    with pytest.raises(ValueError, match=message):
        wrap(lambda given: pax.generate(CHAIN, **given, max_new_tokens=2))(given)


def test_64_bits_are_refused_and_32_work_beside_them():
    ids, length = prompts((5, 3))
    with jax.enable_x64(True):
        with pytest.raises(ValueError, match=r"counts in int32: leave jax_enable_x64 off"):
            pax.generate(CHAIN, ids, length, max_new_tokens=2)
        with jax.enable_x64(False):
            result = pax.generate(CHAIN, ids, length, max_new_tokens=2)
    assert tokens_of(result) == answers(ids, length, (2, 2))


def test_a_search_may_be_donated_and_its_penalty_used_again():
    penalty = jnp.float32(0.7)
    advance = jax.jit(beam.advance, donate_argnames="search")
    for _ in range(2):
        search = beam.begin(CHAIN, *prompts((3,)), num_beams=2, max_new_tokens=3, length_penalty=penalty)
        advance(CHAIN, beam.branch(CHAIN, search, budget=3))


def test_speculation_answers_a_prompt_once():
    with pytest.raises(ValueError, match="num_return_sequences is 2; speculation answers a prompt once"):
        pax.speculate(CHAIN, *prompts((3,)), drafter=pax.NGram(), max_new_tokens=2, num_return_sequences=2)


@struct
class Wrong:
    """Guesses that never hold."""

    def init(self, state, k):
        return ()

    def propose(self, carry, state, k):
        rows = state.known.size
        return pax.Draft(jnp.full((rows, k), VOCAB - 1), jnp.full(rows, k), None), carry

    def settle(self, carry, state):
        return carry


def test_tails_that_are_shared_are_copied_before_guesses_take_the_blocks():
    """Two samples of a prompt go on in a pool that is just large enough for plain decoding."""
    ids, length = prompts((6,))
    eos = CHAIN.answer(ids[0, :6], 3)[-1]

    @jax.jit
    def both(ids, length):
        state = pax.start(CHAIN, ids, length, max_new_tokens=6, num_return_sequences=2, block_size=4, num_blocks=5,
                          eos_token_id=eos)  # fmt: skip
        state = pax.fan_out(CHAIN, state, group=2, budget=6)
        guessing = speculative.begin(Wrong(), state, k=3)
        return pax.advance(CHAIN, state, budget=6), speculative.advance(CHAIN, Wrong(), guessing, k=3, budget=6)

    plain, guessed = both(ids, length)
    assert int(plain.status) == int(guessed.status) == pax.Status.OK
    assert plain.known.tolist() == guessed.known.tolist() == [9, 9]


def test_verify_steps_are_counted_like_any_other():
    """A line of the trace a step, and sums that are those of its columns."""
    state = pax.start(CHAIN, *prompts((9, 5)), max_new_tokens=8, block_size=2, trace=40)
    state = speculative.begin(pax.NGram(), state, k=3)
    state = jax.jit(functools.partial(speculative.advance, k=3, budget=14))(CHAIN, pax.NGram(), state)
    steps, trace = int(state.stats.steps), np.asarray(state.trace)
    assert (trace[:steps, 0] > 0).all()
    assert not trace[steps:].any()
    sums = (state.stats.block_steps_held, state.stats.block_steps_shared, state.stats.block_steps_unshared)
    assert trace.sum(axis=0)[:3].tolist() == [int(x) for x in sums]
    assert trace[:, 0].max() == int(state.stats.blocks_peak)


def test_several_samples_are_evicted_while_their_prompt_is_fed():
    """Asking for more changes no sample, and takes no more room for the prompt."""
    ids, length = prompts((24, 17))
    options = {"max_new_tokens": 5, "block_size": 2, "evict": pax.sinks_and_window(2, 6), "max_num_batched_tokens": 12}
    run = jax.jit(
        functools.partial(pax.generate, TOY, **options), static_argnames=("num_return_sequences", "num_blocks")
    )
    one, two = (run(ids, length, num_return_sequences=n, num_blocks=13 * n) for n in (1, 2))
    assert tokens_of(two)[::2] == tokens_of(two)[1::2] == tokens_of(one)
    assert two.finish_reason.tolist() == [pax.Finish.LENGTH] * 4
    assert int(two.stats.blocks_allocated) == int(two.stats.blocks_freed)
