"""The host's side of a batch on a mesh: the programs of one device over its data shards, and what they show.

    over(_advance, mesh)  jitted once a mesh          deal: prompts -> hands          look: a state -> its rows in order

Without a mesh each of these leaves things as they are.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import paxattn as pax
from paxattn.mesh import deal, deal_lengths, join, placed


def over(program: Callable, mesh: Mesh | None) -> Callable:
    """A program of one device, jitted or not, over the data shards of a mesh."""
    return program if mesh is None else _over(program, mesh)


@functools.cache
def _over(program: Callable, mesh: Mesh) -> Callable:
    f = inspect.unwrap(program)
    if f is program:
        return pax.spread(f, mesh)
    names = inspect.signature(f).parameters
    static = [name for name in ("budget", "attention", "shared", "k", "group") if name in names]
    donated = [name for name in ("state", "search", "service") if name in names]
    return jax.jit(pax.spread(f, mesh), static_argnames=static, donate_argnames=donated)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """How `count` prompts lie on a mesh, None being one device."""

    mesh: Mesh | None
    count: int

    @property
    def shards(self) -> int:
        """D."""
        return 1 if self.mesh is None else self.mesh.shape["data"]

    @property
    def hand(self) -> int:
        """Prompts a shard."""
        return -(-self.count // self.shards)

    def spread(self, f: Callable) -> Callable:
        """A function of one shard, over all of them."""
        return f if self.mesh is None else pax.spread(f, self.mesh)

    def outline(self, f: Callable, *given: Any) -> Any:
        """What `spread(f)` gives, as shapes with where they lie; `given` may be shapes."""
        shapes = jax.eval_shape(self.spread(f), *given)
        return shapes if self.mesh is None else placed(shapes, self.mesh)

    def deal(self, tree: Any) -> Any:
        """Arrays with a line a prompt, dealt to the shards."""
        return tree if self.mesh is None else deal(tree, self.shards)

    def deal_lengths(self, length: Any) -> Any:
        """Lengths of the prompts, 0 for what only fills up a hand."""
        return length if self.mesh is None else deal_lengths(length, self.shards)

    def deal_rows(self, rows: np.ndarray) -> Any:
        """A value a row, of which a prompt may have several."""
        return rows if self.mesh is None else deal(rows.reshape(self.count, -1), self.shards).reshape(self.shards, -1)

    def look(self, state: Any) -> Any:
        """A state with its rows in the order of the prompts, readable by every process."""
        return state if self.mesh is None else join(state, self.mesh, self.count)
