"""The definition of paged attention: gather the pages, mask, softmax, in float32.

    keys[t] = k_pool[pages[row of t]]   [P * S] positions, of which query t sees
              first <= j <= position of t,   first = position - window + 1, or 0

Slow and dense on purpose: this is what the others are measured against.
"""

import jax
import jax.numpy as jnp


def paged_attention(
    q, k_pool, v_pool, pages, length, query_start, *, scale, sliding_window=None, soft_cap=None, max_queries=None
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention`."""
    del max_queries  # nothing here depends on it
    kv_heads, head_dim = k_pool.shape[1], k_pool.shape[3]
    token = jnp.arange(q.shape[0])
    row = jnp.minimum(jnp.sum(token[:, None] >= query_start[1:], axis=1), pages.shape[0] - 1)
    position = length[row] - query_start[row + 1] + token

    def dense(pool):  # [T, P * S, K, D]
        return pool.astype(jnp.float32)[pages[row]].swapaxes(2, 3).reshape(q.shape[0], -1, kv_heads, head_dim)

    keys, values = dense(k_pool), dense(v_pool)
    seen = jnp.arange(keys.shape[1]) <= position[:, None]
    if sliding_window is not None:
        seen &= jnp.arange(keys.shape[1]) > position[:, None] - sliding_window
    seen &= (token < query_start[-1])[:, None]
    values = jnp.where(seen[:, :, None, None], values, 0)

    grouped = q.astype(jnp.float32).reshape(q.shape[0], kv_heads, -1, head_dim)
    precise = jax.lax.Precision.HIGHEST
    score = jnp.einsum("tkgd,tjkd->tkgj", grouped, keys, precision=precise) * scale
    if soft_cap is not None:
        score = soft_cap * jnp.tanh(score / soft_cap)
    score = jnp.where(seen[:, None, None], score, -jnp.inf)
    lse = jax.nn.logsumexp(score, axis=-1)
    weight = jnp.exp(score - jnp.where(jnp.isfinite(lse), lse, 0)[..., None])
    out = jnp.einsum("tkgj,tjkd->tkgd", weight, values, precision=precise)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:2])
