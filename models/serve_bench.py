"""`paxattn serve-bench`: a serving workload on this machine, as a table or as JSON.

    requests  random.Random(seed): prompt lengths, then answer lengths, each uniform in low..high
    model     random weights of a named shape, or a checkpoint
    run       pax.serve's loop in chunks, so that a bar can move; a chunk is timed as a whole

By default it is the workload whose vLLM figures stand in docs/log.md: 256 requests at once, 100..1024 tokens each
way, no end token, 256 rows at most. On a mesh the requests are dealt to the data shards like cards.
"""

import argparse
import dataclasses
import functools
import json
import random
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

import paxattn as pax
from models import hosts
from models.arguments import add_dtype, int32, int64
from models.lanes import Lanes
from models.llama import random_llama
from models.load import load
from models.shapes import CONFIGS
from paxattn.serving.loop import check_requests, mixed_budget, most, open_service, run
from paxattn.serving.queue import put

SHAPES = "135M"
"""Of random weights, by default."""


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = sub.add_argument
    add("--shapes", choices=CONFIGS, help=f"random weights of these shapes (default {SHAPES})")
    add("--model", metavar="SRC", help="a checkpoint instead of random weights")
    add_dtype(sub)
    add("--requests", type=int32, default=256, metavar="R")
    add("--low", type=int32, default=100, metavar="N", help="shortest prompt and answer")
    add("--high", type=int32, default=1024, metavar="N", help="longest prompt and answer")
    add("--seed", type=int64, default=0, help="of lengths and prompts")
    add("--max-num-seqs", type=int32, default=256, metavar="B", help="rows at most")
    add("--num-blocks", type=int32, metavar="N", help="blocks in the pool (default: enough for all rows)")
    add("--block-size", type=int32, default=16, metavar="S", help="tokens a block of the cache")
    add("--max-num-batched-tokens", type=int32, default=2048, metavar="T", help="tokens a step feeds at most")
    add("--steps", type=int32, default=32, metavar="K", help="steps a chunk")
    add("--attention", default="auto", metavar="NAME", help="implementation of paged attention")
    add("--mesh", metavar="data=D,model=M", help="all devices; rows, blocks and token axis are those of a data shard")


def workload(requests: int, low: int, high: int, vocab_size: int, seed: int = 0) -> pax.Requests:
    """Prompts of random ids; lengths of prompts, then of answers, uniform in low..high."""
    if requests < 1 or not 1 <= low <= high:
        raise ValueError(f"{requests} requests of {low}..{high} tokens: at least 1 request, and 1 <= low <= high.")
    draw = random.Random(seed)
    prompt, new = (np.array([draw.randint(low, high) for _ in range(requests)], np.int32) for _ in range(2))
    ids = np.random.default_rng(seed).integers(0, vocab_size, (requests, high), dtype=np.int32)
    return pax.Requests.create(ids, prompt, max_new_tokens=new)


@dataclasses.dataclass(frozen=True)
class Bench:
    """One workload on one model, compiled once; `measure` may be called again and again."""

    model: pax.Model
    requests: pax.Requests
    max_num_seqs: int
    num_blocks: int
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    attention: str = "auto"
    trace: int = 0
    mesh: jax.sharding.Mesh | None = None  # rows, blocks and the token axis are then those of a data shard

    @property
    def max_model_len(self) -> int:
        """Tokens that the largest request holds."""
        return int(np.max(np.asarray(self.requests.prompt_length) + np.asarray(self.requests.max_new_tokens)))

    @property
    def lanes(self) -> Lanes:
        """How the requests lie on the mesh."""
        return Lanes(self.mesh, self.requests.prompt_length.size)

    def check(self) -> None:
        """Raises ValueError for a workload that can never be served."""
        sizes = {"max_model_len": self.max_model_len, "block_size": self.block_size, "num_blocks": self.num_blocks}
        check_requests(self.model, self.requests, **sizes)

    def start(self, program: jax.stages.Compiled | None = None):
        """The service before its first step, all requests in the queue; `program` is what `lower_start` gave."""
        begin = program or jax.jit(self.lanes.spread(self._begin))
        return jax.block_until_ready(begin(self.model, self.lanes.deal(self.requests)))

    def _begin(self, model, requests):
        names = ("num_blocks", "block_size", "max_num_seqs", "trace", "max_model_len")
        line = jnp.arange(requests.prompt_length.size, dtype=jnp.int32)
        service = open_service(model, lines=line.size, **{name: getattr(self, name) for name in names})
        return dataclasses.replace(service, queue=put(service.queue, requests, line, line, most(service)))

    def lower_start(self) -> jax.stages.Lowered:
        """(model, requests) -> service; `model` may be shapes alone."""
        return jax.jit(self.lanes.spread(self._begin)).lower(self.model, self.lanes.deal(self.requests))

    def lower(self) -> jax.stages.Lowered:
        """(model, service, steps) -> service; `model` may be shapes alone."""
        budget = mixed_budget(self.max_num_batched_tokens, self.max_num_seqs)

        def advance(model, service, steps):
            return run(model, service, budget=budget, policy=pax.Policy(), steps=steps, attention=self.attention)

        service = self.lanes.outline(self._begin, self.model, self.lanes.deal(self.requests))
        return jax.jit(self.lanes.spread(advance), donate_argnums=1).lower(self.model, service, jnp.int32(1))

    @functools.cached_property
    def program(self) -> jax.stages.Compiled:
        """What `lower` gives, compiled."""
        return self.lower().compile()

    def measure(self, steps, watch=lambda service, seconds: None, program=None, opening=None):
        """Serves everything.

        Args:
          steps: steps of each call of the program, an iterable; the last ones may find nothing to do.
          watch: called with the service after each call, and the seconds so far.
          program: what `lower` gave, where it was compiled elsewhere.
          opening: what `lower_start` gave, likewise.

        Returns:
          The service at the end, and for each call its seconds and the steps that fed prompts.
        """
        self.check()
        program, service, spans = program or self.program, self.start(opening), []
        for more in steps:
            before = _most(service.stats.prefill_steps)
            started = time.perf_counter()
            service = jax.block_until_ready(program(self.model, service, jnp.int32(more)))
            spans.append((time.perf_counter() - started, _most(service.stats.prefill_steps) - before))
            watch(service, sum(seconds for seconds, _ in spans))
            if not service.queue.unfinished.any():
                break
        return service, spans

    def figures(self, service, spans) -> dict:
        """What a run took; a call that fed prompts in any of its steps counts as prompt time."""
        seconds = sum(span for span, _ in spans)
        tokens = int(jnp.sum(service.queue.known - service.queue.prompt_length))
        return {
            "output_tokens_per_s": tokens / seconds,
            "seconds": seconds,
            "prompt_seconds": sum((span for span, prompts in spans if prompts), 0.0),
            "decode_seconds": sum((span for span, prompts in spans if not prompts), 0.0),
            "steps": _most(service.stats.steps),
            "prefill_steps": _most(service.stats.prefill_steps),
            "requests": self.requests.prompt_length.size,
            "prompt_tokens": int(jnp.sum(service.queue.prompt_length)),
            "output_tokens": tokens,
            "preemptions": int(jnp.sum(service.queue.preemptions)),
            "peak_blocks": _most(service.stats.blocks_peak),
            "num_blocks": self.num_blocks,
        }


def _most(count) -> int:
    """Of one device, or of the data shard that counted most."""
    return int(jnp.max(count))


def main(options: argparse.Namespace) -> int:
    """Runs the command."""
    for name, least in (("steps", 1), ("max_num_seqs", 1), ("block_size", 1), ("num_blocks", 2), ("seed", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            raise ValueError(f"{name} is {value}, must be at least {least}.")
    if options.shapes and options.model:
        raise ValueError(f"--shapes {options.shapes} and --model {options.model} are two models; leave one out.")
    name = options.model or options.shapes or SHAPES
    mesh = hosts.open_mesh(options)
    if options.model:
        model = load(options.model, dtype=options.dtype, mesh=mesh).model
    else:
        model = random_llama(CONFIGS[name], jax.random.key(0), options.dtype, mesh)
    requests = workload(options.requests, options.low, options.high, model.vocab_size, options.seed)
    rows = min(options.max_num_seqs, Lanes(mesh, options.requests).hand)
    blocks = options.num_blocks
    if blocks is None:
        blocks = 1 + rows * -(-2 * options.high // options.block_size)
    sizes = rows, blocks, options.block_size, options.max_num_batched_tokens, options.attention
    bench = Bench(model, requests, *sizes, mesh=mesh)
    with tqdm(total=int(requests.max_new_tokens.sum()), unit="token", disable=not sys.stderr.isatty()) as bar:

        def watch(service, seconds):
            done = int(jnp.sum(service.queue.known - service.queue.prompt_length))
            used = float(jnp.mean(service.cache.table.blocks.refcount > 0))
            bar.set_postfix_str(f"{done / seconds:,.0f} tokens/s, {used:.0%} of the blocks", refresh=False)
            bar.update(done - bar.n)

        service, spans = bench.measure(iter(lambda: options.steps, None), watch)
    facts = {"model": name, "device": jax.devices()[0].device_kind}
    facts |= {} if mesh is None else {"mesh": dict(mesh.shape)}
    facts |= {"max_num_seqs": rows, "block_size": options.block_size, **bench.figures(service, spans)}
    if options.json:
        print(json.dumps(facts))
        return 0
    for name, value in facts.items():
        print(f"{name:22} {value:,.1f}" if isinstance(value, float) else f"{name:22} {value}")
    return 0
