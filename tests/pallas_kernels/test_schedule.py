"""The shares of the decode kernel: every KV tile of every item in one of them, none much longer than another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.schedule import schedule
from pallas_kernels.tiles import query_tiles

KV_TILE, TOKENS = 64, 90


@functools.partial(jax.jit, static_argnames=("kv_heads", "workers", "sliding_window", "item_tiles"))
def plan_of(length, start, **options):
    return schedule(query_tiles(TOKENS, 2, length, start), kv_tile=KV_TILE, **options)


def walk(share, count):
    """What each worker looks at, as the kernel reads it: (item, first KV tile, end)."""
    for worker in range(len(share) - 1):
        (first, skip), (end, rest) = share[worker, :2], share[worker + 1, :2]
        yield [
            (item, skip if item == first else 0, rest if item == end else count[item])
            for item in range(first, end + (rest > 0))
        ]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3000)), min_size=30, max_size=30),
    kv_heads=st.sampled_from([1, 3, 8]),
    workers=st.sampled_from([1, 7, 264]),
    sliding_window=st.sampled_from([None, 1, 100]),
    item_tiles=st.sampled_from([0, 1, 3]),
)
def test_every_tile_is_in_one_share_and_shares_cost_the_same(rows, kv_heads, workers, sliding_window, item_tiles):
    counts = np.array([n for n, _ in rows], np.int32)
    length = np.array([n + before if n else 0 for n, before in rows], np.int32)
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    options = {"kv_heads": kv_heads, "workers": workers, "sliding_window": sliding_window, "item_tiles": item_tiles}
    plan = plan_of(jnp.asarray(length), jnp.asarray(start), **options)
    info, share = np.asarray(plan.tile), np.asarray(plan.share)
    for begin, count, first, last in info[:, 1:]:
        seen = range(max(0, first - sliding_window + 1) if sliding_window else 0, last + 1)
        assert (begin, begin + count) == (seen.start // KV_TILE if seen else 0, -(-seen.stop // KV_TILE))
    count = np.repeat(info[:, 2], kv_heads)
    looked_at = [set() for _ in count]
    pieces = np.zeros(len(count), int)
    longest = 0
    for items in walk(share, count):
        for item, begin, end in items:
            assert begin < end or count[item] == 0
            assert looked_at[item].isdisjoint(range(begin, end))
            looked_at[item].update(range(begin, end))
            pieces[item] += 1
        cost = sum(max(end - begin + item_tiles * (begin == 0), 1) for _, begin, end in items)
        longest = max(longest, cost)
    assert [len(those) for those in looked_at] == count.tolist()
    assert pieces.min() >= 1
    for item, skip, borders in share:
        assert borders == (pieces[item] - 1 if item < len(count) else 0)
        assert skip == 0 or skip < count[item]
    assert longest <= -(-np.maximum(count + item_tiles, 1).sum() // workers) + max(item_tiles, 1)
