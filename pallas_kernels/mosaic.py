"""The Hopper kernels behind one name: what they can do, and which of them a call takes.

max_queries x G <= 64    every row is a tile of the decode kernel
one row                  prefill
otherwise                rows of one query -> decode, all others -> prefill: both run, each on its rows
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels import decode, prefill
from pallas_kernels.config import decode_config, prefill_config, resized
from pallas_kernels.layouts import obstacle


def on_hopper() -> bool:
    """Whether the default device has the matrix instructions that the kernels are made of (compute capability 9)."""
    return jax.default_backend() == "gpu" and str(jax.devices()[0].compute_capability).startswith("9.")


def chosen(implementation: str) -> bool:
    """Whether the small kernels around an attention of this name are to run, where they fit."""
    return implementation.partition("(")[0] in ("auto", "mosaic") and on_hopper()


def paged_attention(q, k_pool, *others, **options) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention`.

    Raises:
      NotImplementedError: no Hopper GPU, or shapes that the kernels are not made for; says which and what to do.
    """
    here = jax.devices()[0].device_kind
    why = obstacle(q, k_pool) if on_hopper() else f"the default device is {here}, not a Hopper GPU"
    if why is not None:
        raise NotImplementedError(f'attention "mosaic": {why}; "xla" and "auto" run.')
    return run(q, k_pool, *others, **options)


def run(
    q,
    k_pool,
    v_pool,
    pages,
    length,
    query_start,
    *,
    max_queries: int | None = None,
    sizes: Mapping[str, int] | None = None,
    **options,
) -> tuple[jax.Array, jax.Array]:
    """The kernels as they are, wherever they are to run; `sizes` replaces some of theirs."""
    group = q.shape[1] // k_pool.shape[1]
    tuned = {}
    if sizes:
        best = decode_config(q.shape[2], pages.shape[0], pages.shape[1] * k_pool.shape[2])
        tuned = {"config": resized(best, sizes)}
    if max_queries is not None and max_queries * group <= decode.ROWS:
        given = tuned | options
        return decode.paged_attention(q, k_pool, v_pool, pages, length, query_start, max_queries=max_queries, **given)
    least = 1 if length.size == 1 else 2  # who feeds a prompt alone feeds one query at its end, if ever
    given = ({"config": resized(prefill_config(q.shape[2]), sizes)} if sizes else {}) | options
    out, lse = prefill.paged_attention(q, k_pool, v_pool, pages, length, query_start, least=least, **given)
    if least == 1:
        return out, lse
    one = jnp.diff(query_start) == 1
    token = jnp.where(one, query_start[:-1], q.shape[0])  # of a row with one query; past the end for the others
    few, few_lse = decode.paged_attention(
        q.at[token].get(mode="fill", fill_value=0),
        k_pool,
        v_pool,
        pages,
        jnp.where(one, length, 0),  # the others see nothing
        jnp.arange(one.size + 1, dtype=jnp.int32),
        max_queries=1,
        **tuned,
        **options,
    )
    return out.at[token].set(few, mode="drop"), lse.at[token].set(few_lse, mode="drop")
