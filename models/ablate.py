"""`paxattn ablate`: what does paging cost here, and what does it save? A table, JSON, a file, a plot.

    --block-size 1,16,128                  runs of a model: waste, table, kernel, tokens/s, compile time, memory
    --block-size 1,16,128 --lengths FILE   a bare pool over lengths: waste, requests at once, preemptions
    --set watermark=0.01,0.1               any other field of `ModelRun` or `PoolRun`, or a size of the kernels
    --shapes tiny --set head_dim=16,32     random weights: any field of `LlamaConfig` too

Commas separate values; several of them are swept, every combination of all options is a row.
"""

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import paxattn as pax
from models.config import LlamaConfig
from models.llama import random_llama
from models.load import load
from models.shapes import CONFIGS
from paxattn.ablation.cases import swept
from paxattn.ablation.plot import plot
from paxattn.serving.policy import first_come, highest_priority, shortest_prompt
from paxattn.simulate import MEAN_LENGTHS

ORDERS = {order.__name__: order for order in (first_come, shortest_prompt, highest_priority)}
SHOWN = ("wasted", "saving", "requests_at_once", "preemptions", "table_bytes", "peak_bytes", "kernel_us", "compile_s",
         "prefill_tokens_per_s", "decode_tokens_per_s", "same_tokens")  # fmt: skip


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = sub.add_argument
    add("--block-size", default="1,8,16,32,64,128,256", metavar="S,S", help="tokens a block of the cache")
    add("--lengths", metavar="NAME", help=f"simulate a pool: {', '.join(MEAN_LENGTHS)}, or a file of lines 'in,out'")
    add("--requests", type=int, default=1000, metavar="R", help="lengths drawn")
    add("--model", metavar="SRC", default="smollm2-135m", help="checkpoint to run")
    add("--shapes", choices=CONFIGS, help="random weights of these shapes instead")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights and cache")
    add("--rows", metavar="B,B", help="prompts in a batch (default 4)")
    add("--context", metavar="N,N", help="tokens of each prompt (default 128)")
    add("--max-new-tokens", metavar="N,N", help="tokens of each answer (default 32)")
    add("--kernel", metavar="NAME,NAME", help="implementations of paged attention: auto, xla, reference, mosaic")
    add("--set", action="append", default=[], metavar="FIELD=V,V", help="any other field; repeatable")
    add("--repeats", type=int, default=3, metavar="N", help="timed runs; medians are kept")
    add("--save", metavar="FILE", help=".json or .csv, taken up where it stopped")
    add("--plot", metavar="FILE", help=".svg, .png or .pdf (needs matplotlib)")


def main(options: argparse.Namespace) -> int:
    """Runs the command."""
    fields: dict[str, Any] = {"block_size": values(options.block_size)}
    asked = {"rows": options.rows, "context": options.context, "max_new_tokens": options.max_new_tokens}
    asked["attention"] = options.kernel
    for pair in options.set:
        name, mark, text = pair.partition("=")
        if not mark:
            raise ValueError(f"--set {pair!r} must be FIELD=V or FIELD=V,V.")
        asked[name.replace("-", "_")] = text
    fields |= {name: values(text) for name, text in asked.items() if text is not None}
    if options.lengths is None:
        subject, make, config = read_model(options)
        heads = None if "num_attention_heads" in fields else config.num_attention_heads
        fields |= {"make": make, "repeats": options.repeats, "query_heads": heads, "exact": False}
    else:
        subject = read_lengths(options.lengths, options.requests)
    rows = pax.ablate(subject, save=options.save, **fields)
    if options.plot:
        plot(rows, options.plot)
    print(json.dumps(rows) if options.json else table(rows))
    different = sum(row.get("same_tokens") is False for row in rows)
    if different:
        raise RuntimeError(f"{different} of {len(rows)} combinations gave other tokens than the first of their kind.")
    return 0


def read_model(options: argparse.Namespace) -> tuple[Any, Callable[[LlamaConfig], pax.Model] | None, LlamaConfig]:
    """What is swept, what makes a model of it, and the config: random weights of named shapes, or a checkpoint."""
    if options.shapes:
        config = CONFIGS[options.shapes]
        return config, lambda config: random_llama(config, jax.random.key(0), options.dtype), config
    model = load(options.model, dtype=options.dtype).model
    return model, None, model.config


def values(text: str) -> list[Any]:
    """What stands between commas: numbers, names of orders, None, text."""
    return [_value(word.strip()) for word in text.split(",")]


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except json.JSONDecodeError:
        return None if word == "None" else ORDERS.get(word, word)


def read_lengths(name: str, requests: int) -> np.ndarray:
    """Prompt and answer lengths [2, R]: a named draw, or a file with a line 'in,out' a request."""
    if name in MEAN_LENGTHS:
        return pax.draw_lengths(name, requests)
    if not Path(name).exists():
        raise ValueError(f"--lengths {name}: neither a file nor one of {', '.join(MEAN_LENGTHS)}.")
    with Path(name).open(newline="") as file:
        try:
            pairs = [(int(prompt), int(answer)) for prompt, answer in csv.reader(file)]
        except ValueError as error:
            raise ValueError(f"{name}: each line must be two whole numbers, in,out ({error}).") from error
    return np.array(pairs, np.int32).reshape(-1, 2).T


def table(rows: list[dict[str, Any]]) -> str:
    """The fields that were swept and what was measured, a line a combination."""
    names = [*(swept(rows) or ["block_size"]), *(name for name in SHOWN if any(name in row for row in rows))]
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
