"""One layer's attention through the page table: write the new tokens, then look at all of them.

q, k, v of T tokens --write--> pools --paged_attention(pages)--> out of T tokens
"""

from pallas_kernels import paged_attention
from paxattn.cache import KV, Plan, write
from paxattn.typing import Array, Float


def attend(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    kv: KV,
    plan: Plan,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "T H D"], KV]:
    """Causal attention of a step's tokens over everything their rows hold, themselves included.

    Args:
      q: queries on the packed token axis, rotary embedding applied.
      k: keys of the same tokens, rotary embedding applied.
      v: values of the same tokens.
      kv: the layer's pools.
      plan: the step's plan; its `attention` names the implementation.
      scale: factor on q . k, D ** -0.5 by default.
      sliding_window: a token sees itself and the window - 1 tokens before it.
      soft_cap: scores become soft_cap * tanh(score / soft_cap).

    Returns:
      The attention output (0 for idle tokens) and the pools with the new tokens in them.
    """
    kv = write(kv, plan, k, v)
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
