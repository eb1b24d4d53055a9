"""A thin host object over the same loop, run in chunks of k steps: submit, cancel, stream, metrics.

    submit ──> backlog ──> line of the queue ──chunk of k steps on the device──> tokens ──> callbacks, streams
    cancel ──────────────────┘ (both wait for the next chunk; neither touches the device)

The device decides who is served, in every step; the host only writes requests into free lines and reads what is
new. `submit` and `cancel` may be called from callbacks, other threads and coroutines while a chunk runs: a chunk has
one lock, what they note has another, which nobody holds for long.
"""

import asyncio
import collections
import contextlib
import dataclasses
import inspect
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from paxattn.decoding.eviction import Eviction
from paxattn.decoding.generate import MAX_NUM_BATCHED_TOKENS
from paxattn.decoding.model import Model
from paxattn.decoding.sampling import Sampling
from paxattn.decoding.step import Finish
from paxattn.mesh import DATA
from paxattn.serving.chunk import News, programs
from paxattn.serving.loop import at_least_one, check_asked, mixed_budget
from paxattn.serving.policy import Policy

LATEST = 1024
"""Answers whose times an engine remembers."""

_SAMPLING = inspect.signature(Sampling.create)


@dataclasses.dataclass(eq=False)
class Answer:
    """A request as its owner sees it; it grows while the engine runs. Times are seconds of the engine's clock."""

    prompt_ids: list[int]
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None  # None until it has ended
    submitted: float = dataclasses.field(default_factory=time.perf_counter)
    first_token: float | None = None
    ended: float | None = None


class Engine:
    """Serves requests that come and go.

    Args:
      model: see `paxattn.decoding.model.Model`.
      max_num_seqs: rows: requests in flight at once, at most.
      max_model_len: tokens that a request can hold, prompt and answer.
      num_blocks: blocks in the pool, NULL included; enough for all rows by default.
      block_size: tokens a block holds.
      max_num_batched_tokens: tokens that a step feeds at most; at least max_num_seqs.
      max_num_requests: lines of the device's queue, from which the policy chooses; twice the rows by default. Further
        requests wait in a backlog on the host, in the order in which they came.
      steps: steps a chunk: the host sees new tokens, and the device new requests, that often.
      policy: who goes first; first come, first served by default.
      eos_token_id: none, one or several ids that end a request.
      seed: of requests that bring no key; the i-th one submitted samples with fold_in(key(seed), i); 32 bits count.
      attention: implementation of paged attention, by name.
      mesh: the devices that the model lies on, see `paxattn.on_mesh`; requests go to its data shards in turn, and the
        sizes are those of one shard. Of several processes each must make the same calls.
      evict: gives blocks back while rows live, as in `serve`.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_num_seqs: int,
        max_model_len: int,
        num_blocks: int | None = None,
        block_size: int = 16,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
        max_num_requests: int | None = None,
        steps: int = 8,
        policy: Policy | None = None,
        eos_token_id: int | Sequence[int] = (),
        seed: int = 0,
        attention: str = "auto",
        mesh: Mesh | None = None,
        evict: Eviction | None = None,
    ):
        shards = 1 if mesh is None else mesh.shape[DATA]
        lines = 2 * max_num_seqs if max_num_requests is None else max_num_requests
        at_least_one(max_num_seqs=max_num_seqs, max_num_requests=lines, max_model_len=max_model_len)
        at_least_one(block_size=block_size, steps=steps)
        budget = mixed_budget(max_num_batched_tokens, max_num_seqs)
        if num_blocks is None:
            num_blocks = 1 + max_num_seqs * -(-max_model_len // block_size)
        self._programs = programs(mesh)
        self.service = self._programs.open(
            model,
            lines=lines,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            num_blocks=num_blocks,
            block_size=block_size,
            eos_token_id=eos_token_id,
        )
        self._model = model
        self._policy, self._evict = Policy() if policy is None else policy, evict
        self._limits = {"max_model_len": max_model_len, "block_size": block_size, "num_blocks": num_blocks}
        self._blocks = shards * (num_blocks - 1)
        self._options = {"budget": budget, "steps": steps, "attention": attention}
        self._key = jax.random.key(seed)
        self._lock = threading.RLock()  # a chunk's; holds `service` and `_lines`
        self._lines: list[Answer | None] = [None] * (lines * shards)
        self._notes = threading.RLock()  # of all below
        self._backlog: collections.deque[tuple[Answer, dict[str, Any], np.ndarray]] = collections.deque()
        self._unfinished: set[Answer] = set()
        self._running: set[Answer] = set()  # of them, those that sat on a row after the latest chunk
        self._leaving: dict[Answer, Finish] = {}
        self._watch: dict[Answer, Callable[[Answer], None]] = {}
        self._tickets = 0
        self._counts = dict.fromkeys(("output_tokens", "preemptions", "steps", "blocks_used", "ended"), 0)
        self._seconds = 0.0
        self._first, self._each = collections.deque[float](maxlen=LATEST), collections.deque[float](maxlen=LATEST)

    def submit(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        priority: int = 0,
        key: jax.Array | None = None,
        on_tokens: Callable[[Answer], None] | None = None,
        **sampling,
    ) -> Answer:
        """Queues a prompt; it is served from the next chunk on.

        Args:
          prompt_ids: at least one token.
          max_new_tokens: at least 1.
          priority: higher goes first, where the policy asks for it.
          key: of its sampling, one of `jax.random.key`.
          on_tokens: called outside of jit after each chunk that brought it tokens or its end, and by `cancel`. What it
            raises leaves `step`, after everybody else's was called.
          **sampling: temperature, top_k, top_p, min_p, repetition_penalty.

        Raises:
          ValueError: it is wrong, or could never fit a row or the pool: the value, the limit, what to do.
        """
        ids = np.zeros((1, max(self._limits["max_model_len"], len(prompt_ids))), np.int32)
        ids[0, : len(prompt_ids)] = prompt_ids
        numbers = {"prompt_length": len(prompt_ids), "max_new_tokens": max_new_tokens, "priority": priority}
        asked = {name: np.full(1, value, np.int32) for name, value in numbers.items()} | {"prompt_ids": ids}
        knobs = _knobs(**sampling)
        check_asked(self._model, ids, asked["prompt_length"], asked["max_new_tokens"], knobs, **self._limits)
        if key is not None and (key.shape, key.dtype) != ((), self._key.dtype):
            raise ValueError(f"key is {key.dtype} {key.shape}, must be one key of {self._key.dtype}: `jax.random.key`.")
        asked |= knobs | {"key": self._key if key is None else key, "fold": np.array(key is None)}
        answer = Answer(list(map(int, prompt_ids)))
        with self._notes:  # the order of tickets is that of the backlog
            self._unfinished.add(answer)
            if on_tokens is not None:
                self._watch[answer] = on_tokens
            self._backlog.append((answer, asked, np.array([self._tickets]).astype(np.int32)))
            self._tickets += 1
        return answer

    def cancel(self, answer: Answer, reason: Finish = Finish.CANCELLED) -> bool:
        """Ends a request, wherever it is; False if it had ended. Its row and blocks are free in the next chunk.

        Raises:
          ValueError: it was submitted to another engine.
        """
        with self._notes:
            if not self._waits(answer):
                return False
            self._leaving[answer] = reason
            self._end(answer, reason)
            watch = self._watch.pop(answer, None)
        if watch is not None:
            watch(answer)
        return True

    def step(self) -> bool:
        """Runs one chunk and hands out what it brought; False if there was nothing to do."""
        with self._lock:
            grown = self._turn()
        with contextlib.ExitStack() as calls:  # everybody's, also if one of them raises
            for answer in reversed(grown):
                calls.callback(self._tell, answer)
        return bool(grown or self._leaving) or self.busy

    @property
    def busy(self) -> bool:
        """Whether a request has not ended yet."""
        return bool(self._unfinished)

    def run(self) -> None:
        """Runs until every request has ended, and has given back what it held."""
        while self.step():
            pass

    def stream(self, answer: Answer) -> Iterator[int]:
        """Yields a request's tokens as they come; the engine runs, for all, while one is waited for."""
        sent = 0
        while sent < len(answer.token_ids) or answer.finish_reason is None:
            if sent == len(answer.token_ids):
                self._more(answer, sent)
            else:
                yield answer.token_ids[sent]
                sent += 1

    async def astream(self, answer: Answer) -> AsyncIterator[int]:
        """`stream` for coroutines: chunks run in a thread, and serve everybody who waits."""
        sent = 0
        while sent < len(answer.token_ids) or answer.finish_reason is None:
            if sent == len(answer.token_ids):
                await asyncio.to_thread(self._more, answer, sent)
            else:
                yield answer.token_ids[sent]
                sent += 1

    def metrics(self) -> dict[str, int | float]:
        """Counts so far, the state after the latest chunk, and medians in seconds.

        Who has ended since the latest chunk neither runs nor waits. Medians are over the latest 1,024 requests that
        have ended and had a token, those of the time per token over such as had two.
        """
        with self._notes:
            counts, running, unfinished = self._counts.copy(), len(self._running), len(self._unfinished)
            seconds, first, each = self._seconds, list(self._first), list(self._each)
        return counts | {
            "running": running,
            "waiting": unfinished - running,
            "occupancy": counts["blocks_used"] / self._blocks,
            "tokens_per_s": counts["output_tokens"] / seconds if seconds else 0.0,
            "time_to_first_token": statistics.median(first) if first else 0.0,
            "time_per_token": statistics.median(each) if each else 0.0,
        }

    def _tell(self, answer: Answer) -> None:
        """Calls who watches; after the end for the last time."""
        with self._notes:
            watch = self._watch.get(answer)
            if answer.finish_reason is not None:
                self._watch.pop(answer, None)
        if watch is not None:
            watch(answer)

    def _more(self, answer: Answer, sent: int) -> None:
        """Another chunk, unless somebody else's has brought the next token or the end meanwhile."""
        with self._lock:
            if len(answer.token_ids) == sent and self._waits(answer):
                self.step()

    def _waits(self, answer: Answer) -> bool:
        """Whether a request has not ended; raises if it cannot end here."""
        with self._notes:
            if answer.finish_reason is None and answer not in self._unfinished:
                raise ValueError("this answer was submitted to another engine; stream or cancel it there.")
            return answer.finish_reason is None

    def _turn(self) -> list[Answer]:
        self._leave()
        self._enter()
        if not any(self._lines):
            with self._notes:
                self._counts["blocks_used"] = 0  # nobody is left to hold one
            return []
        started = time.perf_counter()
        given = self._model, self.service, self._policy, self._evict
        self.service, news = self._programs.chunk(*given, **self._options)
        news = jax.device_get(news)
        with self._notes:
            self._seconds += time.perf_counter() - started
            self._counts |= {"steps": int(np.max(news.steps)), "blocks_used": int(np.sum(news.used))}
            self._counts["preemptions"] += int(np.sum(news.preemptions))
            seated = (a for a, sits in zip(self._lines, news.seated, strict=True) if a is not None and sits)
            self._running = self._unfinished.intersection(seated)
        return [a for line, a in enumerate(list(self._lines)) if a is not None and self._read(line, a, news)]

    def _leave(self) -> None:
        """Tells the device who was cancelled; a request in the backlog never got there."""
        with self._notes:
            leaving, self._leaving = self._leaving, {}
        for reason in set(leaving.values()):
            lines = np.array([answer is not None and leaving.get(answer) == reason for answer in self._lines])
            if lines.any():
                self.service = self._programs.leave(self.service, lines, reason=reason)
        self._lines = [None if answer in leaving else answer for answer in self._lines]

    def _enter(self) -> None:
        """Writes requests of the backlog into free lines."""
        for line in (i for i, answer in enumerate(self._lines) if answer is None):
            while self._backlog and self._lines[line] is None:
                answer, asked, ticket = self._backlog.popleft()
                if answer.finish_reason is None:
                    self._lines[line] = answer
                    self.service = self._programs.enter(self.service, asked, np.array([line], np.int32), ticket)

    def _read(self, line: int, answer: Answer, news: News) -> bool:
        """Takes what is new for a request; whether there was anything. A line is free once the device ended it."""
        grown, finish = int(news.grown[line]), Finish(int(news.finish[line]))
        if finish != Finish.RUNNING:
            self._lines[line] = None
        with self._notes:
            if answer.finish_reason is not None:  # cancelled while the chunk ran
                return False
            if grown and answer.first_token is None:
                answer.first_token = time.perf_counter()
            answer.token_ids += news.tokens[line, :grown].tolist()
            answer.logprobs += news.logprobs[line, :grown].tolist()
            self._counts["output_tokens"] += grown
            if finish != Finish.RUNNING:
                self._end(answer, finish)
        return bool(grown) or finish != Finish.RUNNING

    def _end(self, answer: Answer, reason: Finish) -> None:
        """Under the lock of the notes, as who ends a request first has ended it."""
        answer.ended = time.perf_counter()
        answer.finish_reason = reason.label
        self._unfinished.discard(answer)
        self._running.discard(answer)
        self._counts["ended"] += 1
        if answer.first_token is not None:
            self._first.append(answer.first_token - answer.submitted)
            if (more := len(answer.token_ids) - 1) > 0:
                self._each.append((answer.ended - answer.first_token) / more)


def _knobs(**sampling) -> dict[str, np.ndarray]:
    """Every knob of `Sampling.create` but its key, as numpy [1]."""
    knobs = _SAMPLING.bind(1, **sampling)
    knobs.apply_defaults()
    return {
        name: np.full(1, value, np.int32 if name == "top_k" else np.float32)
        for name, value in knobs.arguments.items()
        if name not in ("num_rows", "key")
    }
