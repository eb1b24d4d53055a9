"""What may be tuned by hand in the Hopper kernels, and the measured defaults; the result does not depend on it.

decode   SM = `workers` x (compute warpgroup + memory warpgroup), each with a ring of `stages` KV tiles
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Sizes of the decode kernel."""

    kv_tile: int = 64  # keys looked at at once
    stages: int = 2  # KV tiles in flight a worker
    workers: int = 2  # pairs of warpgroups an SM
    num_sms: int = 132  # persistent blocks
    warps: bool = False  # one memory warpgroup, a warp a stream


def decode_config(head_dim: int) -> KernelConfig:
    """The measured best for a head size."""
    return KernelConfig(workers=1) if head_dim > 128 else KernelConfig()
