"""Eviction by name: "sinks:4,window:64", "window:64".

Whole blocks go: those that hold neither one of the first `sinks` tokens nor one of the last `window`.
"""

import re

import paxattn as pax
from models.config import LlamaConfig
from paxattn.decoding.eviction import SinksAndWindow


def eviction(how: pax.Eviction | str | None, config: LlamaConfig) -> pax.Eviction | None:
    """The eviction that `how` stands for, for a model of this config.

    Raises:
      ValueError: another form, or sinks for a model with a window of its own, which would not see them.
    """
    if not isinstance(how, str):
        if how is not None and isinstance(how.score, SinksAndWindow):
            _require_window_alone(how, how.score.sinks, config)
        return how
    read = re.fullmatch(r"(?:sinks:(\d+),)?window:(\d+)", how)
    if read is None:
        raise ValueError(f"evict is {how!r}; write window:W or sinks:S,window:W, in tokens.")
    sinks, window = int(read[1] or 0), int(read[2])
    if max(sinks, window) >= 2**31:
        raise ValueError(f"evict is {how!r}; its numbers of tokens must be below {2**31}.")
    _require_window_alone(how, sinks, config)
    return pax.sinks_and_window(sinks, window)


def _require_window_alone(how: pax.Eviction | str, sinks: int, config: LlamaConfig) -> None:
    if sinks and config.sliding_window is not None:
        raise ValueError(f"evict is {how!r}, but the model has a window of {config.sliding_window} tokens: no sinks.")
