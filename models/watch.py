"""`paxattn inspect SRC --watch TEXT ...`: the page map while a model answers, then what happened, in characters.

terminal       the map is redrawn in place, a step at a time
pipe or file   the map where the pool was fullest
both           the timeline of the run, and what each phase did to page table and pool
"""

import sys
from collections.abc import Sequence
from typing import Any

import paxattn as pax
from models.lm import LM, Prompt


def watch(lm: LM, prompts: Sequence[Prompt], **options: Any) -> pax.viz.Recording:
    """Answers prompts in one batch, shows its pages on the way, and returns what was seen.

    Args:
      lm: the model.
      prompts: texts or token ids; a row each, or a row for each of their beams or samples.
      **options: see `LM.batches`; `max_num_seqs` is what the prompts take by default.

    Raises:
      ValueError: `max_num_seqs` is less: two batches have two pools, which are no one film.
    """
    group = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    rows = len(prompts) * group
    if options.setdefault("max_num_seqs", rows) < rows:
        raise ValueError(
            f"max_num_seqs is {options['max_num_seqs']}, but what is watched is one batch, here of {rows} rows; leave "
            "it out, or watch fewer prompts."
        )
    film, drawn, live = pax.viz.Recording(), "", sys.stdout.isatty()
    for state, _ in lm.batches(prompts, steps=1, **options):
        if not film.frames:
            film.see(pax.free(state.cache.table, state.known > 0))  # as it was before the first step
        film.see(state)
        if film.frames[-1].used < max(frame.used for frame in film.frames) and not live:
            continue
        rewind = f"\x1b[{len(drawn.splitlines())}A\x1b[J" if live and drawn else ""
        drawn = str(pax.viz.page_map(state.cache.table))
        if live:
            print(rewind + drawn, flush=True)
    print("" if live else drawn, pax.viz.timeline(film), pax.viz.flow(film), sep="\n\n")
    return film
