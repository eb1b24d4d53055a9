"""What is asked: options, each a value or several, become cases, each a run of one setting.

rows=8, block_size=[1, 16]     ModelRun or PoolRun: what is done
kv_tile=[64, 128]              SIZES of the Hopper kernels, which become part of the attention's name
num_hidden_layers=[2, 4]       the model's own config, where models are made from one
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.config import SIZES, with_sizes
from paxattn.ablation.pool import PoolRun
from paxattn.ablation.runs import ModelRun


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination."""

    run: Any  # a ModelRun or a PoolRun
    config: Any  # of the model; None where that is given, or where there is none
    asked: dict[str, Any]  # what a row says of it: plain values


def cases(kind: type[ModelRun] | type[PoolRun], options: dict[str, Any], config: Any = None) -> Iterator[Case]:
    """Every combination of these options, in the order of their product.

    Raises:
      ValueError: unknown options, values that no run can have, or two combinations that a row could not tell apart.
    """
    of_run, of_kernel, of_model = names(kind), SIZES if kind is ModelRun else (), names(config)
    known = {kind.__name__: of_run, "mosaic": of_kernel, type(config).__name__: of_model}
    if unknown := sorted(set(options) - {*of_run, *of_kernel, *of_model}):
        has = "; ".join(f"{owner} has {', '.join(fields)}" for owner, fields in known.items() if fields)
        raise ValueError(f"unknown options {', '.join(unknown)}; {has}.")
    swept = {name: _values(value) for name, value in options.items()}
    if empty := [name for name, values in swept.items() if not values]:
        raise ValueError(f"{empty[0]} is an empty list; give at least one value.")
    labels = set()
    for values in itertools.product(*swept.values()):
        given = dict(zip(swept, values, strict=True))
        run: Any = kind(**{name: value for name, value in given.items() if name in of_run})
        sizes = {name: value for name, value in given.items() if name in of_kernel}
        if sizes:
            run = dataclasses.replace(run, attention=with_sizes(run.attention, **sizes))
        fields = {name: value for name, value in given.items() if name in of_model}
        member = dataclasses.replace(config, **fields) if of_model else None
        asked = {name: _plain(value) for name, value in (fields | sizes).items()} | label(run)
        if (told := tuple(asked.items())) in labels:
            same = ", ".join(f"{name}={asked[name]}" for name in options)
            raise ValueError(
                f"two combinations are both called {same}: give each value once, and functions names of their own "
                "(write them with def, not lambda)."
            )
        labels.add(told)
        yield Case(run, member, asked)


def names(config: Any) -> list[str]:
    """The fields of a frozen config, or of a class of them; none of None."""
    return [] if config is None else [field.name for field in dataclasses.fields(config)]


def label(run: Any) -> dict[str, Any]:
    """The fields of a run as plain values."""
    return {name: _plain(getattr(run, name)) for name in names(run)}


def swept(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the fields that differ between rows and were asked for, in order; sizes speak for the attention's."""
    asked, fields = list(rows[0]), {*names(ModelRun), *names(PoolRun)}
    asked = asked[: 1 + max((at for at, name in enumerate(asked) if name in fields), default=-1)]
    different = [name for name in asked if len({row.get(name) for row in rows}) > 1]
    told = {"subject", "device"} | ({"attention"} if set(different) & set(SIZES) else set())
    return [name for name in different if name not in told]


def _values(option: Any) -> list[Any]:
    option = _unboxed(option)
    return [_unboxed(value) for value in option] if isinstance(option, list | tuple | range) else [option]


def _unboxed(value: Any) -> Any:
    """Of NumPy's and JAX's numbers and arrays plain ones."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | jax.Array) else value


def _plain(value: Any) -> Any:
    """A function by its name, anything else that JSON has no form for as text."""
    value = _unboxed(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__name__", str(value))
