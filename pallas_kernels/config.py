"""What may be tuned by hand in the Hopper kernels, and the measured defaults; the result does not depend on it.

decode    SM = `workers` compute warpgroups, each with a ring of `stages` KV tiles, + one memory warpgroup for all
prefill   SM = 2 compute warpgroups that share a ring of `stages` KV tiles         + one memory warpgroup

In the name of an attention a size of the prefill kernel begins with "prefill_": "mosaic(stages=1, prefill_kv_tile=64)".
"""

import dataclasses
import re
from collections.abc import Mapping

import jax

COMPUTE_REGISTERS, MEMORY_REGISTERS = 208, 40
"""A thread's, of each kind of warpgroup: within the pool a block starts with, or the request waits for ever."""


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Sizes of the decode kernel."""

    kv_tile: int = 64  # keys looked at at once: a multiple of 64, at most 256
    stages: int = 2  # KV tiles in flight a worker
    workers: int = 2  # compute warpgroups an SM, at most 2
    num_sms: int = 132  # persistent blocks, one an SM
    item_tiles: int = 1  # KV tiles that a (query tile, KV head) counts beside its own when work is shared out
    tail_sizes: int = 8  # sizes that a copy at a row's end may have: the fewer, the more dead tokens are read

    def __post_init__(self):
        _check_sizes(self, item_tiles=0)
        if self.workers > 2:
            raise ValueError(f"workers is {self.workers}, must be at most 2.")


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """Sizes of the prefill kernel."""

    kv_tile: int = 128  # keys looked at at once: a multiple of 64, at most 256
    stages: int = 2  # KV tiles in flight
    query_stages: int = 2  # query tiles in flight; results leave through their shared memory
    programs: int | None = 132  # resident programs, one an SM; None: a program an item
    compute_registers: int = 240  # a thread of the compute warpgroups: a multiple of 8

    def __post_init__(self):
        _check_sizes(self)
        if self.compute_registers % 8 or self.memory_registers < 24 or self.compute_registers < 168:
            raise ValueError(f"compute_registers is {self.compute_registers}, must be a multiple of 8 in 168..240.")

    @property
    def memory_registers(self) -> int:
        """What is left: a block starts with 168 a thread, and a request past that pool waits for ever."""
        return 3 * 168 - 2 * self.compute_registers


def _check_sizes(config: KernelConfig | PrefillConfig, **least: int) -> None:
    for name, size in dataclasses.asdict(config).items():
        if size is not None and (type(size) is not int or size < least.get(name, 1)):
            raise ValueError(f"{name} is {size!r}, must be an integer of at least {least.get(name, 1)}.")
    if config.kv_tile % 64 or config.kv_tile > 256:  # the sides of matrix products
        raise ValueError(f"kv_tile is {config.kv_tile}, must be a multiple of 64, at most 256.")


_PREFIX = {KernelConfig: "", PrefillConfig: "prefill_"}

SIZES = tuple(prefix + field.name for kind, prefix in _PREFIX.items() for field in dataclasses.fields(kind))
"""What may be named in an attention's name: `KernelConfig`'s fields, then `PrefillConfig`'s."""


def resized[C: (KernelConfig, PrefillConfig)](config: C, sizes: Mapping[str, int]) -> C:
    """A config with those of the sizes that are its own."""
    prefix = _PREFIX[type(config)]
    named = {field.name: prefix + field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: sizes[size] for name, size in named.items() if size in sizes})


def with_sizes(name: str, **sizes: int) -> str:
    """The name of the kernels with sizes replaced by hand: "mosaic(kv_tile=128, stages=3)".

    Raises:
      ValueError: an implementation without sizes, a size that there is none of, or one that cannot be.
    """
    if name not in ("auto", "mosaic"):
        raise ValueError(f'{next(iter(sizes))} is a size of "mosaic"; attention {name!r} has none.')
    if unknown := sorted(set(sizes) - set(SIZES)):
        raise ValueError(f"unknown sizes {', '.join(unknown)}; mosaic has {', '.join(SIZES)}.")
    for kind in _PREFIX:
        resized(kind(), sizes)
    return f"mosaic({', '.join(f'{size}={value}' for size, value in sizes.items())})"


def without_sizes(name: str) -> tuple[str, dict[str, int]]:
    """Takes apart what `with_sizes` makes: a name, and the sizes that it replaces, which make "auto" mean "mosaic"."""
    base, mark, inside = name.partition("(")
    if not mark:
        return name, {}
    pairs = re.fullmatch(r"\w+=\d+(, ?\w+=\d+)*\)", inside) and re.findall(r"(\w+)=(\d+)", inside)
    if not pairs:
        raise ValueError(f"attention {name!r} must have the form mosaic(kv_tile=128, stages=3).")
    sizes = {size: int(value) for size, value in pairs}
    with_sizes(base, **sizes)
    return "mosaic", sizes


def decode_config(head_dim: int, num_rows: int, max_tokens: int) -> KernelConfig:
    """The measured best for rows of at most `max_tokens`.

    Many rows    two workers an SM hide each other's products; shares are long, and an item's own cost shows.
    Few rows     one worker; a share is a few tiles, and one more is a lot.
    Few keys     short tiles, so that little is in flight: the first comes early, and few are left to multiply last.
    """
    sms, few = multiprocessors(), num_rows <= 16
    shared = KernelConfig(num_sms=sms, item_tiles=0 if few else 1)
    if head_dim > 128:
        return dataclasses.replace(shared, workers=1)
    if not few:
        return shared
    if head_dim == 128 and num_rows * max_tokens <= 1 << 15:
        return dataclasses.replace(shared, workers=1, tail_sizes=1)
    return dataclasses.replace(shared, workers=1, kv_tile=128)


def prefill_config(head_dim: int) -> PrefillConfig:
    """What fits shared memory."""
    sms = multiprocessors()
    return PrefillConfig(programs=sms) if head_dim <= 128 else PrefillConfig(kv_tile=64, query_stages=1, programs=sms)


def multiprocessors() -> int:
    """SMs of the device that programs are compiled for; those of an H100 SXM where there is no GPU."""
    return getattr(jax.devices()[0], "core_count", None) or 132
