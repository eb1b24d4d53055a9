"""The one operation, and the names of its implementations.

    q [T, H, D] --+
    pools [N, K, S, D] --+--> paged_attention(implementation="auto") --> out [T, H, D], lse [T, H]
    pages [B, P] --------+        |
                                  +-- "reference"  the definition, dense, float32
                                  +-- "xla"        online softmax over pages, any platform
                                  +-- "mosaic"     kernels for Hopper GPUs

An implementation is a function with the signature of `reference.paged_attention`, entered in IMPLEMENTATIONS;
one test suite runs them all. Asked for by name it runs or raises; "auto" takes the fastest one that can.

Reverse-mode gradients under `jit` need "reference": the others loop as often as the lengths ask for.
"""

from collections.abc import Callable

import jax

from pallas_kernels import mosaic, reference, xla
from pallas_kernels.config import without_sizes
from pallas_kernels.layouts import obstacle


class Implementations(dict[str, Callable]):
    """Functions by name. What is compiled knows them by their names: a name's new function empties JAX's caches."""

    def __init__(self, functions: dict[str, Callable]):
        super().__init__(functions)
        self._latest = dict(functions)

    def __setitem__(self, name: str, function: Callable) -> None:
        if self._latest.get(name, function) is not function:
            jax.clear_caches()
        self._latest[name] = function
        super().__setitem__(name, function)


IMPLEMENTATIONS = Implementations(
    {"reference": reference.paged_attention, "xla": xla.paged_attention, "mosaic": mosaic.paged_attention}
)


def paged_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    pages: jax.Array,
    length: jax.Array,
    query_start: jax.Array,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    max_queries: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of packed queries over keys and values reached through a page table.

    Row b's queries are its last query_start[b + 1] - query_start[b] positions, so decode (one query a row),
    verify (k + 1) and prefill (many) are the same call.

    Args:
      q: [T, H, D] packed queries of all rows.
      k_pool: [N, K, S, D] blocks of keys; H is a multiple of K.
      v_pool: [N, K, S, D] blocks of values.
      pages: int32 [B, P] block of each page; unused cells hold any valid id.
      length: int32 [B] tokens that each row holds, the queries' own included.
      query_start: int32 [B + 1] first query of each row; queries past query_start[B] are idle.
      scale: factor on q . k; D ** -0.5 by default.
      sliding_window: a query sees itself and the window - 1 positions before it; all by default.
      soft_cap: scores become soft_cap * tanh(score / soft_cap), before the mask.
      max_queries: queries that a row has at most, where that is known beforehand; a hint for speed alone.
      implementation: "auto" or a key of IMPLEMENTATIONS; "mosaic(kv_tile=128)" replaces sizes, see `config`.

    Returns:
      out [T, H, D] in q's dtype and the log-sum-exp of the scores, float32 [T, H] (natural logarithm). Idle
      queries give 0 and -inf. Slots that no query may see never reach the result, whatever they hold.

    Raises:
      ValueError: shapes that do not fit together, options out of range, or an unknown implementation.
      NotImplementedError: the implementation asked for by name cannot run this.
    """
    _check(q, k_pool, v_pool, pages, length, query_start, sliding_window, soft_cap)
    fits = mosaic.on_hopper() and obstacle(q, k_pool) is None
    base, sizes = without_sizes(implementation)
    name = ("mosaic" if fits else "xla") if implementation == "auto" else base
    if name not in IMPLEMENTATIONS:
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"attention implementation {implementation!r} is unknown; choose one of {known}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[name](
        q,
        k_pool,
        v_pool,
        pages,
        length,
        query_start,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        max_queries=max_queries,
        **({"sizes": sizes} if sizes else {}),
    )


def _check(q, k_pool, v_pool, pages, length, query_start, sliding_window, soft_cap) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"paged_attention: {message}")

    require(q.ndim == 3, f"q has shape {q.shape}, must be [T, H, D].")
    require(k_pool.ndim == 4, f"k_pool has shape {k_pool.shape}, must be [N, K, S, D].")
    require(k_pool.shape == v_pool.shape, f"k_pool {k_pool.shape} and v_pool {v_pool.shape} differ.")
    require(q.shape[2] == k_pool.shape[3], f"head size of q ({q.shape[2]}) and k_pool ({k_pool.shape[3]}) differ.")
    heads, kv_heads = q.shape[1], k_pool.shape[1]
    require(heads % kv_heads == 0, f"{heads} query heads are no multiple of {kv_heads} KV heads.")
    require(pages.ndim == 2, f"pages has shape {pages.shape}, must be [B, P].")
    rows = pages.shape[0]
    require(
        length.shape == (rows,),
        f"length has shape {length.shape}, must be [{rows}] as pages has {rows} rows.",
    )
    require(query_start.shape == (rows + 1,), f"query_start has shape {query_start.shape}, must be [{rows + 1}].")
    require(
        sliding_window is None or sliding_window > 0,
        f"sliding_window is {sliding_window}, must be at least 1.",
    )
    require(soft_cap is None or soft_cap > 0, f"soft_cap is {soft_cap}, must be above 0.")
