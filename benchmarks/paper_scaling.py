"""What a decode step costs each GPU for 70B on 8 and 405B on 16, read off the compiled program of one device.

    abstract shapes -> shard_map over M devices -> compile -> cost_analysis, memory_analysis     nothing is allocated

Models of two and of three layers are compiled; the difference is a layer, and the rest is added up. A CPU compiles it:
what counts are the operands of each device, which do not depend on the platform. By hand stands what they should be.

    python benchmarks/paper_scaling.py --save
"""

import argparse
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import record
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import paxattn as pax
from models import sharding
from models.config import LlamaConfig
from models.llama import Llama

READ, FLOPS, LINK = (
    3.1e12,
    7.1e14,
    3.5e11,
)  # an H100: bytes read, bf16 operations, all-reduce bytes over NVLink, a second
LATENCY = 15e-6
"""Seconds of a small all-reduce over 8 or 16 GPUs: an assumption, not measured here."""

LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
LLAMA3 |= {"max_position_embeddings": 8192, "num_hidden_layers": 2}
CASES = {  # name: (config, layers, devices)
    "70B": (LlamaConfig(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, **LLAMA3), 80, 8),
    "405B": (LlamaConfig(hidden_size=16384, intermediate_size=53248, num_attention_heads=128, **LLAMA3), 126, 16),
}
METHOD = """
One greedy decode step of all rows, bf16, lowered from abstract arrays under shard_map over the model axis and compiled
for CPU devices. argument_bytes: memory_analysis of one device (weights and pools). flops: cost_analysis of one device.
all_reduces: counted in the compiled text. Layers by difference of models of 3 and 2 layers. Times are bytes / 3.1 TB/s,
flops / 710 TFLOP/s, all-reduces at 15 us + bytes / 350 GB/s: assumed, not measured.
"""


def compiled(config: LlamaConfig, devices: int, rows: int, context: int):
    """The decode step of one device."""
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, devices), ("data", "model"))
    config = sharding.fit(config, devices)
    model = jax.eval_shape(lambda: Llama(config, lambda name, shape: jnp.zeros(shape, "bfloat16")))
    ids, length = jnp.ones((1, rows, 1), jnp.int32), jnp.ones((1, rows), jnp.int32)

    def begin(model, ids, length):
        return pax.start(model, ids, length, max_new_tokens=context - 1)

    def step(model, state):
        return pax.step(model, state, budget=rows, shared=False, greedy=True, max_queries=1)

    def at(spec, x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    model = jax.tree.map(at, model.specs("model", devices), model)
    state = jax.eval_shape(pax.spread(begin, mesh), model, ids, length)
    state = jax.tree.map(lambda x: at(P("data", None, "model") if x.ndim == 5 else P("data"), x), state)
    return jax.jit(pax.spread(step, mesh), donate_argnums=1).lower(model, state).compile()


def measure(name: str, rows: int, context: int) -> dict:
    """One case: read off, and by hand."""
    config, layers, devices = CASES[name]

    def facts(layers):
        program = compiled(dataclasses.replace(config, num_hidden_layers=layers), devices, rows, context)
        reduced = len(re.findall(r" all-reduce(?:-start)?\(", program.as_text()))
        return np.array([program.memory_analysis().argument_size_in_bytes, program.cost_analysis()["flops"], reduced])

    two, three = facts(2), facts(3)
    size, flops, reduces = (float(x) for x in two + (layers - 2) * (three - two))
    whole = dataclasses.replace(config, num_hidden_layers=layers)
    kv = 2 * layers * max(config.num_key_value_heads, devices) * config.head_dim * 2 * rows * context / devices
    message = rows * config.hidden_size * 2
    times = {
        "bytes_ms": 1e3 * size / READ,
        "flops_ms": 1e3 * flops / FLOPS,
        "all_reduce_ms": 1e3 * reduces * (LATENCY + message / LINK),
    }
    return {
        "model": name, "devices": devices, "rows": rows, "context": context, "argument_bytes": size, "flops": flops,
        "all_reduces": reduces, "all_reduce_message_bytes": message,
        "by_hand": {"argument_bytes": 2 * whole.num_parameters / devices + kv, "all_reduces": 2 * layers + 1,
                    "flops": 2 * rows * (whole.num_parameters - config.vocab_size * config.hidden_size) / devices},
        **times, "bound_by": max(times, key=lambda name: times[name]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--context", type=int, default=2048)
    record.add_options(parser, "paper_scaling.json")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 16)
    lines = [measure(name, rows, options.context) for name in CASES for rows in options.rows]
    for line in lines:
        print(
            f"{line['model']:>5} on {line['devices']:2}, {line['rows']:3} rows x {line['context']}: "
            f"{line['argument_bytes'] / 1e9:6.1f} GB a GPU (by hand {line['by_hand']['argument_bytes'] / 1e9:.1f}), "
            f"{line['flops'] / 1e9:9.1f} GFLOP (by hand {line['by_hand']['flops'] / 1e9:.1f}), "
            f"{line['all_reduces']:.0f} all-reduces (by hand {line['by_hand']['all_reduces']}); "
            f"ms: bytes {line['bytes_ms']:.2f}, flops {line['flops_ms']:.2f}, all-reduces {line['all_reduce_ms']:.2f}"
        )
    if options.save:
        print(record.write("paper_scaling", lines, method=METHOD))


if __name__ == "__main__":
    main()
