"""What no batch could answer, refused before anything runs: on a mesh the programs see their arguments too late.

encoded prompts, options of `LM.batches` --check--> nothing, or a ValueError that says what to do
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import paxattn as pax
from models.llama import Llama
from paxattn.decoding.generate import check_prompts


def check(
    model: Llama,
    encoded: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_strings: Sequence[str],
    block_size: int,
    num_blocks: int | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    steps: int | None,
    sampling: Mapping[str, Any],
) -> None:
    """Raises ValueError for the first thing that is wrong; for the options see `LM.batches`."""
    if not encoded:
        raise ValueError("no prompt was given; at least one is needed.")
    for i, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompt {i} is empty; give at least one token.")
        if bad := [token for token in ids if not 0 <= token < model.vocab_size]:
            raise ValueError(f"a token id is {bad[0]} in prompt {i}; ids are in [0, {model.vocab_size}).")
    if max_num_seqs < 1:
        raise ValueError(f"max_num_seqs is {max_num_seqs}, must be at least 1.")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}, must be at least 1.")
    if isinstance(stop_strings, str) or "" in stop_strings:
        raise ValueError(f"stop_strings is {stop_strings!r}, must be a list of texts, none of them empty.")
    longest = max(encoded, key=len)  # it needs the most of whatever has a limit
    whole, limit = len(longest) + max_new_tokens, model.config.max_position_embeddings
    if whole > limit:
        raise ValueError(
            f"prompt + max_new_tokens is {whole} tokens, the model was made for max_position_embeddings = "
            f"{limit}; shorten the prompt or ask for fewer."
        )
    if "key" in sampling:
        raise ValueError("unknown options key; the keys of all prompts follow from seed.")
    given = np.array([longest]), np.array([len(longest)])
    check_prompts(model, *given, max_new_tokens, whole, block_size, num_blocks, sampling)
    pax.prefill_budget((1, len(longest)), max_num_batched_tokens)
