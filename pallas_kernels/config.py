"""What may be tuned by hand in the decode kernel, and the measured defaults; the result does not depend on it.

SM = `workers` compute warpgroups, each with a ring of `stages` KV tiles, + one memory warpgroup for all
"""

import dataclasses
import re

COMPUTE_REGISTERS, MEMORY_REGISTERS = 208, 40
"""A thread's, of each kind of warpgroup: within the pool a block starts with, or the request waits for ever."""


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Sizes of the decode kernel."""

    kv_tile: int = 64  # keys looked at at once
    stages: int = 2  # KV tiles in flight a worker
    workers: int = 2  # compute warpgroups an SM, at most 2
    num_sms: int = 132  # persistent blocks

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} is {size!r}, must be an integer of at least 1.")
        if self.kv_tile % 16 or self.workers > 2:
            raise ValueError(
                f"kv_tile is {self.kv_tile} and workers {self.workers}; they must be a multiple of 16 and at most 2."
            )


def with_sizes(name: str, **sizes: int) -> str:
    """The name of the kernels with sizes replaced by hand: "mosaic(kv_tile=128, stages=3)".

    Raises:
      ValueError: an implementation without sizes, a size that there is none of, or one that cannot be.
    """
    if name not in ("auto", "mosaic"):
        raise ValueError(f'{next(iter(sizes))} is a size of "mosaic"; attention {name!r} has none.')
    known = [field.name for field in dataclasses.fields(KernelConfig)]
    if unknown := sorted(set(sizes) - set(known)):
        raise ValueError(f"unknown sizes {', '.join(unknown)}; KernelConfig has {', '.join(known)}.")
    KernelConfig(**sizes)
    return f"mosaic({', '.join(f'{size}={value}' for size, value in sizes.items())})"


def without_sizes(name: str) -> tuple[str, dict[str, int]]:
    """Takes apart what `with_sizes` makes: a name, and the sizes that it replaces."""
    base, mark, inside = name.partition("(")
    if not mark:
        return name, {}
    pairs = re.fullmatch(r"\w+=\d+(, ?\w+=\d+)*\)", inside) and re.findall(r"(\w+)=(\d+)", inside)
    if not pairs:
        raise ValueError(f"attention {name!r} must have the form mosaic(kv_tile=128, stages=3).")
    sizes = {size: int(value) for size, value in pairs}
    with_sizes(base, **sizes)
    return base, sizes


def decode_config(head_dim: int, num_rows: int) -> KernelConfig:
    """The measured best: few rows want long tiles and few workers, as each tile is a round trip to memory."""
    if head_dim > 128:
        return KernelConfig(workers=1)
    return KernelConfig(kv_tile=128, workers=1) if num_rows <= 16 else KernelConfig()
