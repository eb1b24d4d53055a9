"""Two GPUs against one of the same machine: decode steps and the serving workload, model=2 and data=2.

decode    prompts stand in the cache (pages taken, contents zero), then N plain greedy steps   -> ms a step
serving   256 requests, `random.Random(0)`, 100..1024 tokens each way, no end token             -> tokens / s
psum      the all-reduce of a layer alone, N of them in one program                             -> us each

python benchmarks/gpu_scaling.py --save            python benchmarks/gpu_scaling.py --tiny
"""

import argparse
import dataclasses
import functools
import gc
import json
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import record
from gpu_serving import BUDGET, EVERYTHING, blocks_for
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import paxattn as pax
from models.lanes import Lanes
from models.llama import random_llama
from models.serve_bench import Bench, workload
from models.shapes import CONFIGS

SIDES = {"one": None, "model=2": (1, 2), "data=2": (2, 1)}
GOALS = {("model=2", "decode", 1): 1.6, ("data=2", "serving", None): 1.95}
METHOD = """
One process, random weights, greedy. Decode: time of one call of N steps / N, from a fresh state whose pages are taken
and whose cached contents are zero; host clock around a blocking call; the first run warms, median of the rest. Rows are
those of all devices together; data=2 deals them to two shards. Serving: as in gpu_serving.py, one run after a warm-up
of a few steps; data=2 deals the requests, its rows and blocks are a shard's. psum: a loop of all-reduces of [rows, E]
in the model's dtype over both devices, time of the call / their number. times: one device's time / this time.
"""


def mesh_of(side: str) -> Mesh | None:
    """A mesh of the first two devices; None is one device."""
    shape = SIDES[side]
    return shape and Mesh(np.array(jax.devices()[:2]).reshape(shape), ("data", "model"))


@dataclasses.dataclass(frozen=True)
class Decode:
    """Plain decode steps of `rows` rows that hold `prompt` tokens each."""

    model: pax.Model
    mesh: Mesh | None
    rows: int
    prompt: int
    new: int
    attention: str

    def start(self):
        """The state before its first step."""
        length = jnp.full(self.rows, self.prompt)
        ids = jnp.ones((self.rows, self.prompt), jnp.int32)
        return jax.block_until_ready(
            self._spread(self._begin)(self.model, *Lanes(self.mesh, self.rows).deal((ids, length)))
        )

    def _spread(self, f):
        return jax.jit(f) if self.mesh is None else pax.spread(f, self.mesh)

    def _begin(self, model, ids, length):
        state = pax.start(model, ids, length, max_new_tokens=self.new + 1, max_model_len=self.prompt + self.new + 1)
        table, _, _ = pax.append(state.cache.table, length - 1)
        return dataclasses.replace(state, cache=pax.Cache(table, state.cache.layers))

    def lowered(self):
        """(model, state) -> the state `new` steps on."""

        def loop(model, state):
            step = functools.partial(pax.step, model, budget=state.known.size, attention=self.attention)
            more = lambda s: jnp.any(s.running) & (s.stats.steps < self.new) & s.is_plain  # noqa: E731
            return jax.lax.while_loop(more, lambda s: step(s, shared=False, greedy=True), state)

        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.start())
        return jax.jit(self._spread(loop), donate_argnums=1).lower(self.model, shapes)

    def seconds(self, program, repeats: int) -> list[float]:
        """Of each run but the first."""
        spans = []
        for _ in range(1 + repeats):
            state = self.start()
            began = time.perf_counter()
            state = jax.block_until_ready(program(self.model, state))
            spans.append(time.perf_counter() - began)
            assert int(jnp.max(state.stats.steps)) == self.new
            del state
        return spans[1:]


def measure(side: str, options: argparse.Namespace) -> list[dict]:
    """One side: makes the model, compiles everything in parallel, runs it."""
    mesh, config = mesh_of(side), CONFIGS[options.shapes]
    make = jax.jit(lambda key: random_llama(config, key, options.dtype))
    key = jax.random.key(0)
    model = jax.block_until_ready(make(key) if mesh is None else random_llama(config, key, options.dtype, mesh))
    shards = Lanes(mesh, 1).shards
    sizes = [(rows, prompt) for rows, prompt in options.rows if rows >= shards]
    decodes = [Decode(model, mesh, *size, options.new, options.attention) for size in sizes]
    lowered = [decode.lowered() for decode in decodes]
    requests = workload(options.requests, options.low, options.high, config.vocab_size)
    rows = Lanes(mesh, options.requests).hand
    block = 16 * model.cache_spec.bytes_per_token // (1 if mesh is None else mesh.shape["model"])
    weights = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(model))
    blocks = blocks_for(weights, rows, options.high, 16, block, 0.8)
    budget = max(BUDGET[options.shapes], rows)
    bench = Bench(model, requests, rows, blocks, 16, budget, options.attention, mesh=mesh)
    with ThreadPoolExecutor() as pool:
        compiling = [pool.submit(program.compile) for program in lowered]
        serving = bench.program
        programs = [future.result() for future in compiling]
    lines = []
    for decode, program in zip(decodes, programs, strict=True):
        spans = record.summary([1e3 * s / options.new for s in decode.seconds(program, options.repeats)])
        lines.append(
            {"side": side, "what": "decode", "rows": decode.rows, "prompt": decode.prompt, "ms_per_step": spans}
        )
    del programs, serving
    service, _ = bench.measure([8, 0])
    del service
    service, spans = bench.measure([EVERYTHING])
    figures = bench.figures(service, spans)
    lines.append({"side": side, "what": "serving", "rows": None, "max_num_batched_tokens": budget, **figures})
    del service, bench, decodes, model
    gc.collect()
    return lines


def psum_alone(rows: int, width: int, dtype: str, count: int, repeats: int) -> dict:
    """Microseconds of an all-reduce of [rows, width] over both devices, in a loop in one program."""
    mesh = mesh_of("model=2")

    def many(x):
        return jax.lax.fori_loop(0, count, lambda _, x: jax.lax.psum(x, "model") * 0.5, x)

    program = jax.jit(jax.shard_map(many, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    x, spans = jnp.ones((rows, width), dtype), []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        jax.block_until_ready(program(x))
        spans.append(1e6 * (time.perf_counter() - began) / count)
    return {"side": "model=2", "what": "psum", "rows": rows, "bytes": x.nbytes, "us": record.summary(spans[1:])}


def compared(lines: list[dict]) -> list[dict]:
    """Each line with how many times faster than one device it is, and the goal where there is one."""

    def cost(line):
        return line["ms_per_step"]["median"] if line["what"] == "decode" else 1 / line["output_tokens_per_s"]

    timed = [line for line in lines if line["what"] != "psum"]
    base = {(line["what"], line["rows"]): cost(line) for line in timed if line["side"] == "one"}
    for line in timed:
        line["times"] = base[line["what"], line["rows"]] / cost(line)
        line["goal"] = GOALS.get((line["side"], line["what"], line["rows"]))
    return lines


def table(lines: list[dict]) -> str:
    """A line each."""
    text = []
    for line in lines:
        name = f"{line['side']:8} {line['what']:8} {line['rows'] or '':>4}"
        if line["what"] == "psum":
            text.append(f"{name} {line['us']['median']:10.1f} us for {line['bytes']:,} bytes")
            continue
        value = f"{line['ms_per_step']['median']:10.3f} ms" if line["what"] == "decode" else ""
        value = value or f"{line['output_tokens_per_s']:10,.0f} tokens/s"
        text.append(f"{name} {value}  {line['times']:.2f}x" + (f" (goal {line['goal']}x)" if line["goal"] else ""))
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shapes", default="8B", choices=CONFIGS)
    add("--requests", type=int, default=256, help="also the rows")
    add("--low", type=int, default=100)
    add("--high", type=int, default=1024)
    add("--new", type=int, default=128, help="decode steps")
    add("--dtype", default="bfloat16")
    add("--attention", default="auto")
    add("--repeats", type=int, default=3)
    add("--tiny", action="store_true", help="a small model and workload on two CPU devices, in seconds")
    add("--json", action="store_true")
    add("--save", action="store_true", help="write results/h100x2/scaling.json (or the folder of another device)")
    options = parser.parse_args()
    options.rows = [(1, 128), (32, 512), (128, 512)]
    if options.tiny:
        jax.config.update("jax_num_cpu_devices", 2)
        options.rows, options.shapes, options.dtype = [(1, 8), (4, 8)], "tiny", "float32"
        options.requests, options.low, options.high, options.new = 8, 5, 20, 8
    if jax.device_count() < 2:
        print(f"two devices are needed; JAX sees {jax.devices()}")
        return
    lines, width = [], CONFIGS[options.shapes].hidden_size
    for side in SIDES:
        began = time.perf_counter()
        lines += measure(side, options)
        print(f"{side}: {time.perf_counter() - began:.0f} s", flush=True)
    lines += [psum_alone(rows, width, options.dtype, 8 * options.new, options.repeats) for rows, _ in options.rows]
    print(json.dumps(compared(lines), indent=1) if options.json else table(compared(lines)))
    if options.save:
        folder = "h100x2" if "H100" in jax.devices()[0].device_kind else None
        print(record.write("scaling", lines, method=METHOD, folder=folder))


if __name__ == "__main__":
    main()
