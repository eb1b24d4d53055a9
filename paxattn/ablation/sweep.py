"""One call, one row of figures for each combination: every option that is a list is swept.

    ablate(model, block_size=[1, 16, 128], rows=8)            a paged run each, tokens compared   ModelRun, kernel sizes
    ablate(config, make=f, num_hidden_layers=[2, 4])          the same, of the model f(config)    the config's as well
    ablate(lengths, block_size=[1, 16, 128], watermark=0.1)   the allocator alone over a trace    PoolRun

    options --product--> cases --measure--> [{"block_size": 1, ..., "wasted": 0.0}, ...] --> FILE.json, FILE.csv

A row holds plain values only, ready for pandas. A file that exists is taken up where it stopped.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from paxattn.ablation import pool, runs
from paxattn.ablation.cases import Case, cases, names
from paxattn.ablation.checks import check_count
from paxattn.ablation.fingerprint import fingerprint
from paxattn.ablation.pool import PoolRun
from paxattn.ablation.runs import ModelRun
from paxattn.ablation.table import Table
from paxattn.decoding.model import Model
from paxattn.decoding.packed import pack

UNOBSERVABLE = {"block_size", "num_blocks", "max_num_batched_tokens", "attention"}
"""Fields of a ModelRun that must not show in its tokens."""


class TokensDifferError(RuntimeError):
    """Combinations that must give the same tokens gave others; the rows say which (`same_tokens`)."""


def ablate(
    subject: Any,
    *,
    make: Callable[[Any], Model] | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
    save: str | Path | None = None,
    exact: bool = True,
    repeats: int = 3,
    query_heads: int | None = None,
    threads: int = 1,
    **options: Any,
) -> list[dict[str, Any]]:
    """Measures every combination of the options; a list, tuple, range or array of values is swept.

    Args:
      subject: a model: the fields to sweep are those of `ModelRun` and sizes of the Hopper kernels; a frozen config,
        with `make`: its own fields too; or lengths of prompts and answers [2, R], which a bare pool serves: those of
        `PoolRun`.
      make: the model of a config. One model at a time is in memory.
      watch: called with each new row.
      save: a .json or .csv file, written after every row. Rows of the same subject and device that it already holds
        are not measured again, but for those without a `kernel_us` that is asked for.
      exact: raises where tokens differ that must not. They may in bfloat16, where two candidates are nearly equal.
      repeats: timed runs of a model; medians are kept.
      query_heads: H of a model, to time the attention kernel alone too.
      threads: that many programs are compiled at once, all of a model's before its first run.
      **options: fields, a value or several. A size of the kernels means attention "mosaic" with that size replaced.

    Returns:
      A row a combination, in the order of the product: its fields, and what was measured.

    Raises:
      ValueError: unknown fields, values that no run can have, combinations that a row could not tell apart, or a file
        of another form; before anything is measured.
      TokensDifferError: see `exact`; the rows are saved before.
    """
    from tqdm.auto import tqdm  # the rest of paxattn does without

    check_count("repeats", repeats)
    check_count("threads", threads)
    if query_heads is not None:
        check_count("query_heads", query_heads)
    todo = _todo(subject, make, options)
    if query_heads is not None and isinstance(todo[0].run, PoolRun):
        raise ValueError(f"query_heads is {query_heads}, but lengths have no attention to time: leave it out.")
    if save is not None and any("<lambda>" in case.asked.values() for case in todo):
        raise ValueError("rows of a file are found by the names of functions, a lambda has none: write it with def.")
    table, known = Table(None if save is None else Path(save)), {}

    def rows() -> list[dict[str, Any]]:
        found = (table.find(known[case.config] | case.asked) for case in todo if case.config in known)
        return compare([row for row in found if row is not None])

    def is_missing(case: Case) -> bool:
        row = table.find(known[case.config] | case.asked)
        return row is None or (query_heads is not None and row.get("kernel_us") is None)

    with tqdm(total=len(todo), desc="ablate", disable=not sys.stderr.isatty()) as bar:
        for config in dict.fromkeys(case.config for case in todo):
            member = subject if make is None else make(config)
            known[config] = {"subject": fingerprint(member, config), "device": jax.devices()[0].device_kind}
            mine = [case for case in todo if case.config == config]
            missing = [case for case in mine if is_missing(case)]
            bar.update(len(mine) - len(missing))
            for case, figures in _measured(member, missing, repeats, query_heads, threads):
                told = known[config] | case.asked
                table.put(told, row := told | figures)
                rows()
                table.write()
                if watch is not None:
                    watch(row)
                bar.update()
            del member  # before the next one is made
    done = rows()
    table.write()
    if exact and (different := [row for row in done if row.get("same_tokens") is False]):
        named = ", ".join(str({name: row[name] for name in sorted(UNOBSERVABLE)}) for row in different)
        raise TokensDifferError(f"{len(different)} of {len(done)} combinations gave other tokens: {named}")
    return done


def _todo(subject, make, options) -> list[Case]:
    """All combinations; lengths fit the pool of each."""
    is_model = make is not None or hasattr(subject, "cache_spec")
    if dataclasses.is_dataclass(subject) and not is_model:
        raise ValueError(f"{type(subject).__name__} is no model: say with make=... what makes one of it.")
    todo = list(cases(ModelRun if is_model else PoolRun, options, None if make is None else subject))
    for case in () if is_model else todo:
        pool.check_lengths(subject, case.run)
    return todo


def _measured(member, todo, repeats, query_heads, threads) -> Iterator[tuple[Case, dict[str, Any]]]:
    if not hasattr(member, "cache_spec"):
        for case in todo:
            yield case, pool.measure(member, case.run)
        return
    prepare = functools.partial(_prepare, pack(member), query_heads)  # a whole model would be walked at each call
    with ThreadPoolExecutor(threads) as workers:
        prepared = list(workers.map(prepare, todo)) if threads > 1 else map(prepare, todo)
    for case, programs in zip(todo, prepared, strict=True):
        yield case, runs.measure(programs, repeats=repeats)


def _prepare(model: Model, query_heads: int | None, case: Case):
    return runs.prepare(model, case.run, query_heads)


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes `same_tokens` into the rows of models: None without tokens to compare, else whether they are the first's.

    Rows of a model are compared where they differ in nothing but UNOBSERVABLE fields. A pool that runs out has no say.
    """
    fields = [name for name in names(ModelRun) if name not in UNOBSERVABLE]
    first: dict[tuple, str] = {}
    for row in (row for row in rows if "tokens_sha256" in row):
        group = row.get("subject"), *(row[name] for name in fields)
        whole = row["status"] == "OK"
        want = first.setdefault(group, row["tokens_sha256"]) if whole else None
        row["same_tokens"] = row["tokens_sha256"] == want and row["repeatable"] if whole else None
    return rows
