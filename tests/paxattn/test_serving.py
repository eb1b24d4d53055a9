"""The laws of dynamic batching, on toys: who sits where and when is unobservable in the tokens, and nobody is lost."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paxattn as pax
from paxattn.serving import trace as tracing
from paxattn.serving import widths
from paxattn.serving.loop import most, open_service, results, run
from paxattn.serving.policy import first_come, highest_priority, ranked, shortest_prompt
from paxattn.serving.queue import put
from paxattn.serving.service import admit, choose
from paxattn.serving.widths import decode_widths, prompt_widths, room, shortest
from paxattn.typing import struct
from tests.toys import VOCAB, Chain, Toy, prompts, tokens_of

TOY, CHAIN = Toy.create(), Chain(jnp.int32(7))
LENGTHS = (1, 5, 16, 17, 40, 3, 9, 22, 2, 30)
LINES, ROWS, MODEL_LEN, NEW = len(LENGTHS), 3, 64, 12
IDS, LENGTH = prompts(LENGTHS)
KEYS = jax.random.split(jax.random.key(3), LINES)
TEMPERATURE = np.arange(LINES) % 2 * 0.9  # every second request samples
PENALTY = 1 + np.arange(LINES) % 3 * 0.4

SETTINGS = {  # shapes and policies are compiled: a few are drawn from
    "first": {"block_size": 3, "num_blocks": 41, "budget": 7, "policy": pax.Policy()},
    "short": {"block_size": 16, "num_blocks": 9, "budget": 3, "policy": pax.Policy(admit=shortest_prompt)},
    "priority": {"block_size": 1, "num_blocks": 120, "budget": 19,
                 "policy": pax.Policy(highest_priority, highest_priority, watermark=0.1)},
}  # fmt: skip


def requests(**options):
    given = {"max_new_tokens": NEW, "temperature": TEMPERATURE, "repetition_penalty": PENALTY, "key": KEYS, **options}
    return pax.Requests.create(IDS, LENGTH, **given)


@functools.cache
def alone():
    """The tokens of each request when it is all there is."""

    @jax.jit
    def run(r):
        knobs = {"temperature": TEMPERATURE, "repetition_penalty": PENALTY, "key": KEYS}
        knobs = {name: jnp.asarray(value)[r] for name, value in knobs.items()}
        ids, length = jax.lax.dynamic_slice_in_dim(IDS, r[0], 1), LENGTH[r]
        return pax.generate(TOY, ids, length, max_new_tokens=NEW, max_model_len=MODEL_LEN, **knobs)

    return [tokens_of(run(jnp.array([r])))[0] for r in range(LINES)]


def opened(block_size, num_blocks, **options):
    return open_service(TOY, lines=LINES, max_num_seqs=ROWS, max_model_len=MODEL_LEN, num_blocks=num_blocks,
                        block_size=block_size, **options)  # fmt: skip


enter = jax.jit(lambda s, r, line: dataclasses.replace(s, queue=put(s.queue, r, line, jnp.arange(LINES), most(s))))


@functools.partial(jax.jit, static_argnames=("budget",))
def advance(service, policy, steps, budget):
    service = run(TOY, service, budget=budget, policy=policy, steps=steps)
    return service, pax.violations(service.cache.table)


def held_by_others(service, count):
    """The service with `count` blocks of its pool in somebody else's hands: a pool size that compiles nothing."""
    table = service.cache.table
    refcount = table.blocks.refcount.at[1 : count + 1].set(1)
    table = pax.PageTable(table.pages, table.length, pax.Blocks(refcount), table.block_size)
    return dataclasses.replace(service, cache=pax.Cache(table, service.cache.layers))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_who_sits_where_and_when_is_unobservable(data):
    """Any requests, in any lines and order, through any pool that holds the largest, in chunks of any length."""
    name = data.draw(st.sampled_from(sorted(SETTINGS)))
    setting = dict(SETTINGS[name])
    policy, budget = setting.pop("policy"), setting.pop("budget")
    draw_all = functools.partial(st.lists, min_size=LINES, max_size=LINES)
    new = np.array(data.draw(draw_all(st.integers(1, NEW))))
    chosen = np.array(data.draw(draw_all(st.booleans())))
    lines = np.array(data.draw(st.permutations(range(LINES))))
    arrival = np.array(data.draw(draw_all(st.sampled_from((0, 0, 3, 60)))))
    priority = np.array(data.draw(draw_all(st.integers(0, 3))))

    service = opened(**setting)
    asked = requests(max_new_tokens=new, arrival=arrival, priority=priority)
    service = enter(service, asked, jnp.where(chosen, lines, LINES))
    need = -(-np.max((np.array(LENGTHS) + new - 1)[chosen], initial=1) // setting["block_size"])
    others = data.draw(st.integers(0, setting["num_blocks"] - 1 - need))
    service = held_by_others(service, others)
    broken = pax.violations(service.cache.table)["refcount is not the number of cells"]
    while service.queue.unfinished.any():
        before = int(service.stats.steps)
        service, after = advance(service, policy, data.draw(st.sampled_from((1, 7, 500))), budget)
        assert after.pop("refcount is not the number of cells") == broken
        assert not any(after.values())
        assert before < int(service.stats.steps) < 3000
    result = results(service, LINES)
    tokens = tokens_of(result)
    for r, line in enumerate(lines):
        if chosen[r]:
            assert tokens[line] == alone()[r][: new[r]]
            assert int(result.times.arrival[line]) <= int(result.times.admitted[line])
            assert int(result.times.admitted[line]) < int(result.times.first_token[line])
            assert int(result.times.first_token[line]) <= int(result.times.ended[line])
    assert int(service.cache.table.blocks.num_used) == others


def test_the_oldest_request_is_never_preempted_and_moves_in_every_step():
    """So it ends after at most as many steps as it has tokens, and then another one is the oldest."""
    service = held_by_others(enter(opened(3, 41), requests(), jnp.arange(LINES)), 21)
    total = sum(LENGTHS) + LINES * NEW
    while (unfinished := np.asarray(service.queue.unfinished)).any():
        oldest = int(np.argmax(unfinished))
        before = service.queue
        was_seated = bool((service.line == oldest).any())
        held = int(service.cache.table.length[jnp.argmax(service.line == oldest)]) if was_seated else 0
        service, _ = advance(service, pax.Policy(), 1, 7)
        assert int(service.queue.preemptions[oldest]) == int(before.preemptions[oldest])
        on_row = bool((service.line == oldest).any())
        ended = not bool(service.queue.unfinished[oldest])
        if was_seated:
            assert ended or on_row
            assert ended or int(service.cache.table.length[jnp.argmax(service.line == oldest)]) > held
        assert int(service.stats.steps) < 4 * total
    assert service.queue.preemptions.any(), "the pool was to be too small"
    assert tokens_of(results(service, LINES)) == alone()


def test_steps_are_counted_from_here_even_where_their_number_has_no_bits_left():
    service, policy = enter(opened(3, 41), requests(), jnp.arange(LINES)), pax.Policy()
    late = dataclasses.replace(service, stats=dataclasses.replace(service.stats, steps=jnp.int32(2**31 - 3)))
    (five, _), (also, _) = (advance(s, policy, 5, 7) for s in (service, late))
    assert int(five.stats.steps) == 5
    np.testing.assert_array_equal(five.queue.known, also.queue.known)


@functools.cache
def long_run():
    """1,000 requests of lengths 1 to 2000 each way, through a pool that is far too small for the rows."""
    rng, lines = np.random.default_rng(0), 1000
    length = np.exp(rng.uniform(0, np.log(2000.99), (2, lines))).astype(np.int32)
    ids = rng.integers(0, VOCAB, (lines, 2000), dtype=np.int32)
    return ids, length[0], length[1]


def test_a_thousand_requests_through_a_pool_that_is_too_small():
    ids, length, new = long_run()
    traced = []

    class Counted(Chain):
        def __call__(self, tokens, plan, layers):
            traced.append(tokens.shape[0])
            return super().__call__(tokens, plan, layers)

    jax.tree_util.register_pytree_node(Counted, lambda m: ((m.salt,), None), lambda _, leaves: Counted(*leaves))

    @functools.partial(jax.jit, donate_argnums=1)
    def chunk(model, service):
        service = run(model, service, budget=512, policy=pax.Policy(), steps=500)
        broken = pax.violations(service.cache.table)
        return service, sum(broken.values()), service.queue.unfinished.any()

    service = open_service(CHAIN, lines=1000, max_num_seqs=32, max_model_len=4000, num_blocks=800, block_size=16)
    line = jnp.arange(1000)
    queue = put(service.queue, pax.Requests.create(ids, length, max_new_tokens=new), line, line, most(service))
    service, more = dataclasses.replace(service, queue=queue), True
    while more:
        service, broken, more = chunk(Counted(jnp.int32(7)), service)
        assert not int(broken)
    assert chunk._cache_size() == 1
    assert sorted(set(traced)) == [32, 128, 512]
    assert int(service.cache.table.blocks.num_used) == 0
    assert int(service.queue.preemptions.sum()) > 50
    assert (np.asarray(service.queue.finish) == pax.Finish.LENGTH).all()
    result = results(service, 1000)
    token_ids = np.asarray(result.token_ids)
    assert (np.asarray(result.length) == new).all()
    for r in range(1000):
        assert token_ids[r, : new[r]].tolist() == CHAIN.answer(ids[r, : length[r]], new[r]), r


serve = jax.jit(pax.serve, static_argnames=("max_num_seqs", "max_model_len", "num_blocks", "block_size",
                                            "max_num_batched_tokens", "trace", "attention"))  # fmt: skip
SMALL = {"max_num_seqs": ROWS, "max_model_len": MODEL_LEN, "block_size": 3, "num_blocks": 20,
         "max_num_batched_tokens": 7, "trace": 400}  # fmt: skip


def test_serve_is_all_of_it_and_its_trace_adds_up():
    result = serve(TOY, requests(), **SMALL)
    assert tokens_of(result) == alone()
    assert result.token_ids.shape == result.logprobs.shape == (LINES, MODEL_LEN)
    assert (result.logprobs < 0).any()
    stats, columns = result.stats, tracing.columns(result.trace, int(result.stats.steps))
    assert columns["prefill_tokens"].sum() + columns["decode_tokens"].sum() == int(stats.tokens_fed)
    assert columns["blocks_allocated"].sum() == int(stats.blocks_allocated)
    assert columns["blocks_freed"].sum() == int(stats.blocks_freed) == int(stats.blocks_allocated)
    assert columns["blocks_used"].max() == int(stats.blocks_peak) <= 19
    assert columns["preempted"].sum() == int(result.preemptions.sum()) > 0
    assert (columns["tokens_held"] <= 3 * columns["blocks_used"]).all()
    assert (columns["tokens_held"] > 3 * (columns["blocks_used"] - columns["rows"])).all()
    assert columns["rows"].max() == ROWS
    assert columns["waiting"][0] == LINES - columns["rows"][0]
    assert not columns["blocks_copied"].any()
    used = np.cumsum(columns["blocks_allocated"] - columns["blocks_freed"])
    assert used[-1] == 0


def test_lengths_of_the_token_axis():
    assert decode_widths(256) == [256, 192, 128, 64]
    assert decode_widths(100) == [100]
    assert prompt_widths(4096, 256) == [4096, 1024]
    assert prompt_widths(2048, 16) == [2048, 512, 128]
    assert prompt_widths(255, 16) == prompt_widths(255, 255) == [255]


@pytest.mark.parametrize("lengths", [[2048, 512, 128], [255]])
def test_an_axis_is_half_used_or_the_shortest(lengths):
    need = np.arange(1, 2 * lengths[0])
    taken = np.asarray(jax.vmap(lambda n: room(n, lengths))(need))
    index = np.asarray(jax.vmap(lambda n: shortest(n, lengths))(np.minimum(need, taken)))
    assert (np.array(lengths)[index] == taken).all(), "what is fed takes the axis that it was fed for"
    assert ((2 * need > taken) | (taken == lengths[-1])).all()
    longer = np.array([lengths[0], *lengths])[index]  # the next one up, where there is one
    assert ((need <= taken) | (2 * need <= longer) | (taken == lengths[0])).all(), "no longer one would be half used"


@pytest.mark.parametrize("name", ["all", "some"])
def test_the_width_of_the_token_axis_is_unobservable(monkeypatch, name):
    """Axes of 64 and 16 tokens for prompts, of 4 to 1 without: each has its steps, as rows end at different times."""
    monkeypatch.setattr(widths, "LEAST_WIDTH", 1)
    assert (decode_widths(4), prompt_widths(64, 4)) == ([4, 3, 2, 1], [64, 16])
    new = np.arange(3, 3 + LINES)
    ran = collections.Counter()

    @struct
    class Watched(Toy):
        def __call__(self, tokens, plan, layers):
            jax.debug.callback(lambda: ran.update([tokens.shape[0]]))
            return super().__call__(tokens, plan, layers)

    sizes = {"max_num_seqs": 4, "max_model_len": MODEL_LEN, "max_num_batched_tokens": 64, "trace": 400}
    sizes |= {"block_size": 3, "num_blocks": 20} if name == "some" else {}  # of the rows fit
    result = jax.jit(functools.partial(pax.serve, Watched(**vars(TOY)), **sizes))(requests(max_new_tokens=new))
    assert tokens_of(result) == [tokens[:n] for tokens, n in zip(alone(), new, strict=True)]
    assert bool(result.preemptions.any()) == (name == "some")
    jax.effects_barrier()
    columns = tracing.columns(result.trace, int(result.stats.steps))
    fed, prompts = columns["prefill_tokens"] + columns["decode_tokens"], columns["prefill_tokens"] > 1
    taken = [
        min(w for w in ([64, 16] if mixed else [4, 3, 2, 1]) if w >= n) for n, mixed in zip(fed, prompts, strict=True)
    ]
    assert ran == collections.Counter(taken)
    assert set(ran) == {64, 16, 4, 3, 2, 1}
    assert (fed[prompts] == 16).any(), "what would use a third of 64 fills 16, and the rest waits"


@jax.jit
def solo(requests, eos):
    """One row, and a pool of one request's size."""
    policy = pax.Policy(highest_priority, highest_priority)
    return pax.serve(CHAIN, requests, max_num_seqs=1, max_model_len=MODEL_LEN, block_size=8, num_blocks=1 + 7,
                     max_num_batched_tokens=40, policy=policy, eos_token_id=eos)  # fmt: skip


def chained(new=NEW, **options):
    return pax.Requests.create(IDS, LENGTH, max_new_tokens=new, **options)


def test_rows_and_blocks_serve_the_next_request_in_the_next_iteration():
    result = solo(chained(4), jnp.array([VOCAB]))
    assert int(result.stats.steps) == LINES * 4, "no iteration is idle"
    assert (result.times.admitted[1:] == result.times.ended[:-1]).all()
    assert not result.preemptions.any()
    assert tokens_of(result) == [CHAIN.answer(IDS[r, : LENGTHS[r]], 4) for r in range(LINES)]
    assert tracing.columns(result.trace, 1) == {}, "off unless asked for"


def test_all_end_in_one_iteration_and_idle_time_is_skipped():
    asked = dataclasses.replace(requests(max_new_tokens=1, arrival=1000), prompt_length=jnp.ones(LINES, jnp.int32))
    result = serve(TOY, asked, **SMALL)
    assert int(result.stats.steps) == 4
    assert result.times.admitted.tolist() == [1000] * 3 + [1001] * 3 + [1002] * 3 + [1003]
    assert (result.times.ended == result.times.admitted + 1).all()


def test_no_request_is_no_work():
    result = pax.serve(CHAIN, pax.Requests.create(jnp.zeros((0, 4)), jnp.zeros(0), max_new_tokens=1), max_num_seqs=2)
    assert result.token_ids.shape[0] == 0
    assert int(result.stats.steps) == 0


def test_an_order_decides_who_is_seated():
    result = solo(chained(priority=np.arange(LINES) % 4), jnp.array([VOCAB]))
    assert np.argsort(result.times.admitted).tolist() == [3, 7, 2, 6, 1, 5, 9, 0, 4, 8]


def test_ties_go_by_arrival_then_by_submission():
    queue = opened(3, 20).queue
    asked = requests(arrival=[5, 0, 5, 0, 0, 0, 0, 0, 0, 0], priority=[1, 1, 1, 0, 0, 0, 0, 0, 0, 9])
    queue = put(queue, asked, jnp.arange(LINES), jnp.arange(LINES)[::-1], 99)
    assert ranked(queue, highest_priority).tolist() == [9, 1, 2, 0, 8, 7, 6, 5, 4, 3]
    assert ranked(queue, first_come).tolist() == [9, 8, 7, 6, 5, 4, 3, 1, 2, 0]
    assert ranked(queue, shortest_prompt).tolist() == sorted(range(LINES), key=lambda r: LENGTHS[r])


def test_decoding_rows_feed_first_then_prompts_in_order():
    service = enter(opened(3, 41), requests(), jnp.arange(LINES))
    table = dataclasses.replace(service.cache.table, length=jnp.array([1, 0, 0]))  # the prompt of 2 is nearly fed
    service = dataclasses.replace(service, line=jnp.array([8, 4, 3]), cache=pax.Cache(table, service.cache.layers))
    count, out = choose(service, jnp.arange(LINES), [7])
    assert count.tolist() == [1, 0, 6]
    assert not out.any()
    count, _ = choose(service, jnp.arange(LINES)[::-1], [60])
    assert count.tolist() == [1, 40, 17]


@pytest.mark.parametrize(("watermark", "seated"), [(0.2, [0, 1]), (0.3, [0, LINES])])
def test_admission_leaves_the_watermark_free(watermark, seated):
    """Two requests of four blocks each fit into ten where two blocks are to stay free, and not where three are."""
    service = open_service(CHAIN, lines=LINES, max_num_seqs=2, max_model_len=36, num_blocks=11, block_size=4)
    asked = pax.Requests.create(IDS, jnp.full(LINES, 16), max_new_tokens=20)
    line = jnp.arange(LINES)
    service = dataclasses.replace(service, queue=put(service.queue, asked, line, line, most(service)))
    first = admit(service, line, jnp.float32(watermark))
    assert first.line.tolist() == seated
    assert admit(first, line, jnp.float32(watermark)).line.tolist() == seated, "what is promised to a row counts"
    assert admit(service, line[::-1], jnp.float32(0.3)).line.tolist() == [LINES - 1, LINES]


def test_nan_logits_end_that_request_only():
    """A token that no other request meets has a NaN embedding; the sick request's blocks are used again by others."""

    def go(bad, embedding, sick):
        ids = jnp.where(bad == IDS, (bad + 1) % VOCAB, IDS)
        asked = dataclasses.replace(requests(), prompt_ids=ids.at[2, 4].set(bad) if sick else ids)
        return serve(dataclasses.replace(TOY, embed=TOY.embed.at[bad, 0].add(embedding)), asked, **SMALL)

    for bad in range(VOCAB):
        healthy = tokens_of(go(bad, 0.0, sick=False))
        if not any(bad in row for row in healthy):
            break
    sick = go(bad, jnp.nan, sick=True)
    assert [pax.Finish(int(f)).label for f in sick.finish_reason] == ["length"] * 2 + ["not_finite"] + ["length"] * 7
    others = [r for r in range(LINES) if r != 2]
    assert [tokens_of(sick)[r] for r in others] == [healthy[r] for r in others]


def test_eos_ends_a_request():
    full = [CHAIN.answer(IDS[r, : LENGTHS[r]], NEW) for r in range(LINES)]
    eos = full[3][4]
    result = solo(chained(), jnp.array([eos]))
    assert tokens_of(result) == [row[: row.index(eos) + 1] if eos in row else row for row in full]
    assert pax.Finish(int(result.finish_reason[3])) is pax.Finish.STOP


def big():
    return enter(opened(4, 20_000), requests(), jnp.arange(LINES))


def test_serving_moves_no_pool_and_talks_to_no_host():
    service = big()
    pool = service.cache.layers[0].k.nbytes
    program = jax.jit(lambda s: run(TOY, s, budget=19, policy=pax.Policy()), donate_argnums=0)
    compiled = program.lower(service).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * pool
    assert memory.temp_size_in_bytes < pool / 4
    text = compiled.as_text()
    assert not any(word in text for word in ("infeed", "outfeed", "callback", " send(", " recv("))
    with jax.transfer_guard("disallow"):
        compiled(service).queue.tokens.block_until_ready()


def test_a_traced_request_that_can_never_fit_ends_at_once():
    """No loop without an end: too long for the pool, for its line, without a prompt, without anything to generate."""
    asked = requests(max_new_tokens=jnp.array([60, 12, 0, 12, 12, 12, 12, 60, 12, 12]), temperature=0.0)
    asked = dataclasses.replace(asked, prompt_length=LENGTH.at[1].set(0))
    result = serve(TOY, asked, **SMALL)
    labels = [pax.Finish(int(f)).label for f in result.finish_reason]
    assert [r for r, label in enumerate(labels) if label == "out_of_blocks"] == [0, 1, 2, 7]
    assert [r for r, label in enumerate(labels) if label == "length"] == [3, 4, 5, 6, 8, 9]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"num_blocks": 17}, "request 4 may need 17 blocks of 3 tokens; the pool has 16.*raise num_blocks"),
        ({}, {"max_model_len": 30}, r"prompt \+ max_new_tokens is 52 in row 4; a row holds max_model_len = 30"),
        ({}, {"max_num_batched_tokens": 2}, "max_num_batched_tokens is 2, must be at least max_num_seqs = 3"),
        ({}, {"block_size": 0}, "block_size is 0, must be at least 1"),
        ({}, {"max_num_seqs": 0}, "max_num_seqs is 0, must be at least 1"),
        ({"max_new_tokens": 0}, {}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, {}, "temperature is -1"),
        ({"top_p": 0.0}, {}, "top_p is 0"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_allocated(change, options, message):
    options = {"max_num_seqs": ROWS, "block_size": 3, "max_model_len": MODEL_LEN, **options}
    with pytest.raises(ValueError, match=message):
        pax.serve(TOY, requests(**change), **options)


def test_traced_requests_need_a_row_size():
    with pytest.raises(ValueError, match="pass max_model_len"):
        jax.jit(lambda r: pax.serve(CHAIN, r, max_num_seqs=2))(chained())
