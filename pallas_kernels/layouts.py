"""What the Hopper kernels have layouts for: head sizes, dtypes, block sizes and groups, as shapes alone say."""

from pallas_kernels.decode_walk import ROWS

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
    if heads // kv_heads > ROWS:
        return f"{heads // kv_heads} query heads share a KV head, at most {ROWS} may"
    return None


def require_layouts(q, k_pool) -> None:
    """Raises NotImplementedError where there is an `obstacle`."""
    if why := obstacle(q, k_pool):
        raise NotImplementedError(f"paged_attention for Hopper: {why}.")
