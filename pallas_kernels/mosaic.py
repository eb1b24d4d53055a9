"""The Hopper kernels behind one name: what they can do, and which of them a call takes.

T // B queries a row on average:   up to 64 rows of a matrix product -> decode      more -> prefill
"""

import jax

from pallas_kernels import decode

HEAD_DIMS = (64, 128, 256)
DTYPES = ("bfloat16", "float16")


def obstacle(q, k_pool) -> str | None:
    """Why these arrays cannot be served here, or None. Only shapes and dtypes are looked at."""
    (_, heads, head_dim), (_, kv_heads, block_size, _) = q.shape, k_pool.shape
    if head_dim not in HEAD_DIMS:
        return f"head size is {head_dim}, must be one of {', '.join(map(str, HEAD_DIMS))}"
    if q.dtype != k_pool.dtype or q.dtype.name not in DTYPES:
        return f"dtypes of q and pools are {q.dtype} and {k_pool.dtype}, must both be bfloat16 or both float16"
    if block_size % 8:
        return f"block_size is {block_size}, must be a multiple of 8"
    if heads // kv_heads > decode.ROWS:
        return f"{heads // kv_heads} query heads share a KV head, at most {decode.ROWS} may"
    return None


def on_hopper() -> bool:
    """Whether the default device has the matrix instructions that the kernels are made of (compute capability 9)."""
    return jax.default_backend() == "gpu" and str(jax.devices()[0].compute_capability).startswith("9.")


def paged_attention(q, k_pool, v_pool, pages, length, query_start, **options) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention`.

    Raises:
      NotImplementedError: no Hopper GPU, or shapes that the kernels are not made for; says which and what to do.
    """
    why = (
        obstacle(q, k_pool)
        if on_hopper()
        else f"the default device is {jax.devices()[0].device_kind}, not a Hopper GPU"
    )
    if why is not None:
        raise NotImplementedError(f'attention "mosaic": {why}; "xla" and "auto" run.')
    return decode.paged_attention(q, k_pool, v_pool, pages, length, query_start, **options)
