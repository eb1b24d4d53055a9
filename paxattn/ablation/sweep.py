"""One call, one row of figures for each combination: every option that is a list is swept.

    ablate(model, block_size=[1, 16, 128], rows=8)            a paged run each, tokens compared       ModelRun
    ablate(lengths, block_size=[1, 16, 128], watermark=0.1)   the allocator alone over a trace        PoolRun

    options --product--> frozen runs --measure--> [{"block_size": 1, ..., "wasted": 0.0}, ...] --> FILE.json, FILE.csv

A row holds plain values only, ready for pandas. A file that exists is taken up where it stopped.
"""

import csv
import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paxattn.ablation import pool, runs
from paxattn.ablation.pool import PoolRun
from paxattn.ablation.runs import ModelRun
from paxattn.decoding.model import Model
from paxattn.typing import Int32

UNOBSERVABLE = {"block_size", "num_blocks", "max_num_batched_tokens", "attention"}
"""Fields of a ModelRun that must not show in its tokens."""


class TokensDifferError(RuntimeError):
    """Combinations that must give the same tokens gave others; the rows say which (`same_tokens`)."""


def ablate(
    subject: Model | Int32[np.ndarray, "2 R"],
    *,
    save: str | Path | None = None,
    exact: bool = True,
    repeats: int = 3,
    query_heads: int | None = None,
    threads: int = 1,
    **options: Any,
) -> list[dict[str, Any]]:
    """Measures every combination of the options; a list, tuple, range or array of values is swept.

    Args:
      subject: a model, whose fields to sweep are those of `ModelRun`, or lengths of prompts and answers [2, R], which
        a bare pool serves: the fields of `PoolRun`.
      save: a .json or .csv file, written after every row. Rows of the same subject and device that it already holds
        are not measured again.
      exact: raises where tokens differ that must not. They may in bfloat16, where two candidates are nearly equal.
      repeats: timed runs of a model; medians are kept.
      query_heads: H of a model, to time the attention kernel alone too.
      threads: that many programs are compiled at once, all before the first run.
      **options: fields, a value or several.

    Returns:
      A row a combination, in the order of the product: its fields, and what was measured.

    Raises:
      ValueError: unknown fields, values that no run can have, or a file of another form.
      TokensDifferError: see `exact`; the rows are saved before.
    """
    from tqdm.auto import tqdm  # the rest of paxattn does without

    is_model = hasattr(subject, "cache_spec")
    todo = list(combinations(ModelRun if is_model else PoolRun, options))
    known = {"subject": fingerprint(subject), "device": jax.devices()[0].device_kind}
    table = Table(None if save is None else Path(save))
    missing = [run for run in todo if table.find(known | label(run)) is None]
    with tqdm(total=len(todo), initial=len(todo) - len(missing), desc="ablate", disable=not sys.stderr.isatty()) as bar:
        for run, figures in _measured(subject, missing, repeats, query_heads, threads):
            table.add(known | label(run) | figures)
            bar.update()
    rows = [row for run in todo if (row := table.find(known | label(run))) is not None]
    if is_model:
        compare(rows)
        table.write()
        different = [row for row in rows if row["same_tokens"] is False]
        if different and exact:
            named = ", ".join(str({name: row[name] for name in sorted(UNOBSERVABLE)}) for row in different)
            raise TokensDifferError(f"{len(different)} of {len(rows)} combinations gave other tokens: {named}")
    return rows


def _measured(subject, todo, repeats, query_heads, threads) -> Iterator[tuple[Any, dict[str, Any]]]:
    if not hasattr(subject, "cache_spec"):
        for run in todo:
            yield run, pool.measure(subject, run)
        return
    with ThreadPoolExecutor(threads) as workers:
        prepared = (runs.prepare(subject, run) for run in todo)
        if threads > 1:
            prepared = list(workers.map(lambda run: runs.prepare(subject, run), todo))
    for run, programs in zip(todo, prepared, strict=True):
        yield run, runs.measure(programs, repeats=repeats, query_heads=query_heads)


def combinations(kind: type, options: dict[str, Any]) -> Iterator[Any]:
    """The frozen runs that these options ask for."""
    fields = [field.name for field in dataclasses.fields(kind)]
    if unknown := sorted(set(options) - set(fields)):
        raise ValueError(f"unknown options {', '.join(unknown)}; {kind.__name__} has {', '.join(fields)}.")
    swept = {name: _values(value) for name, value in options.items()}
    if empty := [name for name, values in swept.items() if not values]:
        raise ValueError(f"{empty[0]} is an empty list; give at least one value.")
    for values in itertools.product(*swept.values()):
        yield kind(**dict(zip(swept, values, strict=True)))


def _values(option: Any) -> list[Any]:
    if isinstance(option, np.ndarray):
        return option.tolist()
    return list(option) if isinstance(option, list | tuple | range) else [option]


def label(run: Any) -> dict[str, Any]:
    """The fields of a run as plain values; a function by its name."""
    values = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    return {name: getattr(value, "__name__", value) for name, value in values.items()}


def fingerprint(subject: Any) -> str:
    """Tells one subject from another: shapes, dtypes and the first numbers of every array."""
    digest = hashlib.sha256(type(subject).__name__.encode())
    for leaf in jax.tree.leaves(subject if hasattr(subject, "cache_spec") else np.asarray(subject)):
        whole = leaf if isinstance(leaf, np.ndarray) else leaf.ravel()[:64]
        digest.update(f"{leaf.shape}{leaf.dtype}".encode() + np.asarray(whole).tobytes())
    return digest.hexdigest()[:16]


def compare(rows: Iterable[dict[str, Any]]) -> None:
    """Writes `same_tokens` into each row: None without tokens to compare, otherwise whether they are the first's.

    Rows are compared where they differ in nothing but UNOBSERVABLE fields. A pool that runs out has no say.
    """
    names = [field.name for field in dataclasses.fields(ModelRun) if field.name not in UNOBSERVABLE]
    first: dict[tuple, str] = {}
    for row in rows:
        group = tuple(row[name] for name in names)
        whole = row["status"] == "OK"
        want = first.setdefault(group, row["tokens_sha256"]) if whole else None
        row["same_tokens"] = row["tokens_sha256"] == want and row["repeatable"] if whole else None


class Table:
    """Rows in memory and, where a path is given, on disk after each one."""

    def __init__(self, path: Path | None):
        if path is not None and path.suffix not in (".json", ".csv"):
            raise ValueError(f"{path}: the name must end in .json or .csv.")
        self.path, self.rows = path, _read(path) if path is not None and path.exists() else []

    def find(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """The row that has these values."""
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        """One more row."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """All rows to disk; a reader sees the old file or the new one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(self.path.name + ".part")
        with scratch.open("w", newline="") as file:
            if self.path.suffix == ".json":
                json.dump(self.rows, file, indent=1)
            else:
                writer = csv.DictWriter(file, list(dict.fromkeys(name for row in self.rows for name in row)))
                writer.writeheader()
                writer.writerows(self.rows)
        os.replace(scratch, self.path)


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        if path.suffix == ".csv":
            return [{name: _parsed(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); move it away to start anew.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no rows of an ablation; give another name.")
    return rows


def _parsed(cell: str) -> Any:
    """A value as `csv` wrote it."""
    if cell in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[cell]
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def swept(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the fields that differ between rows and were asked for, in order."""
    names = {field.name for kind in (ModelRun, PoolRun) for field in dataclasses.fields(kind)}
    return [name for name in rows[0] if name in names and len({row.get(name) for row in rows}) > 1]
