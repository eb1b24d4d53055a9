"""A language model that takes text: tokenizer + Llama + the paged generation loop.

    lm.generate(["The capital of France is"]) -> [Output(text=" Paris. ...", finish_reason="stop", ...)]
    lm.stream("Once upon a time")             -> pieces of text, the loop run a few steps at a time
    lm.logits([504, 3575])                    -> float32 [T, V], teacher-forced through the paged cache

Prompt widths and lengths of answers are rounded up to powers of two, so that other prompts of the same bucket
compile nothing.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paxattn as pax
from models import beams
from models.batch import Batch, Run, bucket, eos_set, merge, saving
from models.checks import check
from models.eviction import eviction as eviction_of
from models.lanes import Lanes, over
from models.llama import Llama
from models.many import answer_many
from models.speculation import drafter, report
from models.tokenizer import Detokenizer, Tokenizer
from paxattn.decoding import beam, eviction, speculative
from paxattn.decoding.generate import MAX_NUM_BATCHED_TOKENS, pool_size

Prompt = str | Sequence[int]

MAX_NUM_SEQS = 64
"""Rows of a batch, by default."""

_BATCH_ONLY = {
    "num_return_sequences": 1, "num_beams": 1, "length_penalty": 1.0, "early_stopping": False, "speculate": None,
    "num_speculative_tokens": 4,
}  # fmt: skip
"""Options of batches alone, with their defaults; the engine's rows are not tied to one another."""

_advance = jax.jit(pax.advance, static_argnames=("budget", "attention", "shared"), donate_argnames="state")
_fan_out = jax.jit(pax.fan_out, static_argnames=("group", "budget", "attention"), donate_argnames="state")
_speculate = jax.jit(speculative.advance, static_argnames=("k", "budget", "attention"), donate_argnames="state")
_evict = jax.jit(eviction.advance, static_argnames=("budget", "attention"), donate_argnames="state")
_stop = jax.jit(pax.stop, donate_argnums=0)


@functools.partial(jax.jit, static_argnames=("budget", "attention"))
def _score(model: pax.Model, cache: pax.Cache, tokens: jax.Array, count: jax.Array, budget: int, attention: str):
    cache, plan, status = pax.extend(cache, count, budget=budget, attention=attention)
    hidden, _ = model(tokens, plan, cache.layers)
    return model.logits(hidden), status


@dataclasses.dataclass(frozen=True)
class LM:
    """A model, its tokenizer where it has one, the name it was loaded by, and the mesh it lies on, if any."""

    model: Llama
    tokenizer: Tokenizer | None
    name: str
    mesh: jax.sharding.Mesh | None = None

    @functools.cached_property
    def _packed(self) -> pax.Model:
        """What jitted programs are given: the model as it lies on its mesh, or packed, as they are called often."""
        return self.model if self.mesh is not None else pax.pack(self.model)

    def encode(self, prompt: Prompt, *, chat: bool | None = None) -> list[int]:
        """Token ids of a prompt: text through the chat template (by default where there is one), ids as they are."""
        if not isinstance(prompt, str):
            try:
                return [operator.index(token) for token in prompt]
            except TypeError as error:
                raise ValueError(
                    f"a prompt is {prompt!r}, must be a text or a list of token ids, which are integers; "
                    "one prompt of ids is given as [ids]."
                ) from error
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer: give token ids, or put tokenizer.json beside the weights.")
        chat = self.tokenizer.has_chat_template if chat is None else chat
        return self.tokenizer.encode_chat(prompt) if chat else self.tokenizer.encode(prompt)

    def generate(
        self, prompts: str | Sequence[Prompt], *, watch: Callable[[Any], None] | None = None, **options: Any
    ) -> Run:
        """Answers prompts: in one batch, or through the engine where there are more than `max_num_seqs`.

        On a mesh: batch by batch, `max_num_seqs` rows a data shard.

        Args:
          prompts: texts, or token ids; a text by itself is one prompt.
          watch: called on the host with each state, of the batch or of the engine, that it sees; see `steps`. Its
            arrays are given to the next step once the call returns.
          **options: see `batches`.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        untied = self.mesh is None and all(options.get(name, value) == value for name, value in _BATCH_ONLY.items())
        if untied and len(prompts) > options.get("max_num_seqs", MAX_NUM_SEQS):
            return self._generate_many(prompts, watch, **{k: v for k, v in options.items() if k not in _BATCH_ONLY})
        outputs, stats = [], {}
        for state, batch in self.batches(prompts, **options):
            if watch is not None:
                watch(state)
            if batch.done(state):
                outputs += batch.outputs(state)
                stats = merge(stats, batch.stats(state))
        if "speculation" in stats:
            stats["speculation"] = report(stats["speculation"])
        return Run(outputs, stats | {"sharing_saving": saving(stats)})

    def _generate_many(
        self,
        prompts: Sequence[Prompt],
        watch: Callable[[Any], None] | None,
        *,
        chat: bool | None = None,
        max_new_tokens: int = 64,
        seed: int = 0,
        stop_strings: Sequence[str] = (),
        eos_token_id: int | Sequence[int] | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        max_num_seqs: int = MAX_NUM_SEQS,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
        attention: str = "auto",
        steps: int | None = None,
        evict: pax.Eviction | str | None = None,
        **sampling: Any,
    ) -> Run:
        sizes = {"block_size": block_size, "num_blocks": num_blocks, "max_num_seqs": max_num_seqs}
        sizes |= {"max_num_batched_tokens": max_num_batched_tokens, "steps": steps}
        text = {"max_new_tokens": max_new_tokens, "stop_strings": stop_strings}
        encoded = self._encode_all(prompts, chat, sampling=sampling, **text, **sizes)
        eos = self.model.config.eos_token_id if eos_token_id is None else eos_token_id
        batch = Batch(self.tokenizer, encoded, max_new_tokens, tuple(stop_strings), eos_set(eos))
        sizes |= {"steps": steps or 8, "evict": eviction_of(evict, self.model.config)}
        options = {"eos_token_id": eos, "seed": seed, "attention": attention, "watch": watch, **sampling}
        run = answer_many(self._packed, batch, **sizes, **options)
        return Run(run.outputs, run.stats | {"sharing_saving": saving(run.stats)})

    def _encode_all(self, prompts: Sequence[Prompt], chat: bool | None, **options: Any) -> list[list[int]]:
        """Token ids of all prompts; refuses, before anything runs, what no batch could answer."""
        if options["stop_strings"] and self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer, so stop_strings cannot be seen.")
        encoded = [self.encode(prompt, chat=chat) for prompt in prompts]
        check(self.model, encoded, **options)
        return encoded

    def stream(self, prompt: Prompt, *, steps: int = 4, **options: Any) -> Generator[str, None, str]:
        """Yields the answer to one prompt in pieces as it grows; their concatenation is the whole text.

        What the generator returns, as `yield from` gives it, is the finish reason.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer, so there is no text to stream.")
        if options.get("num_beams", 1) > 1 or options.get("num_return_sequences", 1) > 1:
            raise ValueError("a stream is one answer that only grows; leave out num_beams and num_return_sequences.")
        sent = 0
        detokenizer = Detokenizer(self.tokenizer)
        text, reason = "", ""
        for state, batch in self.batches([prompt], steps=steps, **options):
            if batch.done(state):
                answer = batch.outputs(state)[0]
                assert answer.text is not None
                if answer.text[len(text) :]:
                    yield answer.text[len(text) :]
                reason = answer.finish_reason
            elif not batch.stop_strings:  # a later token may complete one: nothing is given out before the end
                tokens = batch.new_tokens(state)[0]
                piece = detokenizer.push(batch.visible(tokens[sent:]))
                sent = len(tokens)
                if piece:
                    text += piece
                    yield piece
        return reason

    def logits(self, ids: Sequence[int], *, block_size: int = 16, attention: str = "auto") -> jax.Array:
        """float32 [T, V]: scores after each token of `ids`, fed through the paged cache in one step."""
        width = len(ids)
        if not width:
            raise ValueError("ids is empty; give at least one token.")
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, must be at least 1.")
        bad = [t for t in ids if not 0 <= t < self.model.vocab_size]
        if bad:
            raise ValueError(f"token id {bad[0]} is outside the vocabulary [0, {self.model.vocab_size}).")
        spec, blocks = self.model.cache_spec, 1 + -(-width // block_size)
        cache = pax.Cache.create(spec, num_blocks=blocks, block_size=block_size, max_num_seqs=1, max_model_len=width)
        tokens = jnp.asarray(ids, jnp.int32)
        logits, status = _score(self._packed, cache, tokens, jnp.array([width]), width, attention)
        pax.check(status)
        return logits

    def batches(
        self,
        prompts: str | Sequence[Prompt],
        *,
        chat: bool | None = None,
        max_new_tokens: int = 64,
        num_return_sequences: int = 1,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        seed: int = 0,
        stop_strings: Sequence[str] = (),
        eos_token_id: int | Sequence[int] | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        max_num_seqs: int = MAX_NUM_SEQS,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
        attention: str = "auto",
        steps: int | None = None,
        speculate: pax.Drafter | str | None = None,
        num_speculative_tokens: int = 4,
        evict: pax.Eviction | str | None = None,
        **sampling: Any,
    ) -> Iterator[tuple[pax.State, Batch]]:
        """Runs the prompts batch by batch and yields each state that the host gets to see.

        A state's arrays are given to the next step: read what you want of it before you ask for another.

        Args:
          prompts: texts, or token ids; a text by itself is one prompt.
          chat: through the chat template; by default where the model has one.
          max_new_tokens: of each answer.
          num_return_sequences: answers a prompt: samples, which need a temperature, or the best of its beams.
          num_beams: above 1, beam search; it takes neither sampling knobs nor stop strings.
          length_penalty: of beam search, as in `paxattn.beam_search`.
          early_stopping: of beam search, likewise.
          seed: of the sampling keys, of which the lower 32 bits count; prompt i uses fold_in(key(seed), i), its samples
            as `sample_keys` says.
          stop_strings: an answer ends before the first of these.
          eos_token_id: ends an answer; the checkpoint's by default, () for none.
          block_size: tokens a block.
          num_blocks: blocks in the pool, NULL included; enough for everything by default.
          max_num_seqs: rows of a batch at most; this, num_blocks and max_num_batched_tokens are a data shard's.
          max_num_batched_tokens: tokens a prefill step feeds at most.
          attention: implementation of paged attention.
          steps: yield each this many steps; by default only at the end (8 where there are stop strings).
          speculate: a drafter, or its name: ngram, self:M (layers), draft:SRC (a checkpoint). By default none.
          num_speculative_tokens: tokens that it guesses a step at most.
          evict: gives blocks back while rows live: sinks:S,window:W or window:W, or an `Eviction`. By default none.
          **sampling: temperature, top_k, top_p, min_p, repetition_penalty.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        limits = {"block_size": block_size, "num_blocks": num_blocks, "max_num_seqs": max_num_seqs}
        limits |= {"max_num_batched_tokens": max_num_batched_tokens, "steps": steps}
        text = {"max_new_tokens": max_new_tokens, "stop_strings": stop_strings}
        encoded = self._encode_all(prompts, chat, sampling=sampling, **text, **limits)
        search = beams.options(num_beams, num_return_sequences, length_penalty, early_stopping, stop_strings, sampling)
        group = num_beams if search else num_return_sequences
        if group > max_num_seqs:
            raise ValueError(f"a prompt takes {group} rows, more than max_num_seqs = {max_num_seqs}; raise it.")
        eos = self.model.config.eos_token_id if eos_token_id is None else eos_token_id
        steps = 8 if stop_strings and steps is None else steps
        key = jax.random.key(seed)
        guesser = drafter(speculate, self, attention=attention) if isinstance(speculate, str) else speculate
        if guesser is not None and group > 1:
            raise ValueError("speculate answers a prompt once; leave out num_beams and num_return_sequences.")
        hook = eviction_of(evict, self.model.config)
        if hook is not None and (search or guesser is not None):
            raise ValueError("evict leaves holes, which neither beams nor a rollback go back over; leave it out.")
        turn, k = functools.partial(over(_advance, self.mesh), shared=group > 1), num_speculative_tokens
        if hook is not None:
            turn = functools.partial(over(_evict, self.mesh), evict=hook)
        if guesser is not None:
            turn = functools.partial(over(_speculate, self.mesh), drafter=guesser, k=k)
        most = max_num_seqs // group * Lanes(self.mesh, 1).shards
        for first in range(0, len(encoded), most):
            rows = encoded[first : first + most]
            lanes = Lanes(self.mesh, len(rows))
            width, new = bucket(max(map(len, rows))), bucket(max_new_tokens)
            ids = np.zeros((len(rows), width), np.int32)
            for row, tokens in enumerate(rows):
                ids[row, : len(tokens)] = tokens
            budget = pax.prefill_budget((lanes.hand, width), max_num_batched_tokens)
            lines = [tokens for tokens in rows for _ in range(group)]
            batch = Batch(self.tokenizer, lines, max_new_tokens, tuple(stop_strings), eos_set(eos), group)
            length = lanes.deal_lengths(jnp.array(list(map(len, rows)), jnp.int32))
            given = self._packed, lanes.deal(jnp.asarray(ids)), length
            size = pool_size(lanes.hand, width, new, group, block_size, width + new)
            sizes: dict[str, Any] = {
                "max_new_tokens": lanes.deal(jnp.full(len(rows), max_new_tokens, jnp.int32)),
                "max_model_len": width + new,
                "block_size": block_size,
                "num_blocks": size if num_blocks is None else num_blocks,
                "eos_token_id": eos,
            }
            if group > 1:
                sizes["trace"] = -(-lanes.hand * width // budget) + new
            if search:
                begun = over(beam.begin, self.mesh)(*given, **search, **sizes)
                yield from beams.drive(
                    self._packed, begun, batch, num_return_sequences, budget, attention, steps, lanes
                )
                continue
            keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(first, first + len(rows)))
            sizes |= {"num_return_sequences": num_return_sequences, "key": lanes.deal(keys)}
            state = over(pax.start, self.mesh)(*given, **sizes, **sampling)
            if group > 1:
                fan_out = over(_fan_out, self.mesh)
                state = fan_out(self._packed, state, group=group, budget=budget, attention=attention, evict=hook)
            if guesser is not None:
                state = over(speculative.begin, self.mesh)(guesser, state, k=k)
            advance = functools.partial(turn, self._packed, budget=budget, attention=attention)
            yield from _drive(advance, state, batch, steps, lanes)


def _drive(advance, state, batch, steps, lanes) -> Iterator[tuple[pax.State, Batch]]:
    more = jnp.int32(2**30 if steps is None else steps)
    while True:
        state = advance(state=state, steps=more)
        seen = lanes.look(state)
        hit = batch.stop_rows(seen)
        if hit.any():
            state = over(_stop, lanes.mesh)(state, jnp.asarray(lanes.deal_rows(hit)))
            seen = lanes.look(state)
        yield seen, batch
        if batch.done(seen):
            return
