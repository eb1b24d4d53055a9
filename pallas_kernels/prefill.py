"""Paged attention for many queries a row, on Hopper: the tensor cores never wait for a softmax.

    SM  +---------------------------------------------------------------------------+
        | memory warpgroup   warp 0: queries   warp 1: keys   warp 2: values        |
        |                    TMA, page by page --> rings of tiles in shared memory  |
        | compute warpgroup 0:   S = Q K' | softmax  | P V, Q K' | softmax  | P V    |
        | compute warpgroup 1:            | P V, Q K' | softmax  | P V, Q K' | ...   |
        +---------------------------------------------------------------------------+

A warpgroup holds 64 queries of one head; the two take two heads of one KV head (64 queries more where the group is
odd), so both read the same keys and values. They take turns: one multiplies while the other one exponentiates. Work
items, (query tile, heads), are dealt heaviest first to one resident program an SM, so that the next item's loads
run under the last one's products. Dao et al. 2022 (tiling), Shah et al. 2024 (warp specialisation, turns).

Query tiles start at multiples of 8 of the token axis: TMA then reads and writes the packed tokens where they are, and
nothing is gathered, padded or copied around the kernel. Rows of a tile that belong to a neighbour are computed and
not written.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.prefill_plan import plan_tiles
from pallas_kernels.store_rows import store_rows

ROWS = 64
"""Queries a warpgroup holds: the rows of its matrix products."""
LOW = -1e30
"""Where the running maximum starts: finite, so that a tile without a visible key gives exp(-inf - LOW) = 0."""
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """What may be tuned by hand; the result does not depend on it."""

    kv_tile: int = 128  # keys looked at at once: a multiple of 64
    stages: int = 2  # KV tiles in flight
    query_stages: int = 2  # query tiles in flight; results leave through their shared memory
    programs: int | None = 132  # resident programs, one an SM; None: a program an item
    compute_registers: int = 232
    memory_registers: int = 48


def paged_attention(
    q,
    k_pool,
    v_pool,
    pages,
    length,
    query_start,
    *,
    scale,
    sliding_window=None,
    soft_cap=None,
    config: PrefillConfig | None = None,
    interpret=None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention`; `interpret` runs the kernel on a CPU.

    Raises:
      NotImplementedError: a head size, block size or dtype that the kernel has no layout for.
    """
    (num_tokens, heads, head_dim), (_, kv_heads, block_size, _) = q.shape, k_pool.shape
    if config is None:
        config = PrefillConfig() if head_dim <= 128 else PrefillConfig(kv_tile=64, query_stages=1)
    _check(q, k_pool, config)
    paired = heads // kv_heads % 2 == 0
    # TMA reads and writes rows by eights; interpret mode knows no reads past the end.
    spare = -num_tokens % (128 if interpret else 8)
    q = jnp.pad(q, ((0, spare), (0, 0), (0, 0))) if spare else q
    plan = plan_tiles(
        q.shape[0],
        length,
        query_start,
        tile=ROWS if paired else 2 * ROWS,
        kv_tile=config.kv_tile,
        sliding_window=sliding_window,
    )
    call = _Call(
        config, heads, head_dim, heads // kv_heads, block_size, pages.shape[1], paired, scale, sliding_window, soft_cap,
        bool(interpret), q.dtype,
    )  # fmt: skip
    out, lse = plgpu.kernel(
        call.entry,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:2], jnp.float32),
        ),
        grid=(config.programs or plan.tile.shape[0] * call.units,),
        grid_names=("program",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(q, k_pool, v_pool, pages, plan.tile, plan.live)
    return out[:num_tokens], lse[:num_tokens]


def _check(q, k_pool, config) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise NotImplementedError(f"paged_attention, prefill kernel: {message}")

    require(q.dtype in (jnp.bfloat16, jnp.float16), f"dtype {q.dtype} is neither bfloat16 nor float16.")
    require(q.dtype == k_pool.dtype, f"queries are {q.dtype}, keys {k_pool.dtype}.")
    require(q.shape[2] in (64, 128, 256), f"head size {q.shape[2]} is none of 64, 128, 256.")
    require(k_pool.shape[2] % 8 == 0, f"block size {k_pool.shape[2]} is no multiple of 8.")
    require(config.kv_tile % 64 == 0, f"kv_tile {config.kv_tile} is no multiple of 64.")


def _multiple(x, factor: int):
    """x, a multiple of `factor`, in a form that the lowering knows as one: warps have no `pl.multiple_of`."""
    return lax.div(x, jnp.int32(factor)) * factor


class _Item(NamedTuple):
    """One work item: scalars of the plan, and the heads that it is about."""

    token: jax.Array  # first token of the tile on the token axis, a multiple of 8
    low: jax.Array  # rows low <= r < high of the tile are its own
    high: jax.Array
    position: jax.Array  # of the tile's row 0 in its sequence; negative where row 0 is a neighbour's
    row: jax.Array
    begin: jax.Array  # KV tiles begin <= j < end
    end: jax.Array
    dead_to: jax.Array  # slots below `dead_to` and from `dead_from` on are nobody's
    dead_from: jax.Array
    head: jax.Array  # query head of warpgroup 0


class _Refs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    pages: jax.Array
    tile: jax.Array
    live: jax.Array
    out: jax.Array
    lse: jax.Array
    q_ring: jax.Array
    k_ring: jax.Array
    v_ring: jax.Array
    weights: jax.Array | None
    q_full: jax.Array
    k_full: jax.Array
    v_full: jax.Array
    q_free: jax.Array
    k_free: jax.Array
    v_free: jax.Array
    turn: jax.Array


@dataclasses.dataclass(frozen=True)
class _Call:
    """The kernel's static sizes, and its body."""

    config: PrefillConfig
    heads: int
    head_dim: int
    group: int
    block_size: int
    num_pages: int
    paired: bool
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    interpret: bool
    dtype: jnp.dtype

    @property
    def units(self) -> int:
        """Work items a query tile."""
        return self.heads // 2 if self.paired else self.heads

    @property
    def copy(self) -> int:
        """Tokens a TMA copy: never across a page."""
        return math.gcd(self.block_size, self.config.kv_tile)

    def entry(self, *refs):
        config, kv = self.config, self.config.kv_tile
        copies, stages, query_stages = kv // self.copy, config.stages, config.query_stages

        def tiled(*shape):
            transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
            return plgpu.SMEM(shape, self.dtype, transforms=transforms)

        def barriers(arrivals, count):
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

        pl.run_scoped(
            lambda *scratch: self.body(_Refs(*refs, *scratch)),
            tiled(query_stages, 2, ROWS, self.head_dim),
            tiled(stages, kv, self.head_dim),
            tiled(stages, kv, self.head_dim),
            tiled(2, ROWS, kv) if self.interpret else None,
            barriers(2, query_stages),
            barriers(copies, stages),
            barriers(copies, stages),
            barriers(2, query_stages),
            barriers(2, stages),
            barriers(2, stages),
            barriers(1, 2),
            collective_axes="wg",
        )

    def body(self, refs: _Refs):
        wg = lax.axis_index("wg")

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(self.config.memory_registers, action="decrease")

            @plgpu.warp_map
            def _(warp):
                pl.when(warp == 0)(lambda: self.stream_queries(refs))
                pl.when(warp == 1)(lambda: self.stream(refs, refs.k, refs.k_ring, refs.k_full, refs.k_free))
                pl.when(warp == 2)(lambda: self.stream(refs, refs.v, refs.v_ring, refs.v_full, refs.v_free))

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(self.config.compute_registers, action="increase")
            self.compute(refs, wg)

    def items(self, refs, look, carry):
        """Runs carry = look(i, item, carry) over the items of this program.

        Items come heaviest first; every other round is dealt backwards, so that all programs get the same weight.
        """
        total, programs = refs.live[0] * self.units, jnp.int32(self.programs)
        rounds = lax.div(total, programs)
        mine = rounds + (self.index(rounds) < total).astype(jnp.int32)

        def each(i, carry):
            tile, unit = self.place(self.index(i))
            fields = [refs.tile[tile, f] for f in range(9)]
            return look(i, _Item(*fields, unit * 2 if self.paired else unit), carry)

        return lax.fori_loop(0, mine, each, carry)

    @property
    def programs(self) -> int:
        return self.config.programs or 2**24

    def index(self, i):
        """Which one of all items is the i-th of this program."""
        program, programs = lax.axis_index("program"), jnp.int32(self.programs)
        return i * programs + jnp.where(lax.rem(i, jnp.int32(2)) == 0, program, programs - 1 - program)

    def place(self, index):
        """Tile and unit in it."""
        return lax.div(index, jnp.int32(self.units)), lax.rem(index, jnp.int32(self.units))

    def has_keys(self, refs, i):
        """Whether there is an i-th item and it sees any key; those that see none come last."""
        index = self.index(i)
        last = refs.live[0] * self.units - 1
        tile, _ = self.place(jnp.minimum(index, last))
        return (index <= last) & (refs.tile[tile, 5] < refs.tile[tile, 6])

    # The memory warpgroup.

    def stream_queries(self, refs):
        stages = self.config.query_stages

        def fetch(_, item, done):
            slot = self.free_slot(refs.q_free, done, stages)
            for wg in range(2):
                token, head = self.part(item, wg)
                at = pl.ds(_multiple(token, 8), ROWS)
                plgpu.copy_gmem_to_smem(refs.q.at[at, head], refs.q_ring.at[slot, wg], refs.q_full.at[slot])
            return done + 1

        self.drain(refs.q_free, self.items(refs, fetch, jnp.int32(0)), stages)

    def stream(self, refs, pool, ring, full, free):
        """Copies the KV tiles of all items, page by page, as slots of the ring become free."""
        kv, stages, block_size = self.config.kv_tile, self.config.stages, jnp.int32(self.block_size)
        offsets = range(0, kv, self.copy)

        def page_ids(item, j):
            pages = [lax.div(j * kv + o, block_size) for o in offsets]
            return tuple(refs.pages[item.row, jnp.minimum(p, self.num_pages - 1)] for p in pages)

        def fetch(_, item, done):
            kv_head = lax.div(item.head, jnp.int32(self.group))

            def one(j, carry):
                done, *ids = carry
                ahead = page_ids(item, j + 1)  # the table's latency is spent while the slot is still in use
                slot = self.free_slot(free, done, stages)
                for o, page in zip(offsets, ids, strict=True):
                    at = 0 if kv % self.block_size == 0 else lax.rem(j * kv + o, block_size)
                    at = pl.ds(at, self.copy)
                    plgpu.copy_gmem_to_smem(
                        pool.at[page, kv_head, at], ring.at[slot, pl.ds(o, self.copy)], full.at[slot]
                    )
                return done + 1, *ahead

            return lax.fori_loop(item.begin, item.end, one, (done, *page_ids(item, item.begin)))[0]

        self.drain(free, self.items(refs, fetch, jnp.int32(0)), stages)

    def free_slot(self, free, done, stages):
        """The ring's next slot, waited for where it was used before."""
        slot = lax.rem(done, jnp.int32(stages))

        @pl.when(done >= stages)
        def _():
            plgpu.barrier_wait(free.at[slot])

        return slot

    def drain(self, free, done, stages):
        """Waits until all slots are free: nobody leaves while others still signal."""
        for back in reversed(range(stages)):

            @pl.when(done > back)
            def _(back=back):
                plgpu.barrier_wait(free.at[lax.rem(done - 1 - back, jnp.int32(stages))])

    # The compute warpgroups.

    def part(self, item, wg):
        """First token and head of a warpgroup's share of an item."""
        return (item.token, item.head + wg) if self.paired else (item.token + wg * ROWS, item.head)

    def compute(self, refs, wg):
        pl.when(wg == 1)(lambda: self.pass_turn(refs, wg))  # warpgroup 0 begins
        nothing = plgpu.layout_cast(jnp.zeros((ROWS, self.config.kv_tile), jnp.float32), plgpu.Layout.WGMMA)
        s = self.first_scores(refs, wg, jnp.int32(0), jnp.int32(0)) if self.ahead else nothing
        self.items(refs, functools.partial(self.attend, refs, wg), (jnp.int32(0), s))
        pl.when(wg == 0)(lambda: self.await_turn(refs, wg))
        plgpu.wait_smem_to_gmem(0)

    def await_turn(self, refs, wg):
        plgpu.barrier_wait(refs.turn.at[wg])

    def pass_turn(self, refs, wg):
        plgpu.barrier_arrive(refs.turn.at[1 - wg])

    @property
    def ahead(self) -> bool:
        """Whether the last product of an item is issued with the first one of the next."""
        return self.config.query_stages > 1

    def buffer(self, i):
        return lax.rem(i, jnp.int32(self.config.query_stages))

    def slot(self, done):
        return lax.rem(done, jnp.int32(self.config.stages))

    def first_scores(self, refs, wg, i, done):
        """Products of an item's queries with its first KV tile, where there is one."""
        there, buffer, slot = self.has_keys(refs, i), self.buffer(i), self.slot(done)

        @pl.when(there)
        def _():
            plgpu.barrier_wait(refs.q_full.at[buffer])
            plgpu.barrier_wait(refs.k_full.at[slot])

        self.await_turn(refs, wg)

        def multiply(ref):
            plgpu.wgmma(ref, refs.q_ring.at[buffer, wg], refs.k_ring.at[slot].T)
            self.pass_turn(refs, wg)
            return ref[...]

        s = pl.run_scoped(multiply, plgpu.ACC((ROWS, self.config.kv_tile), jnp.float32))
        pl.when(there)(lambda: plgpu.barrier_arrive(refs.k_free.at[slot]))
        return s

    def attend(self, refs, wg, i, item, carry):
        """One item, from its first scores to its rows of the output; `done` KV tiles came before it."""
        done, s = carry
        kv, buffer = jnp.int32(self.config.kv_tile), self.buffer(i)
        offset = 0 if self.paired else wg * ROWS
        low, high = jnp.maximum(item.low - offset, 0), jnp.minimum(item.high - offset, ROWS)
        position = item.position + offset
        # KV tiles before `edge` lie on the window's edge, those before `inner` are seen whole.
        edge = item.begin
        if self.sliding_window is not None:
            edge = lax.div(jnp.maximum(position + high - self.sliding_window, 0) + kv - 1, kv)
            edge = jnp.clip(edge, item.begin, item.end)
        inner = jnp.clip(lax.div(position + low + 1, kv), edge, item.end)

        @pl.when(item.begin == item.end)
        def _():
            plgpu.barrier_wait(refs.q_full.at[buffer])

        if not self.ahead:
            s = self.first_scores(refs, wg, i, done)
        step = functools.partial(self.step, refs, wg, i, item, position, done - item.begin)
        row = plgpu.Layout.WGMMA.reduce(1)
        carry = (
            plgpu.layout_cast(jnp.zeros((ROWS, self.head_dim), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((ROWS,), LOW, jnp.float32), row),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row),
            s,
        )
        end = item.end if self.ahead else jnp.maximum(item.end - 1, item.begin)
        edge, inner = jnp.minimum(edge, end), jnp.minimum(inner, end)
        if self.sliding_window is not None:
            carry = lax.fori_loop(item.begin, edge, functools.partial(step, masked=True), carry)
        carry = lax.fori_loop(edge, inner, functools.partial(step, masked=False), carry)
        carry = lax.fori_loop(inner, end, functools.partial(step, masked=True), carry)
        if not self.ahead:
            carry = lax.fori_loop(end, item.end, functools.partial(step, masked=True, last=True), carry)
        acc, top, total, s = carry

        some = total != 0  # NaN stays: a sick row must show
        safe = jnp.where(some, total, 1.0)
        value = (acc * lax.broadcast_in_dim(1.0 / safe, acc.shape, [0])).astype(self.dtype)
        lse = jnp.where(some, top + jnp.log2(safe), -jnp.inf) * (1 / LOG2_E)
        self.write(refs, refs.q_ring.at[buffer, wg], *self.part(item, wg), low, high, value, lse)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(refs.q_free.at[buffer])
        return done + item.end - item.begin, s

    def write(self, refs, stage, token, head, low, high, value, lse):
        """Rows low <= r < high of a tile: by TMA where these are all, else one by one."""
        whole = (low == 0) & (high == ROWS)

        @pl.when(whole)
        def _():
            stage[...] = value
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stage, refs.out.at[pl.ds(_multiple(token, 8), ROWS), head])

        @pl.when(~whole)
        def _():
            store_rows(refs.out, value, token, head, low, high, interpret=self.interpret)

        store_rows(refs.lse, lse, token, head, low, high, interpret=self.interpret)

    def step(self, refs, wg, i, item, position, before, j, carry, *, masked, last=False):
        """One KV tile: the online softmax of its scores, in base 2, then the two products that wait for nobody.

        These are its weights times its values, and the scores of the next tile: of this item or of the next one.
        """
        acc, top, total, s = carry
        slot, next_slot = self.slot(before + j), self.slot(before + j + 1)
        start = j * self.config.kv_tile
        acc, top, total, p = self.softmax(acc, top, total, s, position, start, masked)
        plgpu.barrier_wait(refs.v_full.at[slot])
        if masked:
            self.clear(refs, wg, item, slot, start)

        leaves = j + 1 == item.end
        next_buffer = self.buffer(i + leaves.astype(jnp.int32))
        more = False
        if not last:
            more = ~leaves | self.has_keys(refs, i + 1) if self.ahead else True

        def await_next():
            plgpu.barrier_wait(refs.k_full.at[next_slot])
            pl.when(leaves)(lambda: plgpu.barrier_wait(refs.q_full.at[next_buffer]))

        if not last:
            pl.when(more)(await_next)
        self.await_turn(refs, wg)
        queries, keys, values = refs.q_ring.at[next_buffer, wg], refs.k_ring.at[next_slot], refs.v_ring.at[slot]
        if self.interpret:  # has no operands in registers
            refs.weights[wg] = p
            plgpu.commit_smem()
            p = refs.weights.at[wg]

        def multiply(acc_ref, s_ref):
            if not self.interpret:
                acc_ref[...] = acc
            plgpu.wgmma(acc_ref, p, values)
            if not last:
                plgpu.wgmma(s_ref, queries, keys.T)
            self.pass_turn(refs, wg)
            return acc_ref[...], s_ref[...]

        summed, s = pl.run_scoped(multiply, plgpu.ACC(acc.shape, jnp.float32), plgpu.ACC(s.shape, jnp.float32))
        acc = acc + summed if self.interpret else summed
        plgpu.barrier_arrive(refs.v_free.at[slot])
        if not last:
            pl.when(more)(lambda: plgpu.barrier_arrive(refs.k_free.at[next_slot]))
        return acc, top, total, s

    def softmax(self, acc, top, total, s, position, start, masked):
        factor = self.scale * LOG2_E
        if self.soft_cap is not None:
            s, factor = jnp.tanh(s * (self.scale / self.soft_cap)), self.soft_cap * LOG2_E
        elif self.scale <= 0:  # the largest score is no longer the largest product
            s, factor = s * factor, 1.0
        if masked:
            s = jnp.where(self.seen(s.shape, position, start), s, -jnp.inf)
        new_top = jnp.maximum(top, s.max(axis=1) * factor)
        shrink = jnp.exp2(top - new_top)
        p = jnp.exp2(s * factor - lax.broadcast_in_dim(new_top, s.shape, [0]))
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        total = total * shrink + p.sum(axis=1)
        return lax.optimization_barrier((acc, new_top, total, p.astype(self.dtype)))

    def seen(self, shape, position, start):
        at = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + start
        query = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + position
        seen = at <= query
        return seen if self.sliding_window is None else seen & (at > query - self.sliding_window)

    def clear(self, refs, wg, item, slot, start):
        """Zeroes the values that are nobody's: 0 * NaN is NaN. Warpgroup 0 does it for both, before its turn."""
        kv, values = self.config.kv_tile, refs.v_ring.at[slot]

        @pl.when((wg == 0) & ((start + kv > item.dead_from) | (start < item.dead_to)))
        def _():
            for r in range(0, kv, 64):
                for c in range(0, self.head_dim, 64):
                    part = values.at[pl.ds(r, 64), pl.ds(c, 64)]
                    at = plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=plgpu.Layout.WGMMA) + (start + r)
                    value = plgpu.layout_cast(part[...], plgpu.Layout.WGMMA)
                    live = (at >= item.dead_to) & (at < item.dead_from)
                    part[...] = jnp.where(live, value, jnp.zeros_like(value))
            plgpu.commit_smem()
