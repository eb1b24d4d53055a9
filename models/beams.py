"""Beam search of a batch as the host drives it: what it may be asked for, its steps, its answers.

begin -> branch (the prompts, once each) -> advance, a few steps at a time -> the sequences of each prompt, best first
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

import paxattn as pax
from models.batch import Batch, Output, together
from models.lanes import Lanes, over
from paxattn.decoding import beam
from paxattn.decoding.expand import Search

_branch = jax.jit(beam.branch, static_argnames=("budget", "attention"), donate_argnames="search")
_advance = jax.jit(beam.advance, static_argnames="attention", donate_argnames="search")

GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclasses.dataclass(frozen=True)
class BeamBatch(Batch):
    """A batch whose rows are beams: the answers are its hypotheses, not its rows."""

    search: Search | None = None
    num_return_sequences: int = 1

    def outputs(self, state: pax.State) -> list[Output]:
        """The best sequences that have ended, prompt by prompt."""
        assert self.search is not None
        found = beam.finish(self.search, num_return_sequences=self.num_return_sequences, width=self.max_new_tokens)
        ids, logprobs, scores, lengths, reasons = map(
            np.asarray, (found.token_ids, found.logprobs, found.score, found.length, found.finish_reason)
        )
        answers = []
        for i, prompt in enumerate(self.prompts[:: self.group]):
            places = [j for j, n in enumerate(lengths[i]) if n or not j]  # empty ones are no answer, unless all are
            outputs = [
                self._output(prompt, ids[i, j, : lengths[i, j]], logprobs[i, j, : lengths[i, j]], int(reasons[i, j]))
                for j in places
            ]
            answers.append(together(outputs, scores[i, places].tolist()))
        return answers

    def _output(self, prompt: list[int], ids: np.ndarray, logprobs: np.ndarray, reason: int) -> Output:
        tokens = ids.tolist()
        text = self.tokenizer.decode(self.visible(tokens)) if self.tokenizer else None
        return Output(prompt, tokens, text, pax.Finish(reason).label, logprobs.tolist())


def options(
    num_beams: int,
    num_return_sequences: int,
    length_penalty: float,
    early_stopping: bool | str,
    stop_strings: Sequence[str],
    sampling: dict[str, Any],
) -> dict[str, Any] | None:
    """What `beam.begin` is to be told, None where no beam search is asked for; raises where the options contradict."""
    if num_beams < 1:
        raise ValueError(f"num_beams is {num_beams}, must be at least 1.")
    if num_return_sequences < 1:
        raise ValueError(f"num_return_sequences is {num_return_sequences}, must be at least 1.")
    if num_beams == 1:
        if (length_penalty, early_stopping) != (1.0, False):
            raise ValueError("length_penalty and early_stopping belong to beam search; give num_beams above 1.")
        if num_return_sequences > 1 and not np.any(sampling.get("temperature", 0.0)):
            raise ValueError(
                f"num_return_sequences is {num_return_sequences} at temperature 0, where all answers are the same; "
                "give a temperature above 0, or as many num_beams."
            )
        return None
    if num_return_sequences > num_beams:
        raise ValueError(f"num_return_sequences is {num_return_sequences}, at most num_beams = {num_beams} exist.")
    named = [name for name, value in sampling.items() if value != GREEDY.get(name)]
    named += ["stop_strings"] if stop_strings else []
    if named:
        raise ValueError(f"beam search takes no {', '.join(named)}; leave it out, or leave out num_beams.")
    return {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}


def drive(
    model: pax.Model,
    search: Search,
    batch: Batch,
    num_return_sequences: int,
    budget: int,
    attention: str,
    steps: int | None,
    lanes: Lanes,
) -> Iterator[tuple[pax.State, Batch]]:
    """Runs a search and yields its rows each `steps` steps, with the batch that reads its answers."""
    more = np.int32(2**30 if steps is None else steps)
    known = BeamBatch(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)})
    search = over(_branch, lanes.mesh)(model, search, budget=budget, attention=attention)
    known = dataclasses.replace(known, num_return_sequences=num_return_sequences)
    while True:
        seen = lanes.look(search)
        yield seen.rows, dataclasses.replace(known, search=seen)
        if batch.done(seen.rows):
            return
        search = over(_advance, lanes.mesh)(model, search, steps=more, attention=attention)
