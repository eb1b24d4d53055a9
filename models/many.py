"""More prompts than rows: answers through the engine, so that a row that ends early takes the next prompt.

prompts ──submit all──> Engine ──chunks──> [Output ...] in the order of the prompts, a progress bar on the way
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from tqdm.auto import tqdm

import paxattn as pax
from models.batch import Batch, Run, bucket


def answer_many(
    model: pax.Model,
    batch: Batch,
    *,
    eos_token_id: int | Sequence[int],
    seed: int,
    block_size: int,
    num_blocks: int | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    attention: str,
    steps: int,
    evict: pax.Eviction | None,
    watch: Callable[[Any], None] | None,
    **sampling: Any,
) -> Run:
    """Answers the prompts of `batch`; for the options see `LM.batches`, for `watch` `LM.generate`."""
    longest = max(map(len, batch.prompts))
    engine = pax.Engine(
        model,
        max_num_seqs=max_num_seqs,
        max_model_len=bucket(longest) + bucket(batch.max_new_tokens),
        num_blocks=num_blocks,
        block_size=block_size,
        # No longer than one prompt beside rows that decode: a step with prompts costs its whole token axis.
        max_num_batched_tokens=min(max_num_batched_tokens, max_num_seqs + bucket(longest)),
        steps=steps,
        eos_token_id=eos_token_id,
        attention=attention,
        evict=evict,
    )
    key = jax.random.key(seed)
    answers = [
        engine.submit(ids, max_new_tokens=batch.max_new_tokens, key=jax.random.fold_in(key, i), **sampling)
        for i, ids in enumerate(batch.prompts)
    ]
    with tqdm(total=len(answers), desc="answer", unit="prompt", disable=not sys.stderr.isatty()) as bar:
        more = True
        while more:
            more = engine.step()
            for answer in answers if batch.stop_strings else ():
                if answer.finish_reason is None and batch.has_stop(answer.token_ids):
                    engine.cancel(answer, pax.Finish.STOP)
            now = engine.metrics()
            bar.set_postfix_str(f"{now['tokens_per_s']:.1f} tokens/s, {now['occupancy']:.0%} of the blocks")
            bar.update(now["ended"] - bar.n)
            if watch is not None:
                watch(engine.service)
    outputs = [batch.output(a.prompt_ids, a.token_ids, a.logprobs, str(a.finish_reason)) for a in answers]
    unpaged = max_num_seqs * (longest + batch.max_new_tokens)
    counted = {"preemptions": engine.metrics()["preemptions"], "tokens_reserved_unpaged": unpaged}
    return Run(outputs, batch.stats(engine.service) | counted)
