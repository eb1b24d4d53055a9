"""Speculation by name, and what it did in numbers.

"ngram"        looks the text up in itself         "self:8"   the first 8 layers of the model draft
"draft:SRC"    a checkpoint of the same vocabulary drafts; SRC as in `models.load`
"""

from typing import TYPE_CHECKING

import numpy as np

import paxattn as pax

if TYPE_CHECKING:
    from models.lm import LM


def drafter(name: str, lm: "LM", *, attention: str = "auto") -> pax.Drafter:
    """The drafter that `name` stands for, made for `lm`."""
    kind, _, what = name.partition(":")
    if kind == "ngram" and not what:
        return pax.NGram()
    if kind == "self" and what.isdecimal():
        return pax.DraftModel(lm.model.first(int(what)), attention)
    if kind == "draft" and what:
        from models.load import load

        draft = load(what, dtype=lm.model.cache_spec.dtype, mesh=lm.mesh)
        ours, its = lm.tokenizer, draft.tokenizer
        if ours is not None and its is not None and ours.hf.get_vocab() != its.hf.get_vocab():
            raise ValueError(f"{what} has another vocabulary than {lm.name}, so it cannot draft for it.")
        return pax.DraftModel(draft.model, attention)
    raise ValueError(f"speculate is {name!r}; choose ngram, self:M (layers) or draft:SRC (a checkpoint).")


def rows_of(tally: pax.Tally) -> list[dict[str, int]]:
    """The counters of each row."""
    names, columns = zip(*vars(tally).items(), strict=True)
    return [dict(zip(names, map(int, row), strict=True)) for row in zip(*map(np.asarray, columns), strict=True)]


def report(rows: list[dict[str, int]]) -> dict:
    """Rows and their total, each with the tokens that came out of a verify step."""

    def rated(counts: dict[str, int]) -> dict[str, int | float]:
        return {**counts, "tokens_per_step": counts["tokens"] / max(counts["steps"], 1)}

    total = {name: sum(row[name] for row in rows) for name in rows[0]}
    return {**rated(total), "rows": [rated(row) for row in rows]}
