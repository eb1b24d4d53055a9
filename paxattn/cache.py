"""The paged KV cache: a page table, one K and one V pool a layer, and the plan of a step.

    count  [ 1  3  0 ]         one packed token axis, T = budget
    extend  ->  row       0 1 1 1 . .       Plan: where each new token goes and what it may see
                position  6 0 1 2 . .       query_start [0 1 4 4]
                block     1 7 7 7 0 0       idle tokens write to NULL, nobody reads it
                slot      2 0 1 2 . .

All paging of a step happens once, in `extend`; the layers of the network then see arrays and the plan.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import copy_blocks, mosaic
from pallas_kernels.tiles import look_up
from paxattn.blocks import NULL
from paxattn.pages import Copies, PageTable, append, locate
from paxattn.status import Status
from paxattn.typing import Array, Bool, Float, Int32, static, struct


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a model asks of its cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize


@struct
class KV:
    """The pools of one layer: block n, head h is one contiguous [S, D] tile."""

    k: Float[Array, "N K S D"]
    v: Float[Array, "N K S D"]


@struct
class Cache:
    """A page table and the pools it addresses, one array a layer so that each is updated in place."""

    table: PageTable
    layers: tuple[KV, ...]

    @staticmethod
    def create(spec: CacheSpec, *, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int) -> "Cache":
        """An empty cache of num_blocks - 1 usable blocks, the pools zero."""
        table = PageTable.create(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        return Cache(
            table,
            tuple(KV(jnp.zeros(shape, spec.dtype), jnp.zeros(shape, spec.dtype)) for _ in range(spec.num_layers)),
        )

    def _repr_html_(self) -> str | None:
        """A notebook shows the page map of its table."""
        return self.table._repr_html_()


@struct
class Plan:
    """Where the T tokens of a step go and what they may see; made once a step, shared by all layers."""

    row: Int32[Array, "T"]
    position: Int32[Array, "T"]
    block: Int32[Array, "T"]
    slot: Int32[Array, "T"]
    query_start: Int32[Array, "B+1"]
    pages: Int32[Array, "B P"]
    length: Int32[Array, "B"]
    copies: Copies
    attention: str = static(default="auto")
    max_queries: int | None = static(default=None)

    @property
    def live(self) -> Bool[Array, "T"]:
        """Tokens of the axis that belong to a row."""
        return jnp.arange(self.row.shape[0]) < self.query_start[-1]

    @property
    def last(self) -> Int32[Array, "B"]:
        """Index on the token axis of each row's newest token; of some other token for idle rows."""
        return jnp.maximum(self.query_start[1:] - 1, 0)


def extend(
    cache: Cache,
    count: Int32[Array, "B"],
    *,
    budget: int,
    attention: str = "auto",
    max_queries: int | None = None,
    shared: bool = True,
) -> tuple[Cache, Plan, Int32[Array, ""]]:
    """Makes room for `count[b]` tokens a row, copies shared tails, and plans the step.

    Args:
      cache: the cache.
      count: tokens that each row feeds: 0 idle, 1 decoding, more in prefill or when verifying a draft.
      budget: T, the static length of the token axis; the counts may sum to at most this.
      attention: name of the attention implementation, see `pallas_kernels.paged_attention`.
      max_queries: tokens that a row feeds at most, where that is known beforehand: a hint to the attention.
      shared: False promises that no block has two holders, so that nothing can need copying.

    Returns:
      The cache, the plan and a `Status`. Not OK: the same cache, bit for bit, and a plan that is all idle.
    """
    over = jnp.sum(jnp.clip(count, 0, budget + 1)) > budget  # whatever the sum of the counts wraps to
    table, copies, status = append(cache.table, jnp.where(over, 0, count))
    status = jnp.where(over, jnp.int32(Status.OVER_BUDGET), status)
    layers = _copy_blocks(cache.layers, copies, attention) if shared else cache.layers
    plan = _plan(table, jnp.where(status == Status.OK, count, 0), copies, budget)
    plan = dataclasses.replace(plan, attention=attention, max_queries=max_queries)
    if not mosaic.chosen(attention):  # XLA would work it out anew in each layer, in all that it fuses there
        plan = jax.lax.optimization_barrier(plan)
    return Cache(table, layers), plan, status


def _plan(table: PageTable, count: Int32[Array, "B"], copies: Copies, budget: int) -> Plan:
    query_start = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count, dtype=jnp.int32)])
    token = jnp.arange(budget, dtype=jnp.int32)
    live = token < query_start[-1]
    row = jnp.where(live, jnp.sum(token[:, None] >= query_start[1:], axis=1, dtype=jnp.int32), 0)
    position = jnp.where(live, token - query_start[row] + table.length[row] - count[row], -1)
    block, slot = locate(table, row, position)
    return Plan(row, jnp.maximum(position, 0), block, slot, query_start, table.pages, table.length, copies)


def _copy_blocks(layers: tuple[KV, ...], copies: Copies, attention: str) -> tuple[KV, ...]:
    """Applies copy-on-write to all pools; a step without a shared tail touches none of them."""
    pools, structure = jax.tree.flatten(layers)
    if mosaic.chosen(attention) and copy_blocks.fits(pools):
        pools = copy_blocks.copy_blocks(pools, copies.source, copies.target, null=NULL)
        return jax.tree.unflatten(structure, pools)

    def copied(pool):
        target = jnp.where(copies.target == NULL, pool.shape[0] + jnp.arange(copies.target.size), copies.target)
        return _put(pool, target, look_up(pool, copies.source))

    return jax.lax.cond(copies.count > 0, lambda layers: jax.tree.map(copied, layers), lambda layers: layers, layers)


def write(kv: KV, plan: Plan, k: Float[Array, "T K D"], v: Float[Array, "T K D"]) -> KV:
    """Puts the new tokens' keys and values of one layer into their slots, in place under jit."""
    num_blocks = kv.k.shape[0]
    block = jnp.where(plan.live, plan.block, num_blocks + jnp.arange(plan.block.size))

    where = block, slice(None), plan.slot
    return KV(_put(kv.k, where, k.astype(kv.k.dtype)), _put(kv.v, where, v.astype(kv.v.dtype)))


def _put(pool: Array, where: Array | tuple, new: Array) -> Array:
    """The pool with pool[where] = new. What must go nowhere has an id of its own past the last: dropped, yet unique."""
    return pool.at[where].set(new, mode="drop", unique_indices=True, wrap_negative_indices=False)


def view(cache: Cache, layer: int) -> tuple[Float[Array, "B M K D"], Float[Array, "B M K D"]]:
    """The dense K and V that the paging of one layer stands for; zero past each row's end. For tests and eyes."""
    table = cache.table
    held = jnp.arange(table.capacity) < table.length[:, None]

    def dense(pool):
        tokens = pool[table.pages].swapaxes(2, 3)  # [B, P, S, K, D]
        flat = tokens.reshape(table.num_rows, table.capacity, *tokens.shape[3:])
        return jnp.where(held[..., None, None], flat, 0)

    return dense(cache.layers[layer].k), dense(cache.layers[layer].v)
