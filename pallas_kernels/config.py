"""What may be tuned by hand in the decode kernel, and the measured defaults; the result does not depend on it.

SM = `workers` compute warpgroups, each with a ring of `stages` KV tiles, + one memory warpgroup for all
"""

import dataclasses

COMPUTE_REGISTERS, MEMORY_REGISTERS = 208, 40
"""A thread's, of each kind of warpgroup: within the pool a block starts with, or the request waits for ever."""


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Sizes of the decode kernel."""

    kv_tile: int = 64  # keys looked at at once
    stages: int = 2  # KV tiles in flight a worker
    workers: int = 2  # compute warpgroups an SM, at most 2
    num_sms: int = 132  # persistent blocks


def decode_config(head_dim: int, num_rows: int) -> KernelConfig:
    """The measured best: few rows want long tiles and few workers, as each tile is a round trip to memory."""
    if head_dim > 128:
        return KernelConfig(workers=1)
    return KernelConfig(kv_tile=128, workers=1) if num_rows <= 16 else KernelConfig()
