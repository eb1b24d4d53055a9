"""What holds on eight devices: run as a program of its own, since a process counts its devices once.

    python -m tests.models.devices [NAME ...]       eight devices; a JSON object: check -> what went wrong, or nothing
                                                    NAME: one of CHECKS, or any mode on any mesh, like "beams (1, 8)"
    python -m tests.models.devices HOST:PORT 0      the first of two processes with a device each

Every check is an equality with one device or with Hugging Face's golden tokens, in float32.
"""

import functools
import json
import re
import sys
import tempfile
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import paxattn as pax
from models import checkpoint, sharding, snapshot
from models.lanes import Lanes
from paxattn.mesh import deal, join
from tests.paths import GOLDEN
from tests.toys import Toy, prompts, tokens_of

if __name__ == "__main__":  # before anything asks for a device; pytest imports this module too
    jax.config.update("jax_default_matmul_precision", "highest")
    if ":" in "".join(sys.argv[1:]):
        jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60)
    else:
        jax.config.update("jax_num_cpu_devices", 8)

STATIC = ("attention", "max_new_tokens", "block_size", "num_beams", "num_return_sequences", "eos_token_id")
SIZES = ("attention", "max_num_seqs", "num_blocks", "block_size", "max_num_batched_tokens", "max_model_len")
KNOBS = {
    "temperature": np.array([0, 0.8, 1, 0, 1.2, 0.7], np.float32),
    "top_k": np.array([0, 5, 0, 3, 9, 0]),
    "repetition_penalty": np.array([1, 1, 1.3, 1.2, 1, 1], np.float32),
    "key": jax.random.key(7),
}
GREEDY = {"temperature": np.zeros(6, np.float32), "top_k": np.zeros(6, int)}
GREEDY |= {"repetition_penalty": np.ones(6, np.float32), "key": KNOBS["key"]}


def mesh(data, model):
    """Of the first devices."""
    return jax.sharding.Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))


@functools.cache
def tiny(name="tiny_llama"):
    """A golden model, its prompts packed, and what Hugging Face answers."""
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    ids = np.zeros((len(expected["prompts"]), 48), np.int32)
    for row, prompt in enumerate(expected["prompts"]):
        ids[row, : len(prompt)] = prompt
    return models.load(GOLDEN / name).model, ids, np.array([len(p) for p in expected["prompts"]]), expected


@functools.cache
def on(program, where):
    """A program jitted, on a mesh or on one device."""
    static = SIZES if program is pax.serve else STATIC
    return jax.jit(program if where is None else pax.on_mesh(program, where), static_argnames=static)


def tokens_in(state):
    """What the rows of a state have, prompts included."""
    return [ids[:n].tolist() for ids, n in zip(np.asarray(state.tokens), np.asarray(state.known), strict=True)]


def run(program, where, *args, name="tiny_llama", layers=None, **options):
    """A program on the golden model, or on its first layers: fewer compile faster."""
    model = tiny(name)[0] if layers is None else tiny(name)[0].first(layers)
    model = model if where is None else models.shard(model, where)
    if program is pax.speculate:
        options["drafter"] = pax.DraftModel(model.first(1))
    return on(program, where)(model, *args, **options)


def broken(cache):
    """How many invariants are broken on any shard, and blocks still held."""
    found = jax.vmap(pax.violations)(cache.table)
    return int(sum(jnp.sum(n) for n in found.values()) + jnp.sum(cache.table.blocks.refcount))


def greedy_is(where, name="tiny_llama"):
    """Greedy tokens are Hugging Face's, and nothing leaks."""
    _, ids, length, expected = tiny(name)
    found = run(pax.generate, where, ids, length, name=name, max_new_tokens=20, block_size=3, **GREEDY)
    assert tokens_of(found) == [tokens[:20] for tokens in expected["greedy"]]
    assert broken(found.cache) == 0
    pax.check(found.status)


def sampled_is(where):
    """Sampled tokens are those of one device."""
    _, ids, length, _ = tiny()
    options = {"max_new_tokens": 20, "block_size": 3, **KNOBS}
    one, many = (run(pax.generate, place, ids, length, **options) for place in (None, where))
    assert tokens_of(one) == tokens_of(many)
    assert broken(many.cache) == 0


def beams_are(where):
    """Sequences and scores of beam search are Hugging Face's."""
    _, ids, length, expected = tiny()
    options = {"max_new_tokens": 24, "block_size": 3, "num_beams": 4, "num_return_sequences": 4, "eos_token_id": 2}
    found = run(pax.beam_search, where, ids, length, **options)
    token_ids, lengths = np.asarray(found.token_ids), np.asarray(found.length)
    got = [[token_ids[i, j, : lengths[i, j]].tolist() for j in range(4)] for i in range(len(ids))]
    assert got == expected["beam4"]
    np.testing.assert_allclose(found.score, expected["beam4_scores"], atol=1e-4)
    assert broken(found.cache) == 0


def samples_share(where):
    """Several sequences a prompt come back in the order of the prompts, as many prompts as no hand holds evenly."""
    _, ids, length, _ = tiny()
    options = {"max_new_tokens": 4, "block_size": 4, "num_return_sequences": 2, "temperature": 0.9, "layers": 1}
    options |= {"attention": "reference", "key": jax.random.key(5)}
    one, many = (run(pax.generate, place, ids[:3], length[:3], **options) for place in (None, where))
    assert tokens_of(one) == tokens_of(many)
    assert len(many.length) == 6
    assert int(many.stats.tokens_fed.sum()) == int(one.stats.tokens_fed)  # what fills up a hand is not fed
    assert int(many.stats.blocks_allocated.sum()) == int(one.stats.blocks_allocated)


def speculation_is(where):
    """Guessing changes no greedy token."""
    _, ids, length, expected = tiny()
    found, tally = run(pax.speculate, where, ids, length, max_new_tokens=12, block_size=3)
    assert tokens_of(found) == [tokens[:12] for tokens in expected["greedy"]]
    assert tally.drafted.shape == (6,)
    assert broken(found.cache) == 0


def sampled_speculation_is(where):
    """What is guessed, accepted and drawn is what it is on one device."""
    _, ids, length, _ = tiny()
    options = {"max_new_tokens": 8, "block_size": 3, "layers": 1, "attention": "reference", **KNOBS}
    (one, guessed), (many, also) = (run(pax.speculate, place, ids, length, **options) for place in (None, where))
    assert tokens_of(one) == tokens_of(many)
    assert np.array_equal(guessed.accepted, also.accepted)


def serving_is(where):
    """Requests dealt to shards, waiting and preempted there, get the tokens that Hugging Face gives."""
    _, ids, length, expected = tiny()
    new = np.array([20, 5, 12, 9, 20, 3])
    requests = pax.Requests.create(ids, length, max_new_tokens=new)
    options = {"max_num_seqs": 3, "num_blocks": 17, "block_size": 4, "max_num_batched_tokens": 16, "max_model_len": 60}
    found = run(pax.serve, where, requests, **options)
    assert tokens_of(found) == [tokens[:n] for tokens, n in zip(expected["greedy"], new, strict=True)]
    assert broken(found.cache) == 0
    assert int(found.preemptions.sum()) > 0


def engine_is(where):
    """Requests that come and go on a mesh: tokens of Hugging Face, whichever shard they went to; nothing is kept."""
    model, ids, length, expected = tiny()
    sizes = {"max_num_seqs": 2, "max_model_len": 60, "block_size": 4, "num_blocks": 17, "max_num_batched_tokens": 16}
    it = pax.Engine(models.shard(model, where), steps=4, max_num_requests=2, mesh=where, **sizes)
    prompts = [ids[row, :n].tolist() for row, n in enumerate(length)]
    answers = [it.submit(prompt, max_new_tokens=12) for prompt in prompts]
    it.step()
    assert it.metrics()["running"] == 2 * where.shape["data"]
    assert it.cancel(answers[1])
    again = [it.submit(prompt, max_new_tokens=6) for prompt in prompts]
    it.run()
    assert answers[1].finish_reason == "cancelled"
    wanted = [tokens[:12] for tokens in expected["greedy"]] + [tokens[:6] for tokens in expected["greedy"]]
    found = [answer.token_ids for answer in answers + again]
    assert found[:1] + found[2:] == wanted[:1] + wanted[2:]
    assert found[1] == wanted[1][: len(found[1])]
    assert it.metrics()["output_tokens"] == sum(map(len, found))
    assert broken(it.service.cache) == 0


def replicas_are_identical():
    """In mid-flight, page tables and allocators of the devices of a model group are the same bits, and sound."""
    _, ids, length, _ = tiny()
    where = mesh(2, 4)
    model = models.shard(tiny()[0], where)
    (hands, lengths), lanes = deal((ids, length), 2), functools.partial(pax.spread, mesh=where)
    state = lanes(pax.start)(model, hands, lengths, max_new_tokens=9, block_size=3)
    state = lanes(pax.advance)(model, state, budget=19, steps=jnp.int32(9))
    assert not any(int(jnp.sum(n)) for n in jax.vmap(pax.violations)(state.cache.table).values())
    assert bool(state.cache.table.blocks.refcount.any())
    for leaf in (*jax.tree.leaves(state.cache.table), state.tokens, state.known, state.finish):
        groups = {}
        for shard in leaf.addressable_shards:
            groups.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        assert sorted(map(len, groups.values())) == [4, 4]
        assert all(np.array_equal(group[0], other) for group in groups.values() for other in group)
    assert join(state, where, len(ids)).tokens.shape == (6, 57)


def collectives_of_a_step():
    """Counted in the compiled program: two all-reduces a layer, one for the embedding, a gather of 3 numbers a row."""
    where, (model, ids, length, _) = mesh(1, 2), tiny()
    model, (hands, lengths) = models.shard(model, where), deal((ids, length), 1)
    state = pax.spread(pax.start, where)(model, hands, lengths, max_new_tokens=9, block_size=3)

    def plain(model, state):
        return pax.step(model, state, budget=6, shared=False, greedy=True)

    text = jax.jit(pax.spread(plain, where), donate_argnums=1).lower(model, state).compile().as_text()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (\S+) ({kinds})(?:-start)?\(", text)
    assert [kind for _, kind in found].count("all-reduce") == 2 * 3 + 1
    gathered = [shape for shape, kind in found if kind == "all-gather"]
    assert len(gathered) == 1
    assert re.match(r"f32\[(2,3|6),6\]", gathered[0]), gathered
    assert len(found) == 2 * 3 + 2


def programs_come_from_shapes():
    """Programs compiled ahead take the arrays that come; a model group of one device has no collective."""

    def plain(model, state):
        return pax.step(model, state, budget=6, attention="reference", shared=False, greedy=True)

    begin = functools.partial(pax.start, max_new_tokens=9, block_size=3)
    for where in (mesh(2, 2), mesh(2, 1)):
        lanes, model = Lanes(where, 6), models.shard(tiny()[0].first(1), where)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), model)
        hands = lanes.deal(tiny()[1:3])
        start = jax.jit(lanes.spread(begin)).lower(shapes, *hands).compile()
        step = jax.jit(lanes.spread(plain), donate_argnums=1)
        step = step.lower(shapes, lanes.outline(begin, shapes, *hands)).compile()
        state = step(model, start(model, *hands))
        assert state.stats.steps.tolist() == [1, 1]
        assert ("all-reduce" in step.as_text()) == (where.shape["model"] > 1)


def biases_count_once():
    """Biases after a cut product are added once, not once a device."""
    config = models.LlamaConfig(
        vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, max_position_embeddings=64, attention_bias=True,
        mlp_bias=True, sliding_window=5,
    )  # fmt: skip
    key = iter(jax.random.split(jax.random.key(0), 100))
    model = models.Llama(config, lambda name, shape: jax.random.normal(next(key), shape) * 0.4)

    def first(model, ids, length):
        state = pax.start(model, ids, length, max_new_tokens=2)
        return pax.step(model, state, budget=16, greedy=True, attention="reference").logprobs

    where, (ids, length) = mesh(1, 4), prompts((7, 3))
    many = pax.spread(first, where)(models.shard(model, where), ids[None], length[None])[0]
    np.testing.assert_allclose(many, jax.jit(first)(model, ids, length), atol=1e-4)


def any_model_runs_data_parallel():
    """A model that says nothing of sharding is whole on every device."""
    ids, length = prompts((1, 5, 9))
    options = {"max_new_tokens": np.array([5, 2, 7]), "block_size": 2, "attention": "reference"}
    many = pax.on_mesh(pax.generate, mesh(2, 2))(Toy.create(), ids, length, **options)
    one = jax.jit(functools.partial(pax.generate, max_model_len=16, **options))(Toy.create(), ids, length)
    assert tokens_of(one) == tokens_of(many)


def files_go_straight_to_their_devices():
    """Of safetensors and of Orbax files a device holds its slice; a checkpoint restores onto another mesh."""
    model = tiny()[0]
    for where in (mesh(2, 4), mesh(1, 2)):  # two KV heads: repeated on four devices, one each on two
        wanted = models.shard(model, where).parameters()
        loaded = models.load(GOLDEN / "tiny_llama", mesh=where).model.parameters()
        with tempfile.TemporaryDirectory() as folder:
            placed = models.shard(model, mesh(1, 2))
            checkpoint.save(Path(folder) / "saved", placed.config.to_dict(), placed.parameters())
            restored = models.load(Path(folder) / "saved", mesh=where).model.parameters()
        for name, array in wanted.items():
            for other in (loaded[name], restored[name]):
                assert other.sharding == array.sharding, name
                assert np.array_equal(other, array), name
        held = {shard.data.shape for shard in loaded["layers.0.gate_up"].addressable_shards}
        assert held == {(64, 2, 160 // where.shape["model"])}


@functools.cache
def over(program, where):
    """A program jitted for the lanes of a mesh, or for one device."""
    return jax.jit(program if where is None else pax.spread(program, where), static_argnames="budget")


def travel(folder, *stations):
    """A batch saved on each mesh, after eight steps, and gone on from on the next; the last one ends it."""
    _, ids, length, _ = tiny()
    given = ids, length, {**KNOBS, "key": jax.random.split(KNOBS["key"], 6)}
    for at, where in enumerate(stations):
        model = tiny()[0].first(1)
        model = model if where is None else models.shard(model, where)
        if at:
            state = snapshot.restore(folder / str(at - 1), model, where)
        else:
            ids, length, knobs = given if where is None else deal(given, where.shape["data"])
            start = pax.start if where is None else pax.spread(pax.start, where)
            state = start(model, ids, length, max_new_tokens=20, block_size=3, **knobs)
        more = jnp.int32(8 if at + 1 < len(stations) else 99)
        state = over(pax.advance, where)(model, state, budget=19, steps=more)
        snapshot.save(folder / str(at), state, model)
    return state


def snapshots_move():
    """Saved on one mesh, gone on from on another, with KV heads repeated or not: as if nothing had happened."""
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / name for name in ("stays", "model", "data")]
        stays = travel(folders[0], None)
        moved = travel(folders[1], None, mesh(1, 8), None)
        assert tokens_in(moved) == tokens_in(stays)
        assert [x.shape for x in jax.tree.leaves(moved)] == [x.shape for x in jax.tree.leaves(stays)]
        dealt = travel(folders[2], mesh(2, 4), mesh(2, 1))
        assert tokens_in(join(dealt, mesh(2, 1), 6)) == tokens_in(stays)
        assert not any(int(jnp.sum(n)) for n in jax.vmap(pax.violations)(dealt.cache.table).values())

        wide = models.shard(tiny()[0].first(1), mesh(1, 8))
        pool = snapshot.restore(folders[1] / "0", wide, mesh(1, 8)).cache.layers[0].k  # of one device: two KV heads
        assert {shard.data.shape[2] for shard in pool.addressable_shards} == {1}
        one = snapshot.restore(folders[1] / "0", tiny()[0].first(1)).cache.layers[0].k
        assert np.array_equal(pool[0], jnp.repeat(one, 4, axis=1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("orbax.checkpoint.experimental.v1.load", None)  # nothing is read
            with pytest.raises(snapshot.SnapshotError, match=r"saved on data=2, which cannot become data=1"):
                snapshot.restore(folders[2] / "0", tiny()[0].first(1))
            with pytest.raises(sharding.MeshError, match=r"`models.shard` it first"):
                snapshot.restore(folders[1] / "0", tiny()[0].first(1), mesh(1, 8))
            with pytest.raises(sharding.MeshError, match="num_attention_heads = 8"):
                snapshot.restore(folders[1] / "0", tiny()[0].first(1), mesh(1, 3))
            state = pax.start(Toy.create(), *prompts((3,)), max_new_tokens=2)
            snapshot.save(folders[0] / "toy", state, Toy.create())
            with pytest.raises(snapshot.SnapshotError, match=r"pools of 2 KV heads.*saved on model=1"):
                snapshot.restore(folders[0] / "toy", Toy.create(), mesh(1, 2))


def one_process_writes():
    """Several cannot share a snapshot's directory."""
    with pytest.raises(snapshot.SnapshotError, match="2 processes cannot write one snapshot"):
        snapshot.save("nowhere", jnp.ones(3), Toy.create())


def another_model_is_refused():
    """Each process finds out that its checkpoint is not the other's, before it reads a weight; the next load works."""
    mine = ("tiny_llama", "tiny_llama3_rope_tied")[jax.process_index()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["models.load"], "Llama", None)  # as an attribute the name is the function's
        with pytest.raises(
            ValueError, match=r"the model of process . is not that of process .*num_hidden_layers: .*rope_parameters: "
        ):
            models.load(GOLDEN / mine, mesh=mesh(1, 2))
    assert models.load(GOLDEN / "tiny_llama", mesh=mesh(1, 2)).model.config == tiny()[0].config


def what_does_not_fit_is_refused():
    """Heads, vocabulary and devices: each named in the error."""
    for devices, words in ((3, "num_attention_heads = 8.*intermediate_size = 160"), (5, "vocab_size = 384")):
        with pytest.raises(sharding.MeshError, match=words):
            models.shard(tiny()[0], mesh(1, devices))
    with pytest.raises(sharding.MeshError, match=r"`models.shard` it first"):
        pax.on_mesh(pax.generate, mesh(1, 4))(tiny()[0], *prompts((3,)), max_new_tokens=2)
    with pytest.raises(ValueError, match="takes 12 devices"):
        pax.make_mesh(3, 4)
    with pytest.raises(ValueError, match="a token id is 400"):
        pax.on_mesh(pax.generate, mesh(2, 1))(tiny()[0], np.array([[400]]), np.array([1]), max_new_tokens=2)


MODES = {
    "generate": greedy_is,
    "sampling": sampled_is,
    "samples": samples_share,
    "beams": beams_are,
    "speculation": speculation_is,
    "sampled speculation": sampled_speculation_is,
    "serving": serving_is,
    "engine": engine_is,
}

MATRIX = {
    f"{mode} {sizes}": lambda check=check, sizes=sizes: check(mesh(*sizes))
    for mode, check in MODES.items()
    for sizes in ((1, 2), (2, 1), (2, 2), (2, 4), (1, 8))
}
"""Every mode on every mesh: too long for each run of the suite, which has the ones in `CHECKS`."""

CHECKS = {
    "generate (2, 4)": MATRIX["generate (2, 4)"],
    "generate (1, 8)": MATRIX["generate (1, 8)"],
    "generate, tied embedding (2, 2)": lambda: greedy_is(mesh(2, 2), "tiny_llama3_rope_tied"),
    "sampling (2, 4)": MATRIX["sampling (2, 4)"],
    "samples (2, 2)": MATRIX["samples (2, 2)"],
    "beams (2, 4)": MATRIX["beams (2, 4)"],
    "speculation (2, 4)": MATRIX["speculation (2, 4)"],
    "sampled speculation (1, 2)": MATRIX["sampled speculation (1, 2)"],
    "serving (2, 4)": MATRIX["serving (2, 4)"],
    "engine (2, 2)": MATRIX["engine (2, 2)"],
    "replicas": replicas_are_identical,
    "collectives": collectives_of_a_step,
    "ahead": programs_come_from_shapes,
    "biases": biases_count_once,
    "any model": any_model_runs_data_parallel,
    "files": files_go_straight_to_their_devices,
    "snapshots": snapshots_move,
    "refusals": what_does_not_fit_is_refused,
}

SHARED = {
    name: MATRIX[name] for name in ("generate (1, 2)", "speculation (1, 2)", "beams (2, 1)", "serving (2, 1)")
} | {"a snapshot": one_process_writes, "another model": another_model_is_refused}
"""Of two processes."""


def main() -> None:
    """Runs all checks, or those that are named, of the whole matrix too."""
    results, names = {}, sys.argv[1:]
    checks = SHARED if jax.process_count() > 1 else {name: (CHECKS | MATRIX)[name] for name in names or CHECKS}
    for name, check in checks.items():
        try:
            check()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
