"""paxattn: PagedAttention for JAX. The life of a KV cache as one jitted pure function over immutable pytrees.

import paxattn as pax

pax.generate(model, prompt_ids, prompt_length, max_new_tokens=64)      the whole flow
pax.beam_search(model, prompt_ids, prompt_length, num_beams=4, ...)    likely continuations by a reordered page table
pax.serve(model, requests, max_num_seqs=8), pax.Engine                 more requests than rows
pax.speculate(model, prompt_ids, prompt_length, drafter=pax.NGram(), ...)   faster
pax.on_mesh(pax.generate, mesh)                                        each of these on many devices
pax.append, fork, truncate, free                                       the verbs it is made of
pax.paged_attention                                                    the kernel underneath
pax.viz                                                                page map, timeline and flow of a run as pictures
pax.ablate(model, block_size=[1, 16, 128]), pax.simulate               what does it cost?
"""

from pallas_kernels import paged_attention
from paxattn import viz
from paxattn.ablation.sweep import ablate
from paxattn.attention import attend
from paxattn.blocks import NULL, Blocks, allocate, release, retain
from paxattn.cache import KV, Cache, CacheSpec, Plan, extend, view, write
from paxattn.decoding.beam import Beams, beam_search
from paxattn.decoding.drafters import Draft, Drafter, DraftModel, NGram
from paxattn.decoding.eviction import Eviction, sinks_and_window, sliding_window
from paxattn.decoding.fan_out import fan_out
from paxattn.decoding.generate import Generation, finish, generate, prefill_budget, start
from paxattn.decoding.model import Model
from paxattn.decoding.packed import Packed, pack
from paxattn.decoding.sampling import Sampling
from paxattn.decoding.speculative import Speculation, Tally, speculate
from paxattn.decoding.step import Finish, State, Stats, advance, step, stop
from paxattn.mesh import make_mesh, on_mesh, spread
from paxattn.pages import PageTable, append, fork, free, locate, truncate, violations
from paxattn.serving.engine import Answer, Engine
from paxattn.serving.loop import Served, serve
from paxattn.serving.policy import Policy
from paxattn.serving.queue import Requests
from paxattn.sharing import Sharing, sharing
from paxattn.simulate import draw_lengths, simulate
from paxattn.status import PagingError, Status, check
from paxattn.version import __version__

__all__ = [  # noqa: RUF022 - in the order that a newcomer meets them
    "generate", "Generation", "Finish", "Model", "pack", "Packed", "Sampling", "beam_search", "Beams",
    "speculate", "Drafter", "Draft", "NGram", "DraftModel", "Speculation", "Tally",
    "start", "fan_out", "advance", "step", "stop", "finish", "State", "Stats", "prefill_budget",
    "serve", "Requests", "Served", "Policy", "Engine", "Answer",
    "on_mesh", "make_mesh", "spread",
    "Cache", "CacheSpec", "KV", "Plan", "extend", "write", "view", "attend", "paged_attention",
    "PageTable", "append", "fork", "truncate", "free", "locate", "violations",
    "sharing", "Sharing", "viz",
    "Eviction", "sinks_and_window", "sliding_window",
    "ablate", "simulate", "draw_lengths",
    "Blocks", "allocate", "retain", "release", "NULL",
    "Status", "check", "PagingError", "__version__",
]  # fmt: skip
