"""Two GPUs against one of the same machine: decode steps and the serving workload, model=2 and data=2.

psum      the all-reduce of a layer alone, N of them in one program, by XLA's kernel and by NCCL  -> us each
decode    prompts stand in the cache (pages taken, contents zero), then N plain greedy steps   -> ms a step
serving   256 requests, `random.Random(0)`, 100..1024 tokens each way, no end token             -> tokens / s
          512 of them, 256 rows a device at most, on one device and with data=2

All programs of all sides are compiled together, from shapes, before the first array is made. The file keeps XLA_FLAGS:
docs/many-devices.md says which to set.
    python benchmarks/gpu_scaling.py --save            python benchmarks/gpu_scaling.py --tiny
"""

import argparse
import collections
import dataclasses
import functools
import gc
import json
import math
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import programs
import record
from device_time import kernel_seconds
from gpu_serving import BUDGET, EVERYTHING, blocks_for
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled, Lowered

import paxattn as pax
from models.lanes import Lanes
from models.serve_bench import Bench, workload
from models.shapes import CONFIGS

SIDES = {"one": None, "model=2": (1, 2), "data=2": (2, 1)}
GOALS = {("model=2", "decode", 1): 1.6, ("data=2", "serving", 256): 1.95}
METHOD = """
One process, random weights, greedy; one device has its model packed, a mesh as it is. Decode: time of one call of N
steps / N, from a fresh state whose pages are taken and whose cached contents are zero; host clock around a blocking
call; the first run warms, median of the rest. Rows are those of all devices together; data=2 deals them to two shards.
Serving: as in gpu_serving.py, one run after a warm-up of 8 steps; data=2 deals the requests, its rows and blocks are a
shard's. With 256 requests a shard has half the rows, and as many steps that read all weights as one device has; with
512 both have rows enough. psum: the collective of a layer alone: all-reduces of [rows, E] in the model's dtype over
both devices, 16 a turn of a loop, with nothing between them but a product by 1/2; time of the call / their number, and
by the profiler, of one more call, that of the collective's kernels alone. us, kernel_us: by XLA's own kernel, which
takes small ones only; nccl_us, nccl_kernel_us: by NCCL; xla_flags says which of the two a step has. collectives: how
many a decode step has, counted in the compiled text: two all-reduces a layer and the embedding's; the head's is a
gather of 3 numbers a row. kernels_ms, collectives_ms: a step of one more run, under the profiler, what a GPU spends in
kernels and in those of the collectives, which also wait for the other GPU. times: one device's time / this time.
"""
OWN = "xla_gpu_experimental_use_collective_kernels"
WAYS = {"": {OWN: "COLLECTIVE_KERNEL_ALL_REDUCE"}, "nccl_": {OWN: ""}}  # of the compiler, by what their keys begin with
COLLECTIVES = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
COLLECTIVE_KERNELS = "nccl|psum|all_?(reduce|gather)"


def mesh_of(side: str) -> Mesh | None:
    """A mesh of the first two devices; None is one device."""
    shape = SIDES[side]
    return shape and Mesh(np.array(jax.devices()[:2]).reshape(shape), ("data", "model"))


def collectives(program: Compiled) -> dict[str, int]:
    """How many of each kind stand in the program; one in a loop counts once."""
    return dict(collections.Counter(re.findall(COLLECTIVES, program.as_text())))


def kernel_times(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds that a GPU spent in kernels, and in those of the collectives; zeros without one."""
    spans = kernel_seconds(run)
    return sum(spans.values()), sum(spans[name] for name in spans if re.search(COLLECTIVE_KERNELS, name.lower()))


@dataclasses.dataclass(frozen=True)
class Decode:
    """Plain decode steps of `rows` rows that hold `prompt` tokens each; `model` may be shapes until it runs."""

    model: pax.Model
    mesh: Mesh | None
    rows: int
    prompt: int
    new: int
    attention: str

    @property
    def lanes(self) -> Lanes:
        """How the rows lie on the mesh."""
        return Lanes(self.mesh, self.rows)

    @functools.cached_property
    def prompts(self) -> tuple:
        """Ids and lengths, dealt."""
        return self.lanes.deal((jnp.ones((self.rows, self.prompt), jnp.int32), jnp.full(self.rows, self.prompt)))

    def _begin(self, model, ids, length):
        state = pax.start(model, ids, length, max_new_tokens=self.new + 1, max_model_len=self.prompt + self.new + 1)
        table, _, _ = pax.append(state.cache.table, length - 1)
        return dataclasses.replace(state, cache=pax.Cache(table, state.cache.layers))

    def lower_start(self) -> Lowered:
        """(model, *prompts) -> the state before its first step."""
        return jax.jit(self.lanes.spread(self._begin)).lower(self.model, *self.prompts)

    def lower(self) -> Lowered:
        """(model, state) -> the state `new` steps on."""

        def loop(model, state):
            step = functools.partial(pax.step, model, budget=state.known.size, attention=self.attention, max_queries=1)
            more = lambda s: jnp.any(s.running) & (s.stats.steps < self.new) & s.is_plain  # noqa: E731
            return jax.lax.while_loop(more, lambda s: step(s, shared=False, greedy=True), state)

        state = self.lanes.outline(self._begin, self.model, *self.prompts)
        return jax.jit(self.lanes.spread(loop), donate_argnums=1).lower(self.model, state)

    def seconds(self, start: Compiled, program: Compiled, repeats: int) -> list[float]:
        """Of each run but the first."""
        spans = []
        for _ in range(1 + repeats):
            state = jax.block_until_ready(start(self.model, *self.prompts))
            began = time.perf_counter()
            state = jax.block_until_ready(program(self.model, state))
            spans.append(time.perf_counter() - began)
            assert int(jnp.max(state.stats.steps)) == self.new
            del state
        return spans[1:]

    def traced(self, start: Compiled, program: Compiled) -> dict[str, float]:
        """Milliseconds a step that a GPU spends in kernels, and in those of the collectives; zeros without one."""
        state = jax.block_until_ready(start(self.model, *self.prompts))
        total, collectives = kernel_times(lambda: program(self.model, state))
        return {"kernels_ms": 1e3 * total / self.new, "collectives_ms": 1e3 * collectives / self.new}


@dataclasses.dataclass(frozen=True)
class Side:
    """What is measured on one side, and the key of each of its programs: (side, what, which)."""

    name: str
    decodes: list[Decode]
    benches: dict[int, Bench]  # by requests

    @property
    def mesh(self) -> Mesh | None:
        """Of its devices."""
        return mesh_of(self.name)

    def lower(self, options: argparse.Namespace) -> dict[tuple, Callable[[], Lowered]]:
        """How to lower each of its programs."""
        parts = {("serving", requests): bench for requests, bench in self.benches.items()}
        parts |= {("decode", decode.rows): decode for decode in self.decodes}
        maker = functools.partial(programs.lower_maker, CONFIGS[options.shapes], options.dtype, self.mesh)
        lower = {(*what, "run"): part.lower for what, part in parts.items()} | {("model", "run"): maker}
        lower |= {(*what, "start"): part.lower_start for what, part in parts.items()}
        return {(self.name, *key): make for key, make in lower.items()}

    def measure(self, compiled: dict[tuple, Compiled], repeats: int) -> list[dict]:
        """Makes the model and runs everything."""
        model, lines = programs.make(compiled[self.name, "model", "run"], self.mesh), []
        for decode in (dataclasses.replace(decode, model=model) for decode in self.decodes):
            start, program = (compiled[self.name, "decode", decode.rows, which] for which in ("start", "run"))
            ms = record.summary([1e3 * s / decode.new for s in decode.seconds(start, program, repeats)])
            line = {"side": self.name, "what": "decode", "rows": decode.rows, "prompt": decode.prompt}
            line |= {"ms_per_step": ms, "collectives": collectives(program)}
            lines.append(line | decode.traced(start, program))
        for requests, bench in self.benches.items():
            bench = dataclasses.replace(bench, model=model)
            program, opening = (compiled[self.name, "serving", requests, which] for which in ("run", "start"))
            bench.measure([8, 0], program=program, opening=opening)
            figures = bench.figures(*bench.measure([EVERYTHING], program=program, opening=opening))
            del figures["prompt_seconds"], figures["decode_seconds"]  # one call: not told apart
            line = {"side": self.name, "what": "serving", "rows": bench.max_num_seqs}
            lines.append(line | {"max_num_batched_tokens": bench.max_num_batched_tokens} | figures)
        return lines


def side_of(name: str, options: argparse.Namespace) -> Side:
    """A side from the shapes of its model, before there are arrays."""
    mesh, config = mesh_of(name), CONFIGS[options.shapes]
    model = programs.model_shapes(config, options.dtype, mesh)
    sizes = [(rows, prompt) for rows, prompt in options.rows if rows >= Lanes(mesh, 1).shards]
    decodes = [Decode(model, mesh, *size, options.new, options.attention) for size in sizes]
    block = 16 * model.cache_spec.bytes_per_token // (1 if mesh is None else mesh.shape["model"])
    weights, benches = sum(map(held, jax.tree.leaves(model))), {}
    for count in [options.requests] if name == "model=2" else [options.requests, 2 * options.requests]:
        requests = workload(count, options.low, options.high, config.vocab_size)
        rows = min(options.requests, Lanes(mesh, count).hand)
        blocks = blocks_for(weights, rows, options.high, 16, block, 0.8)
        budget = max(BUDGET[options.shapes], rows)
        benches[count] = Bench(model, requests, rows, blocks, 16, budget, options.attention, mesh=mesh)
    return Side(name, decodes, benches)


def held(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of it that a device has."""
    return math.prod(x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def lower_psum(rows: int, width: int, dtype: str, count: int, options: dict | None = None) -> Lowered:
    """(x, half) -> x, all-reduced `count` times. XLA cannot know that both devices have the same `half`."""
    mesh = mesh_of("model=2")

    def many(x, half):
        return jax.lax.fori_loop(0, count, lambda _, x: jax.lax.psum(x * half, "model"), x, unroll=16)

    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((rows, width), P()), ((2, 1), P("model")))
    ]
    run = jax.shard_map(many, mesh=mesh, in_specs=(P(), P("model")), out_specs=P(), check_vma=False)
    return jax.jit(run, compiler_options=options).lower(*shapes)


def psum_alone(program: Compiled, rows: int, width: int, dtype: str, count: int, repeats: int) -> dict:
    """Microseconds of an all-reduce of [rows, width] over both devices: by the clock, and of its kernels alone."""
    given = jnp.ones((rows, width), dtype), jnp.full((2, 1), 0.5, dtype)
    given, spans = jax.device_put(given, program.input_shardings[0]), []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        jax.block_until_ready(program(*given))
        spans.append(1e6 * (time.perf_counter() - began) / count)
    _, kernels = kernel_times(lambda: program(*given))
    return {"us": record.summary(spans[1:]), "kernel_us": 1e6 * kernels / count}


def task(line: dict) -> tuple[str, int]:
    """What was done, and to how many rows or requests."""
    return line["what"], line.get("requests", line["rows"])


def compared(lines: list[dict]) -> list[dict]:
    """Each line with how many times faster than one device it is, and the goal where there is one."""

    def cost(line):
        return line["ms_per_step"]["median"] if line["what"] == "decode" else 1 / line["output_tokens_per_s"]

    timed = [line for line in lines if line["what"] != "psum"]
    base = {task(line): cost(line) for line in timed if line["side"] == "one"}
    for line in timed:
        line["times"] = base[task(line)] / cost(line)
        line["goal"] = GOALS.get((line["side"], *task(line)))
    return lines


def table(lines: list[dict]) -> str:
    """A line each."""
    text = []
    for line in lines:
        name = "{:8} {:8} {:>4}".format(line["side"], *task(line))
        if line["what"] == "psum":
            xla, nccl = ((line[f"{way}us"]["median"], line[f"{way}kernel_us"]) for way in WAYS)
            spent = "{:.1f} us ({:.1f} in kernels)"
            text.append(f"{name} {spent.format(*xla)} for {line['bytes']:,} bytes, {spent.format(*nccl)} by NCCL")
            continue
        value = f"{line['ms_per_step']['median']:10.3f} ms" if line["what"] == "decode" else ""
        value = value or f"{line['output_tokens_per_s']:10,.0f} tokens/s"
        value += f"  {line['times']:.2f}x" + (f" (goal {line['goal']}x)" if line["goal"] else "")
        if reduces := line.get("collectives", {}).get("all-reduce"):
            value += f"  {reduces} all-reduces"
        if kernels := line.get("kernels_ms"):
            value += f"; traced: {kernels:.3f} ms in kernels, {line['collectives_ms']:.3f} of them the collectives'"
        text.append(f"{name} {value}")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shapes", default="8B", choices=CONFIGS)
    add("--requests", type=int, default=256, help="also the rows of a device, at most")
    add("--low", type=int, default=100)
    add("--high", type=int, default=1024)
    add("--new", type=int, default=128, help="decode steps")
    add("--dtype", default="bfloat16")
    add("--attention", default="auto")
    add("--repeats", type=int, default=2)
    add("--json", action="store_true")
    record.add_options(parser, "scaling.json", tiny="a small model and workload on two CPU devices, in seconds")
    options = parser.parse_args()
    options.rows = [(1, 128), (32, 512), (128, 512)]
    if options.tiny:
        jax.config.update("jax_num_cpu_devices", 2)
        options.rows, options.shapes, options.dtype = [(1, 8), (4, 8)], "tiny", "float32"
        options.requests, options.low, options.high, options.new = 8, 5, 20, 8
    if jax.device_count() < 2:
        print(f"two devices are needed; JAX sees {jax.devices()}")
        return
    began, sides = time.perf_counter(), [side_of(name, options) for name in SIDES]
    lower = {key: make for side in sides for key, make in side.lower(options).items()}
    sums = {rows: (rows, CONFIGS[options.shapes].hidden_size, options.dtype) for rows, _ in options.rows}
    lower |= {
        ("psum", rows, way): functools.partial(lower_psum, *size, 8 * options.new, given)
        for rows, size in sums.items()
        for way, given in WAYS.items()
    }
    order = sorted(lower, key=lambda key: ("start" in key, "serving" not in key))  # what takes long goes first
    compiled = programs.side_by_side({key: lower[key] for key in order})
    print(f"{len(compiled)} programs compiled: {time.perf_counter() - began:.0f} s", flush=True)
    lines = []
    for rows, size in sums.items():
        line = {"side": "model=2", "what": "psum", "rows": rows, "bytes": rows * size[1] * jnp.dtype(size[2]).itemsize}
        for way in WAYS:
            done = psum_alone(compiled["psum", rows, way], *size, 8 * options.new, options.repeats)
            line |= {way + key: value for key, value in done.items()}
        lines.append(line)
    for side in sides:
        began = time.perf_counter()
        lines += side.measure(compiled, options.repeats)
        gc.collect()  # the model, before the next is made
        print(f"{side.name}: {time.perf_counter() - began:.0f} s", flush=True)
        if options.save:  # after each side: a run that is cut leaves what it has
            record.write("scaling", compared(lines), method=METHOD, devices=2)
    print(json.dumps(compared(lines), indent=1) if options.json else table(compared(lines)))


if __name__ == "__main__":
    main()
