"""Pictures of paging: drawn in a notebook, printed in a terminal, saved as SVG.

page_map(table)      who owns which block                  also what a notebook shows of a `PageTable` or a `Cache`
Recording().see      keeps a frame of a run
timeline(recording)  occupancy, phases, forks, rollbacks, preemptions, step by step
flow(recording)      what each phase did to the page table and to the pool, in numbers

Everything runs on the host; nothing is drawn that the state does not say.
"""

from paxattn.viz.flow import flow, phases
from paxattn.viz.pages import page_map
from paxattn.viz.picture import Picture
from paxattn.viz.recording import Recording
from paxattn.viz.timeline import timeline

__all__ = ["Picture", "Recording", "flow", "page_map", "phases", "timeline"]
