"""`paxattn ablate`: what does paging cost here, and what does it save? A table, JSON, a file, a plot.

    --block-size 1,16,128                  runs of a model: waste, table, kernel, tokens/s, compile time, memory
    --block-size 1,16,128 --lengths FILE   a bare pool over lengths: waste, requests at once, preemptions
    --set watermark=0.01,0.1               any other field of `ModelRun` or `PoolRun`, or a size of the kernels
    --shapes tiny --set head_dim=16,32     random weights: any field of `LlamaConfig` too

Commas separate values; several of them are swept, every combination of all options is a row.
"""

import argparse
import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import paxattn as pax
from models.config import LlamaConfig
from models.hub import DEFAULT_MODEL
from models.llama import random_llama
from models.load import load
from models.shapes import CONFIGS
from paxattn.ablation.cases import cases, swept
from paxattn.ablation.checks import check_count
from paxattn.ablation.plot import check as check_plot
from paxattn.ablation.plot import plot
from paxattn.ablation.pool import PoolRun
from paxattn.ablation.runs import ModelRun
from paxattn.ablation.table import Table
from paxattn.serving.policy import first_come, highest_priority, shortest_prompt
from paxattn.simulate import MEAN_LENGTHS

BLOCK_SIZES = "1,8,16,32,64,128,256"
OF_MODEL = ("model", "shapes", "dtype", "rows", "context", "max_new_tokens", "kernel", "repeats")
ORDERS = {order.__name__: order for order in (first_come, shortest_prompt, highest_priority)}
SHOWN = ("wasted", "saving", "requests_at_once", "preemptions", "table_bytes", "peak_bytes", "kernel_us", "compile_s",
         "prefill_tokens_per_s", "decode_tokens_per_s", "same_tokens")  # fmt: skip


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Options of the command. Defaults stand where they are used, so that what was given is known."""
    add = sub.add_argument
    add("--block-size", metavar="S,S", help=f"tokens a block of the cache (default {BLOCK_SIZES})")
    add("--lengths", metavar="NAME", help=f"simulate a pool: {', '.join(MEAN_LENGTHS)}, or a file of lines 'in,out'")
    add("--requests", type=int, metavar="R", help="lengths drawn (default 1000)")
    add("--model", metavar="SRC", help=f"checkpoint to run (default {DEFAULT_MODEL})")
    add("--shapes", choices=CONFIGS, help="random weights of these shapes instead")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and cache (default float32)")
    add("--rows", metavar="B,B", help="prompts in a batch (default 4)")
    add("--context", metavar="N,N", help="tokens of each prompt (default 128)")
    add("--max-new-tokens", metavar="N,N", help="tokens of each answer (default 32)")
    add("--kernel", metavar="NAME,NAME", help="implementations of paged attention: auto, xla, reference, mosaic")
    add("--set", action="append", default=[], metavar="FIELD=V,V", help="any other field; repeatable")
    add("--repeats", type=int, metavar="N", help="timed runs; medians are kept (default 3)")
    add("--save", metavar="FILE", help=".json or .csv, taken up where it stopped")
    add("--plot", metavar="FILE", help=".svg, .png or .pdf (needs matplotlib)")


def main(options: argparse.Namespace) -> int:
    """Runs the command: refuses what cannot be, then loads, then measures; the table comes before the plot."""
    _check(options)
    fields, config = _fields(options), CONFIGS[options.shapes] if options.shapes else None
    todo = list(cases(ModelRun if options.lengths is None else PoolRun, fields, config))
    if options.save:
        Table(Path(options.save))
    if options.plot:
        check_plot([case.asked for case in todo], options.plot)
    if options.lengths is None:
        subject, make, config = read_model(options)
        heads = None if "num_attention_heads" in fields else config.num_attention_heads
        fields |= {"make": make, "repeats": options.repeats or 3, "query_heads": heads, "exact": False}
    else:
        subject = read_lengths(options.lengths, options.requests or 1000)
    rows = pax.ablate(subject, save=options.save, **fields)
    print(json.dumps(rows) if options.json else table(rows))
    if options.plot:
        plot(rows, options.plot)
    different = sum(row.get("same_tokens") is False for row in rows)
    if different:
        raise RuntimeError(f"{different} of {len(rows)} combinations gave other tokens than the first of their kind.")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuses options that contradict each other."""
    for name in ("requests", "repeats"):
        if (count := getattr(options, name)) is not None:
            check_count(f"--{name}", count)
    given = [f"--{name.replace('_', '-')}" for name in OF_MODEL if getattr(options, name) is not None]
    if options.lengths is not None and given:
        raise ValueError(f"{', '.join(given)} is of a model, and --lengths runs none; leave out one or the other.")
    if options.requests is not None and options.lengths not in MEAN_LENGTHS:
        raise ValueError(f"--requests says how many lengths to draw; give --lengths {' or '.join(MEAN_LENGTHS)}.")
    if options.shapes and options.model is not None:
        raise ValueError("--shapes runs random weights, --model a checkpoint; give one of them.")


def _fields(options: argparse.Namespace) -> dict[str, Any]:
    """Names of fields and their values, each name once; `cases` knows which there are."""
    asked = {"block_size": options.block_size, "rows": options.rows, "context": options.context}
    asked |= {"max_new_tokens": options.max_new_tokens, "attention": options.kernel}
    asked = {name: text for name, text in asked.items() if text is not None}
    for pair in options.set:
        name, mark, text = pair.partition("=")
        name = name.replace("-", "_")
        if not mark:
            raise ValueError(f"--set {pair!r} must be FIELD=V or FIELD=V,V.")
        if name in asked:
            raise ValueError(f"{name} is given twice; separate its values by commas.")
        if name in ("rope", "eos_token_id"):
            raise ValueError(f"--set {name}: values of several parts need Python; see pax.ablate.")
        asked[name] = text
    return {name: values(text) for name, text in ({"block_size": BLOCK_SIZES} | asked).items()}


def read_model(options: argparse.Namespace) -> tuple[Any, Callable[[LlamaConfig], pax.Model] | None, LlamaConfig]:
    """What is swept, what makes a model of it, and the config: random weights of named shapes, or a checkpoint."""
    dtype = options.dtype or "float32"
    if options.shapes:
        config = CONFIGS[options.shapes]
        return config, lambda config: random_llama(config, jax.random.key(0), dtype), config
    model = load(options.model or DEFAULT_MODEL, dtype=dtype).model
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
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{name}: each line must be two whole numbers, in,out ({error}).") from error
    for length in itertools.chain(*pairs):
        check_count(f"{name}: a length", length)
    return np.array(pairs, np.int32).reshape(-1, 2).T


def table(rows: list[dict[str, Any]]) -> str:
    """The fields that were swept and what was measured, a line a combination."""
    names = [*(swept(rows) or ["block_size"]), *(name for name in SHOWN if any(name in row for row in rows))]
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
