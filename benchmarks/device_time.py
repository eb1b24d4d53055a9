"""What GPUs did while a function ran, by JAX's own profiler: how long each kernel took, by name.

    trace -> a plane a GPU -> a line a stream -> events, one a kernel       CUDA graphs are taken apart

Streams are added up: kernels that ran at the same time count twice.
"""

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax


def kernel_seconds(run: Callable[[], object]) -> dict[str, float]:
    """Seconds by kernel, the mean of the GPUs that worked, until `run()` was done; empty without one."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = [p for p in jax.profiler.ProfileData.from_file(str(file)).planes if p.name.startswith("/device:GPU")]
        streams = [[line for line in plane.lines if line.name.startswith("Stream")] for plane in planes]
        events = [[(e.name, e.duration_ns / 1e9) for line in lines for e in line.events] for lines in streams]
    return mean_by_name(events)


def mean_by_name(gpus: list[list[tuple[str, float]]]) -> dict[str, float]:
    """Sums of (name, seconds) by name, a GPU's: the mean of those that have any."""
    spans, busy = collections.defaultdict(float), [events for events in gpus if events]
    for name, seconds in (event for events in busy for event in events):
        spans[name] += seconds / len(busy)
    return dict(spans)
