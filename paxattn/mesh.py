"""Many devices, one program: data shards that know nothing of each other, model shards that share the work of each.

                 model 0       model 1
    data 0       heads 0..3    heads 4..7      prompts 0, 2: a page table and an allocator, the same bits twice
    data 1       heads 0..3    heads 4..7      prompts 1, 3: others, a loop with a trip count of its own

    spread(f, mesh)         is vmap(f) whose lanes are the data shards: what is dealt has a leading axis [D]
    on_mesh(program, mesh)  deals prompts to lanes like cards, runs the whole program there, joins what comes back

Inside a lane runs the code of one device. A model that can be cut says how (`Cut`); any other is whole on each device.
No collective crosses the data axis.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paxattn.cache import KV, Cache
from paxattn.decoding.generate import is_traced
from paxattn.decoding.model import Model
from paxattn.decoding.packed import Packed
from paxattn.serving.queue import Requests
from paxattn.typing import Array

DATA, MODEL = "data", "model"
"""The axes of a mesh, in this order."""

_SAME = {"model", "drafter", "steps", "policy", "evict", "length_penalty", "eos_token_id"}
"""Parameters that all lanes are given alike."""

_ROWS = {"prompt_ids", "prompt_length", "requests"}
"""Parameters with a line a prompt."""

_PER_ROW = {"max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "key"}
"""Options that may have a value a prompt, and are then dealt with the prompts."""

_POOL, _REST = P(DATA, None, MODEL), P(DATA)  # [D, N, K, S, D] and [D, ...]


@runtime_checkable
class Cut(Protocol):
    """A model whose parameters are cut over a mesh axis."""

    def specs(self, axis: str, devices: int) -> Any:
        """The same pytree with a `PartitionSpec` for each array; raises where it cannot be cut into that many."""
        ...

    def local(self, axis: str) -> Model:
        """Called on each device with its part of the arrays: the model of that device, its collectives included."""
        ...


def make_mesh(data: int = 1, model: int = 1) -> Mesh:
    """A mesh of data x model devices, the first ones, those of a model group next to each other.

    Raises:
      ValueError: there are fewer, or several processes would not all take part.
    """
    found, wanted = jax.device_count(), data * model
    if data < 1 or model < 1 or wanted > found or (jax.process_count() > 1 and wanted < found):
        raise ValueError(
            f"a mesh of data={data} x model={model} takes {wanted} devices, at least 1 each way; there are {found} "
            f"in {jax.process_count()} process(es). Choose other sizes; several processes use all their devices."
        )
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def spread(f: Callable, mesh: Mesh) -> Callable:
    """`f` once for each data shard: a vmap whose lanes are devices, or groups of them along the model axis.

    Arguments with arrays have a leading axis [D], an entry a lane, but for those that all lanes share (model, drafter,
    steps, policy, evict, length_penalty, eos_token_id); what holds no array is passed on as it is. Results have the
    leading axis too. Pools are cut over lanes and over KV heads. Every call builds a program anew, so it is meant to be
    called inside `jax.jit`, which keeps it.
    """
    signature = inspect.signature(f)

    @functools.wraps(f)
    def lanes(*args, **options):
        bound = _arguments(signature, args, options)
        fixed = {name: value for name, value in bound.items() if not any(map(_is_array, jax.tree.leaves(value)))}
        same = {name: _unpacked(value) for name, value in bound.items() if name not in fixed and name in _SAME}
        dealt = _split({name: value for name, value in bound.items() if name not in fixed | same})
        shape = []

        def lane(same, pools, rest):
            pools, rest = jax.tree.map(lambda x: jnp.squeeze(x, 0), (pools, rest))
            mine = dealt.rebuild(pools, rest, lambda shape: shape[1:])
            out = _split(f(**fixed, **_local(same), **mine))
            shape.append(out)
            return jax.tree.map(lambda x: jnp.asarray(x)[None], (out.pools, out.rest))

        specs = {"in_specs": (_specs(same, mesh.shape[MODEL]), _POOL, _REST), "out_specs": (_POOL, _REST)}
        run = jax.jit(jax.shard_map(lane, mesh=mesh, check_vma=False, **specs))
        pools, rest = run(same, dealt.pools, dealt.rest)
        return shape[-1].rebuild(pools, rest, lambda shape: (mesh.shape[DATA], *shape))

    return lanes


def placed(shapes: Any, mesh: Mesh) -> Any:
    """Shapes of what `spread` gives with where each array lies: to compile ahead what takes them."""

    def place(node):
        where = NamedSharding(mesh, _POOL if isinstance(node, KV) else _REST if node.size else P())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), node)

    return jax.tree.map(place, shapes, is_leaf=lambda node: isinstance(node, KV))


def on_mesh(program: Callable, mesh: Mesh) -> Callable:
    """`generate`, `beam_search`, `speculate` or `serve` over a mesh: the same call, meant for `jax.jit`.

    A call outside of `jit` works too, and compiles the program each time.

    Prompts (or requests) and options with a value a prompt are dealt to the data shards like cards; the sizes
    max_num_seqs, num_blocks and max_num_batched_tokens are those of one shard. Rows come back in the order of the
    prompts, on every device. What belongs to a shard (status, stats, trace, cache) keeps a leading axis [D], so that
    `jax.vmap(pax.violations)` looks at every page table.

    Args:
      program: one of the four.
      mesh: axes "data" and "model", see `make_mesh`; its model is to be cut by `models.shard` or `models.load`.

    Raises:
      ValueError: what the program itself refuses.
    """
    lanes, signature = spread(program, mesh), inspect.signature(program)

    @functools.wraps(program)
    def run(*args, **options):
        given = _arguments(signature, args, options)
        if not any(map(is_traced, jax.tree.leaves({name: x for name, x in given.items() if name != "model"}))):
            jax.eval_shape(lambda: program(**given))  # refuses on the host what a lane cannot see
            given |= _room(given)
        rows = {name: x for name, x in given.items() if name in _ROWS}
        count = jax.tree.leaves(rows)[0].shape[0]
        hands = deal(rows | _per_prompt(given, count), mesh.shape[DATA])
        if "prompt_length" in rows:
            hands["prompt_length"] = deal_lengths(rows["prompt_length"], mesh.shape[DATA])
        return join(lanes(**given | hands), mesh, count)

    return run


def deal(tree: Any, shards: int) -> Any:
    """Arrays with a line a prompt [R, ...] as hands of equal length [D, n, ...], dealt like cards.

    The last prompt fills up the last hands; requests that do so end before they begin, as prompts do whose lengths are
    dealt by `deal_lengths`.
    """
    count = jax.tree.leaves(tree)[0].shape[0]
    at = _cards(count, shards)

    def hand(node):
        hands = jax.tree.map(lambda x: jnp.asarray(x)[np.minimum(at, count - 1)], node)
        if not isinstance(node, Requests):
            return hands
        return dataclasses.replace(hands, prompt_length=deal_lengths(node.prompt_length, shards))

    return jax.tree.map(hand, tree, is_leaf=lambda node: isinstance(node, Requests))


def deal_lengths(length: Any, shards: int) -> jax.Array:
    """Lengths of prompts [R] dealt like the prompts [D, n], 0 where the last one only fills up a hand."""
    at, length = _cards(np.shape(length)[0], shards), jnp.asarray(length)
    return jnp.where(at < length.size, length[np.minimum(at, length.size - 1)], 0)


def join(tree: Any, mesh: Mesh, count: int) -> Any:
    """Undoes `deal` in what lanes gave back: fields whose letters begin with B or R have lines, several a prompt maybe.

    All but caches is then on every device, so that each process can read it.
    """
    shards = mesh.shape[DATA]
    hand = -(-count // shards)

    def everywhere(x):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))

    def lines(x):  # [D, hand * group, ...] -> [count * group, ...]
        cards = x.reshape(shards, hand, -1, *x.shape[2:]).swapaxes(0, 1)
        return everywhere(cards.reshape(-1, *x.shape[2:])[: count * cards.shape[2]])

    def whole(node):
        if isinstance(node, Cache):
            return node
        if not dataclasses.is_dataclass(node) or isinstance(node, type):
            return tuple(map(whole, node)) if isinstance(node, tuple) else everywhere(node)
        fields = {f.name: f for f in dataclasses.fields(node) if not f.metadata.get("static")}
        has_lines = {name: getattr(f.type, "dim_str", "")[:1] in ("B", "R") for name, f in fields.items()}
        parts = {name: getattr(node, name) for name in fields}
        return dataclasses.replace(
            node, **{name: jax.tree.map(lines, x) if has_lines[name] else whole(x) for name, x in parts.items()}
        )

    return whole(tree)


def _cards(count: int, shards: int) -> np.ndarray:
    """Which line each place of each hand has, [D, n]; those past the last line fill up."""
    hand = -(-count // shards)
    return np.arange(hand) * shards + np.arange(shards)[:, None]


def _per_prompt(options: dict, count: int) -> dict:
    """Options that are arrays, one value a prompt; a prompt's key depends on its number, not on its lane."""
    given = {name: options[name] for name in _PER_ROW & options.keys()}
    given = {name: np.asarray(x) if isinstance(x, list | tuple) else x for name, x in given.items()}
    given = {name: x for name, x in given.items() if _is_array(x)}
    if "temperature" in options:
        key = given.get("key", jax.random.key(0))
        given["key"] = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    return {name: jnp.broadcast_to(x, (count,)) for name, x in given.items()}


def _room(given: dict) -> dict[str, int]:
    """max_model_len where it would follow from values, which a lane cannot see."""
    if "max_model_len" in given:
        return {}
    if "requests" in given:
        requests = given["requests"]
        return {"max_model_len": int(np.max(np.asarray(requests.prompt_length) + np.asarray(requests.max_new_tokens)))}
    new = given["max_new_tokens"]
    return {"max_model_len": given["prompt_ids"].shape[1] + int(np.max(new))} if _is_array(new) else {}


def _arguments(signature: inspect.Signature, args: tuple, options: dict) -> dict[str, Any]:
    """What a call gives, by name."""
    given = dict(signature.bind(*args, **options).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def _unpacked(tree: Any) -> Any:
    """With the models that were packed, as only these say how they are cut."""
    is_model = (Packed, Cut)
    return jax.tree.map(
        lambda node: node.whole if isinstance(node, Packed) else node, tree, is_leaf=lambda x: isinstance(x, is_model)
    )


def _is_cut(node: Any) -> bool:
    return isinstance(node, Cut)


def _specs(tree: Any, devices: int) -> Any:
    return jax.tree.map(lambda node: node.specs(MODEL, devices) if _is_cut(node) else P(), tree, is_leaf=_is_cut)


def _local(tree: Any) -> Any:
    if jax.lax.axis_size(MODEL) == 1:  # a group of one has all of it, and no collective
        return tree
    return jax.tree.map(lambda node: node.local(MODEL) if _is_cut(node) else node, tree, is_leaf=_is_cut)


@dataclasses.dataclass(frozen=True)
class _Split:
    """A pytree taken apart into pools, which are cut over the model axis too, arrays without an element, and all else.

    The empty ones (no eos ids, no trace) stay out of the `shard_map`: XLA of JAX 0.11 crashes on them.
    """

    pools: list[KV]
    rest: list[Array]
    empty: list[jax.ShapeDtypeStruct]
    kinds: list[str]
    structure: Any

    def rebuild(self, pools, rest, shape: Callable[[tuple], tuple]):
        """The tree again; `shape` adds the leading axis to an empty array's, or takes it away."""
        empty = [jnp.zeros(shape(x.shape), x.dtype) for x in self.empty]
        parts = {"pools": iter(pools), "rest": iter(rest), "empty": iter(empty)}
        return jax.tree.unflatten(self.structure, [next(parts[kind]) for kind in self.kinds])


def _split(tree: Any) -> _Split:
    nodes, structure = jax.tree.flatten(tree, is_leaf=lambda node: isinstance(node, KV))
    kinds = ["pools" if isinstance(node, KV) else "rest" if node.size else "empty" for node in nodes]
    pools, rest, empty = (
        [node for node, its in zip(nodes, kinds, strict=True) if its == kind] for kind in ("pools", "rest", "empty")
    )
    return _Split(pools, rest, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in empty], kinds, structure)
