"""Refinement: any sequence of verbs on a paged cache equals the same on plain Python lists of tokens."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import paxattn as pax

ROWS, PAGES, BUDGET = 4, 6, 16
SPEC = pax.CacheSpec(num_layers=1, num_kv_heads=1, head_dim=1, dtype=jnp.float32)


def counts(high):
    return st.lists(st.integers(0, high), min_size=ROWS, max_size=ROWS)


@functools.cache
def compiled(budget):
    @jax.jit
    def feed(cache, count, first_token):
        cache, plan, status = pax.extend(cache, count, budget=budget)
        payload = first_token + jnp.arange(budget, dtype=jnp.float32)[:, None, None]
        kv = pax.write(cache.layers[0], plan, payload, -payload)
        return pax.Cache(cache.table, (kv,)), plan, status

    return feed


append, fork, truncate, free = map(jax.jit, (pax.append, pax.fork, pax.truncate, pax.free))
view, violations = jax.jit(lambda cache: pax.view(cache, 0)), jax.jit(pax.violations)


def empty(block_size, num_blocks):
    sizes = {"num_blocks": num_blocks, "block_size": block_size, "max_num_seqs": ROWS}
    cache = pax.Cache.create(SPEC, **sizes, max_model_len=PAGES * block_size)
    # NaN in every slot: what nobody wrote must never be seen.
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.ndim == 4 else x, cache)


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in leaves)


class Paging(RuleBasedStateMachine):
    """The oracle: rows are lists of tokens, and lists of block objects that are shared by identity."""

    @initialize(sizes=st.sampled_from([(1, 14), (3, 9), (4, 12)]))
    def begin(self, sizes):
        self.size, self.num_blocks = sizes
        self.cache = empty(*sizes)
        self.tokens = [[] for _ in range(ROWS)]
        self.blocks = [[] for _ in range(ROWS)]
        self.next_token = 1

    def _in_use(self, rows):
        return len({id(b) for row in rows for b in row})

    @rule(count=counts(5))
    def extend(self, count):
        rows, copied = [list(r) for r in self.blocks], 0
        for b, n in enumerate(count):
            if n and len(self.tokens[b]) % self.size:
                tail = rows[b][-1]
                if sum(tail is other for row in rows for other in row) > 1:
                    rows[b][-1], copied = object(), copied + 1
            while len(rows[b]) * self.size < len(self.tokens[b]) + n:
                rows[b].append(object())
        if sum(count) > BUDGET:
            expected = pax.Status.OVER_BUDGET
        elif any(len(t) + n > PAGES * self.size for t, n in zip(self.tokens, count, strict=True)):
            expected = pax.Status.ROW_FULL
        elif self._in_use(rows) > self.num_blocks - 1:
            expected = pax.Status.OUT_OF_BLOCKS
        else:
            expected = pax.Status.OK

        before = self.cache
        cache, plan, status = compiled(BUDGET)(before, jnp.array(count, jnp.int32), float(self.next_token))
        assert pax.Status(int(status)) is expected
        if expected is not pax.Status.OK:
            assert same(before, cache)
            return
        assert int(plan.copies.count) == copied
        written = np.asarray(plan.block)[np.asarray(plan.live)]
        assert (np.asarray(cache.table.blocks.refcount)[written] == 1).all(), "a shared block was written"
        self.cache, self.blocks = cache, rows
        for b, n in enumerate(count):
            self.tokens[b] = self.tokens[b] + list(range(self.next_token, self.next_token + n))
            self.next_token += n

    @rule(parent=st.lists(st.integers(-1, ROWS), min_size=ROWS, max_size=ROWS))
    def fork(self, parent):
        self.cache = pax.Cache(fork(self.cache.table, jnp.array(parent, jnp.int32)), self.cache.layers)
        lives = [0 <= p < ROWS for p in parent]
        self.tokens = [list(self.tokens[p]) if ok else [] for p, ok in zip(parent, lives, strict=True)]
        self.blocks = [list(self.blocks[p]) if ok else [] for p, ok in zip(parent, lives, strict=True)]

    @rule(length=counts(20))
    def truncate(self, length):
        self.cache = pax.Cache(truncate(self.cache.table, jnp.array(length, jnp.int32)), self.cache.layers)
        self._cut(length)

    @rule(rows=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
    def free(self, rows):
        self.cache = pax.Cache(free(self.cache.table, jnp.array(rows)), self.cache.layers)
        self._cut([0 if gone else len(t) for gone, t in zip(rows, self.tokens, strict=True)])

    def _cut(self, length):
        self.tokens = [t[:n] for t, n in zip(self.tokens, length, strict=True)]
        self.blocks = [r[: -(-len(t) // self.size)] for r, t in zip(self.blocks, self.tokens, strict=True)]

    @invariant()
    def agrees(self):
        if not hasattr(self, "cache"):
            return
        table = self.cache.table
        assert {k: int(v) for k, v in violations(table).items() if v} == {}
        assert table.length.tolist() == [len(t) for t in self.tokens]
        assert int(table.blocks.num_used) == self._in_use(self.blocks)
        k, v = (np.asarray(x)[..., 0, 0] for x in view(self.cache))
        for b, tokens in enumerate(self.tokens):
            assert k[b, : len(tokens)].tolist() == tokens
            assert (-v[b, : len(tokens)]).tolist() == tokens
            assert not k[b, len(tokens) :].any()


TestPaging = Paging.TestCase
TestPaging.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


def fed(block_size, *steps, num_blocks=40):
    cache = empty(block_size, num_blocks)
    for count in steps:
        cache, _, status = compiled(64)(cache, jnp.array(count, jnp.int32), 1.0)
        pax.check(status)
    return cache


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 64, 256])
@pytest.mark.parametrize("grown", [0, 1, 5, 33])
def test_truncate_is_the_exact_inverse_of_append(block_size, grown):
    table = fed(block_size, [7, 0, 3, 1] if block_size > 2 else [5, 0, 3, 1], num_blocks=80).table
    count = jnp.array([min(grown, table.capacity - 7), grown % 3, 0, min(grown, 2)], jnp.int32)
    longer, copies, status = append(table, jnp.maximum(count, 0))
    pax.check(status)
    assert int(copies.count) == 0
    assert same(truncate(longer, table.length), table)


def test_fork_composes():
    table = fed(3, [7, 0, 3, 1]).table
    rng = np.random.default_rng(0)
    for _ in range(20):
        p, q = (jnp.array(rng.integers(0, ROWS, ROWS), jnp.int32) for _ in range(2))
        assert same(fork(fork(table, p), q), fork(table, p[q]))


def test_free_all_is_the_empty_table():
    cache = fed(3, [7, 0, 3, 1])
    table = fork(cache.table, jnp.array([0, 0, 0, 2]))
    assert same(free(table, jnp.ones(ROWS, bool)), empty(3, 40).table)


def test_the_chapters_fork_and_write():
    """A fork shares all blocks; a write copies the tail alone, and the last holder keeps it."""
    cache = fed(4, [10, 0, 0, 0])
    table = fork(cache.table, jnp.array([0, 0, -1, -1]))
    tail = int(table.pages[0, 2])
    assert np.asarray(table.blocks.refcount)[np.asarray(table.pages[0, :3])].tolist() == [2, 2, 2]
    one, copies, _ = append(table, jnp.array([0, 1, 0, 0]))
    assert copies.source.tolist() == [0, tail, 0, 0]
    assert int(one.pages[0, 2]) == tail
    assert int(one.pages[1, 2]) == int(copies.target[1]) not in (0, tail)
    both, copies, _ = append(table, jnp.array([1, 1, 0, 0]))
    assert int(copies.count) == 1, "the last holder keeps the original"
    assert int(both.blocks.refcount[tail]) == 1


def test_a_double_free_shows_and_is_not_clamped():
    blocks, ids, ok = pax.allocate(pax.Blocks.create(4), jnp.array([True]))
    assert bool(ok)
    twice = pax.release(pax.release(blocks, ids), ids)
    assert int(twice.refcount[ids[0]]) == -1
    assert not bool(twice.is_free[ids[0]]), "a broken block is not handed out again"


def test_null_is_never_handed_out():
    blocks, ids, ok = pax.allocate(pax.Blocks.create(6), jnp.ones((5,), bool))
    assert bool(ok)
    assert sorted(ids.tolist()) == [1, 2, 3, 4, 5]
    again, ids, ok = pax.allocate(blocks, jnp.array([[True], [False]]))
    assert not bool(ok)
    assert same(again, blocks)
    assert not ids.any()


def test_violations_name_each_broken_invariant():
    table = fed(3, [7, 0, 3, 1]).table
    assert not any(violations(table).values())

    def broken(pages=table.pages, length=table.length, refcount=table.blocks.refcount):
        found = violations(pax.PageTable(pages, length, pax.Blocks(refcount), 3))
        return {name for name, n in found.items() if n}

    count, pages = table.blocks.refcount, table.pages
    assert "refcount is not the number of cells" in broken(refcount=count.at[9].add(1))
    assert "refcount is negative" in broken(refcount=count.at[9].add(-1))
    assert "NULL is in use" in broken(refcount=count.at[0].add(1))
    assert "block id is out of range" in broken(pages=pages.at[0, 0].set(40))
    assert "live page has no block" in broken(pages=pages.at[0, 0].set(0))
    assert "dead page holds a block" in broken(pages=pages.at[1, 0].set(3))
    assert "row holds a block twice" in broken(pages=pages.at[0, 0].set(pages[0, 1]))
    assert "length is out of range" in broken(length=table.length.at[0].set(99))


def test_locate_answers_null_for_what_a_row_does_not_hold():
    table = fed(3, [7, 0, 3, 1]).table
    block, slot = pax.locate(table, jnp.array([0, 0, 1, 0]), jnp.array([6, 7, 0, -1]))
    assert block.tolist() == [int(table.pages[0, 2]), 0, 0, 0]
    assert slot.tolist() == [0, 0, 0, 0]


def test_statuses_say_what_to_do():
    table = fed(3, [7, 0, 3, 1]).table
    for count, status in ([-1, 0, 0, 0], pax.Status.BAD_COUNT), ([60, 0, 0, 0], pax.Status.ROW_FULL):
        after, _, got = append(table, jnp.array(count, jnp.int32))
        assert pax.Status(int(got)) is status
        assert same(after, table)
        with pytest.raises(pax.PagingError, match=status.name):
            pax.check(got)
    for status in pax.Status:
        assert len(status.message) > 10


def test_the_table_refuses_sizes_that_cannot_be():
    good = {"num_blocks": 4, "block_size": 2, "max_num_seqs": 1, "max_model_len": 4}
    for name in good:
        with pytest.raises(ValueError, match=f"{name} is 0, must be at least"):
            pax.PageTable.create(**{**good, name: 0})
