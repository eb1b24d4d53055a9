"""One layer's attention through the page table: write the new tokens, then look at all of them.

q, k, v of T tokens --rope, write--> pools --paged_attention(pages)--> out of T tokens
"""

from pallas_kernels import mosaic, paged_attention, rope
from paxattn.cache import KV, Plan, write
from paxattn.typing import Array, Float


def attend(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    kv: KV,
    plan: Plan,
    *,
    angles: tuple[Float[Array, "T 1 D//2"], Float[Array, "T 1 D//2"]] | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "T H D"], KV]:
    """Causal attention of a step's tokens over everything their rows hold, themselves included.

    Args:
      q: queries on the packed token axis.
      k: keys of the same tokens.
      v: values of the same tokens.
      kv: the layer's pools.
      plan: the step's plan; its `attention` names the implementation.
      angles: cosine and sine of the rotary embedding to apply to q and k; None where they have it, or none is wanted.
      scale: factor on q . k, D ** -0.5 by default.
      sliding_window: a token sees itself and the window - 1 tokens before it.
      soft_cap: scores become soft_cap * tanh(score / soft_cap).

    Returns:
      The attention output (0 for idle tokens) and the pools with the new tokens in them.
    """
    q, kv = _placed(q, k, v, kv, plan, angles)
    out, _ = paged_attention(
        q,
        kv.k,
        kv.v,
        plan.pages,
        plan.length,
        plan.query_start,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        max_queries=plan.max_queries,
        implementation=plan.attention,
    )
    return out, kv


def _placed(q, k, v, kv, plan, angles):
    """The queries, turned, and the pools with the new tokens in them."""
    if angles is None:
        return q, write(kv, plan, k, v)
    if mosaic.chosen(plan.attention) and rope.fits(q, kv.k):
        q, *pools = rope.turn_and_write(q, k, v, angles, kv.k, kv.v, plan.block, plan.slot, plan.query_start)
        return q, KV(*pools)
    return rope.apply_rope(q, angles), write(kv, plan, rope.apply_rope(k, angles), v)
