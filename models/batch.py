"""The host's side of a batch: what its tokens say, where a stop string ends them, what the run counted.

State (device) --Batch.outputs--> [Output(text, token_ids, finish_reason, logprobs)]     --merge--> Run
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

import paxattn as pax
from models.speculation import rows_of
from models.tokenizer import Tokenizer
from paxattn.serving.service import Service


@dataclasses.dataclass(frozen=True)
class Output:
    """One answer. `token_ids` are the new tokens, the eos token included if produced."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str | None  # None where the model has no tokenizer
    finish_reason: str
    logprobs: list[float]
    sequences: list["Scored"] | None = None  # where several were asked for: all, best first; the first is this one


@dataclasses.dataclass(frozen=True)
class Scored:
    """One of several sequences that answer a prompt. The score: sum of log-probabilities / length ** length_penalty."""

    token_ids: list[int]
    text: str | None
    finish_reason: str
    score: float


@dataclasses.dataclass(frozen=True)
class Run:
    """Answers of a call, in the order of the prompts, and its counters summed over batches."""

    outputs: list[Output]
    stats: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Reads the host's side of a batch in flight: tokens, text, stop strings."""

    tokenizer: Tokenizer | None
    prompts: list[list[int]]  # one a row
    max_new_tokens: int
    stop_strings: tuple[str, ...]
    eos: frozenset[int]
    group: int = 1  # rows a prompt

    def done(self, state: pax.State) -> bool:
        """Whether every row has ended."""
        return not bool(state.running.any())

    def visible(self, ids: Sequence[int]) -> list[int]:
        """Tokens that are text: all but the eos ids."""
        return [token for token in ids if token not in self.eos]

    def stop_rows(self, state: pax.State) -> np.ndarray:
        """Running rows whose text holds a stop string."""
        if not self.stop_strings:
            return np.zeros(len(self.prompts), bool)
        return np.array([self.has_stop(tokens) for tokens in self.new_tokens(state)])

    def outputs(self, state: pax.State) -> list[Output]:
        """The answers so far."""
        reasons = np.asarray(state.finish)
        logprobs = np.asarray(state.logprobs)
        outputs = []
        for row, (prompt, tokens) in enumerate(zip(self.prompts, self.new_tokens(state), strict=True)):
            reason = pax.Finish(int(reasons[row])).label
            outputs.append(self.output(prompt, tokens, logprobs[row, len(prompt) :], reason))
        if self.group == 1:
            return outputs
        scores = [sum(output.logprobs) / max(len(output.logprobs), 1) for output in outputs]
        groups = range(0, len(outputs), self.group)
        return [together(outputs[i : i + self.group], scores[i : i + self.group]) for i in groups]

    def output(self, prompt: list[int], tokens: list[int], logprobs: Iterable[float], reason: str) -> Output:
        """One answer, cut where a stop string ends it."""
        text, stopped, kept = self._cut(tokens)
        reason = pax.Finish.STOP.label if stopped else reason
        return Output(prompt, tokens[:kept], text, reason, [float(p) for p in itertools.islice(logprobs, kept)])

    def has_stop(self, tokens: list[int]) -> bool:
        """Whether the text of an answer holds a stop string."""
        return self._cut(tokens)[1]

    def stats(self, state: pax.State | Service) -> dict[str, Any]:
        """The run's counters, and what a cache without paging would have reserved."""
        table, stats = state.cache.table, state.stats
        # On a mesh each data shard counts: they take their steps side by side, and everything else adds up.
        most = {"steps": np.max, "prefill_steps": np.max}
        counted = {f.name: int(most.get(f.name, np.sum)(getattr(stats, f.name))) for f in dataclasses.fields(stats)}
        widest = max(len(p) for p in self.prompts) + self.max_new_tokens
        guessed = {"speculation": rows_of(state.tally)} if isinstance(state, pax.Speculation) else {}
        if isinstance(state, pax.State) and state.trace is not None:  # a line a step: paxattn.sharing.COLUMNS
            trace = np.asarray(state.trace)  # of each data shard on a mesh
            trace = trace.reshape(-1, *trace.shape[-2:]).sum(axis=0)
            guessed["sharing_steps"] = trace[: counted["steps"]].tolist()
        return {
            **counted,
            **guessed,
            "block_size": table.block_size,
            "num_blocks": table.blocks.refcount.size,
            "tokens_reserved_peak": counted["blocks_peak"] * table.block_size,
            "tokens_reserved_unpaged": len(self.prompts) * widest,
        }

    def new_tokens(self, state: pax.State) -> list[list[int]]:
        """Token ids of the answers so far."""
        tokens, known = np.asarray(state.tokens), np.asarray(state.known)
        return [tokens[row, len(p) : known[row]].tolist() for row, p in enumerate(self.prompts)]

    def _cut(self, tokens: list[int]) -> tuple[str | None, bool, int]:
        """Text before the first stop string, whether there was one, and the tokens up to its end."""
        if (tokenizer := self.tokenizer) is None:
            return None, False, len(tokens)

        def decode(n: int) -> str:
            return tokenizer.decode(self.visible(tokens[:n]))

        def has_stop(n: int) -> bool:
            return any(stop in decode(n) for stop in self.stop_strings)

        text = decode(len(tokens))
        found = [at for at in (text.find(stop) for stop in self.stop_strings) if at >= 0]
        if not found:
            return text, False, len(tokens)
        return text[: min(found)], True, next(n for n in range(1, len(tokens) + 1) if has_stop(n))


def together(outputs: Sequence[Output], scores: Sequence[float]) -> Output:
    """The sequences of one prompt as one answer: the best of them, and all of them best first."""
    order = sorted(range(len(outputs)), key=lambda i: -scores[i])
    ranked = [(outputs[i], scores[i]) for i in order]
    sequences = [Scored(o.token_ids, o.text, o.finish_reason, score) for o, score in ranked]
    return dataclasses.replace(ranked[0][0], sequences=sequences)


def saving(stats: dict) -> float:
    """Part of the blocks that sharing saved, over all steps: blocks saved / blocks without sharing."""
    unshared = stats["block_steps_unshared"]
    return (unshared - stats["block_steps_held"]) / max(unshared, 1)


def bucket(n: int) -> int:
    """The next power of two, 16 at least."""
    return max(16, 1 << (n - 1).bit_length())


def eos_set(eos: int | Sequence[int]) -> frozenset[int]:
    """One or several eos ids as a set."""
    return frozenset([int(eos)] if isinstance(eos, int | np.integer) else map(int, eos))


def merge(total: dict, part: dict) -> dict:
    """Counters of two batches: sums, the larger of what is a size, the rows of both."""
    highest = {"blocks_peak", "block_size", "num_blocks", "tokens_reserved_peak", "tokens_reserved_unpaged"}
    return {
        name: (max if name in highest else lambda a, b: a + b)(total.get(name, type(value)()), value)
        for name, value in part.items()
    }
