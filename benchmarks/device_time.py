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
    """Seconds by kernel, the mean of all GPUs, while `run()` ran and until it was done; empty without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = [p for p in jax.profiler.ProfileData.from_file(str(file)).planes if p.name.startswith("/device:GPU")]
        streams = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
        spans = collections.defaultdict(float)
        for stream in streams:
            for event in stream.events:
                spans[event.name] += event.duration_ns / 1e9 / len(planes)
    return dict(spans)
