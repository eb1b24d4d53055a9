"""Snapshots: what goes on from a restored state is what would have gone on, and nothing else is ever gone on from."""

import collections
import dataclasses
import functools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import paxattn as pax
from models import checkpoint, snapshot
from paxattn.decoding import beam, speculative
from paxattn.decoding.step import feed
from paxattn.serving.loop import most, open_service, run
from paxattn.serving.queue import put
from tests.paths import ROOT
from tests.toys import Chain, prompts, tokens_of

CHAIN = Chain(jnp.int32(3))
SIZES = {"max_model_len": 48, "block_size": 4}


@functools.cache
def batch():
    state = pax.start(CHAIN, *prompts((9, 21)), max_new_tokens=16, temperature=jnp.array([0.0, 2.0]), **SIZES)
    return state, jax.jit(lambda s, n: pax.advance(CHAIN, s, budget=16, steps=n)), lambda s: s.running


@functools.cache
def search():
    found = beam.begin(CHAIN, *prompts((9, 21)), num_beams=3, max_new_tokens=12, **SIZES)
    found = jax.jit(lambda s: beam.branch(CHAIN, s, budget=32))(found)
    return found, jax.jit(lambda s, n: beam.advance(CHAIN, s, steps=n)), lambda s: s.rows.running


@functools.cache
def service():
    """A pool too small for all: what waits and what was preempted is saved, too."""
    ids, length = prompts((9, 5, 14, 3))
    made = open_service(CHAIN, lines=4, max_num_seqs=3, num_blocks=9, trace=40, **SIZES)
    line = jnp.arange(4, dtype=jnp.int32)
    requests = pax.Requests.create(ids, length, max_new_tokens=14, temperature=2.0)
    made = dataclasses.replace(made, queue=put(made.queue, requests, line, line, most(made)))
    turn = jax.jit(lambda s, n: run(CHAIN, s, budget=16, policy=pax.Policy(), steps=n))
    return made, turn, lambda s: s.queue.unfinished


def bits(state):
    """Every leaf as plain numpy; keys as their data."""
    leaves, structure = jax.tree.flatten(state)
    isolated = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]
    return structure, [np.asarray(x) for x in isolated]


def assert_same(left, right):
    (left_structure, left), (right_structure, right) = bits(left), bits(right)
    assert left_structure == right_structure
    for a, b in zip(left, right, strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A batch after five steps."""
    state, turn, _ = batch()
    path = tmp_path_factory.mktemp("snapshots") / "step5"
    snapshot.save(path, turn(state, 5), CHAIN)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


# --- what is restored goes on ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [batch, search, service])
def test_a_restored_run_goes_on_bit_for_bit(make, tmp_path):
    state, turn, going = make()
    middle = turn(state, 5)
    assert bool(going(middle).any())
    snapshot.save(tmp_path / "middle", middle, CHAIN)
    end = turn(middle, 999)
    assert not bool(going(end).any())
    for _ in range(2):  # a snapshot may be gone on from as often as one likes
        restored = snapshot.restore(tmp_path / "middle", CHAIN)
        assert_same(restored, middle)
        assert_same(turn(restored, 999), end)


def test_branches_differ_where_their_keys_do(saved):
    state, turn, _ = batch()
    middle = snapshot.restore(saved, CHAIN)
    again = turn(state, 5)
    assert_same(middle, again)
    other = dataclasses.replace(middle.sampling, key=jax.random.split(jax.random.key(9), 2))
    branch = turn(dataclasses.replace(middle, sampling=other), 999)
    end = turn(middle, 999)
    known = middle.known[1]
    np.testing.assert_array_equal(branch.tokens[0], end.tokens[0], "row 0 is greedy")
    np.testing.assert_array_equal(branch.tokens[1, :known], end.tokens[1, :known])
    assert (branch.tokens[1] != end.tokens[1]).any()


def test_any_tree_of_states_and_arrays(tmp_path):
    table = pax.PageTable.create(num_blocks=5, block_size=2, max_num_seqs=2, max_model_len=6)
    odd = np.array([np.nan, -0.0, np.inf], np.float32)
    keys = jax.random.split(jax.random.key(1, impl="rbg"), 3)
    drafting = speculative.begin(pax.DraftModel(CHAIN), batch()[0], k=2)
    tree = {
        "cache": pax.Cache(table, ()),
        "drafting": drafting,
        "list": [jnp.bfloat16(1.5), None],
        "tuple": (odd, keys, np.zeros((0, 3), np.float32)),
    }
    snapshot.save(tmp_path / "tree", tree, CHAIN)
    restored = snapshot.restore(tmp_path / "tree", CHAIN)
    assert_same(restored, jax.tree.map(jnp.asarray, tree))
    assert jax.random.key_impl(restored["tuple"][1]) == "rbg"


@pytest.mark.parametrize(
    "state",
    [
        {
            "a.b": jnp.ones(2),
            "a": {"b": jnp.zeros(3), "": {"": jnp.arange(3)}},
            "a%2Eb": jnp.arange(2),
            "/": jnp.ones(1),
        },
        {"none": jnp.zeros((0, 3)), "pool": pax.KV(*jnp.zeros((2, 0, 1, 4, 1)))},
        (),
    ],
    ids=["keys that look alike", "arrays without elements", "nothing"],
)
def test_states_of_odd_shape(state, tmp_path):
    snapshot.save(tmp_path / "state", state, CHAIN)
    assert_same(snapshot.restore(tmp_path / "state", CHAIN), state)


def test_sixty_four_bits_come_back_or_are_refused(tmp_path):
    """Orbax reads in threads of its own, which know the setting of the process alone."""
    state = np.array([2**40 + 5]), np.zeros(0)
    with jax.enable_x64(True):
        snapshot.save(tmp_path / "wide", state, CHAIN)
        with pytest.raises(
            snapshot.SnapshotError, match=r"holds state\.0 in int64, which was read as int32; set jax_enable"
        ):
            snapshot.restore(tmp_path / "wide", CHAIN)
    with pytest.raises(
        snapshot.SnapshotError, match="holds float64, int64, which JAX would cut here; enable jax_enable"
    ):
        snapshot.restore(tmp_path / "wide", CHAIN)
    jax.config.update("jax_enable_x64", True)
    try:
        assert_same(snapshot.restore(tmp_path / "wide", CHAIN), state)
    finally:
        jax.config.update("jax_enable_x64", False)


IN_ANOTHER_PROCESS = """
import dataclasses, json, sys
import jax, jax.numpy as jnp
import paxattn as pax
from models import snapshot
from paxattn.decoding.step import settle
from tests.toys import Chain, tokens_of

model = Chain(jnp.int32(3))
state, newest = snapshot.restore(sys.argv[1], model)
everyone = jnp.zeros(4, jnp.int32)


@jax.jit
def go_on(state, newest):
    cache = pax.Cache(pax.fork(state.cache.table, everyone), state.cache.layers)
    state = settle(model, dataclasses.replace(state, cache=cache), newest[everyone], picks=state.running)
    return pax.finish(pax.advance(model, state, budget=16), width=12)


result = go_on(state, newest)
print(json.dumps([tokens_of(result), int(result.stats.tokens_fed), int(result.stats.blocks_copied)]))
"""


def test_a_prompt_is_fed_once_and_forked_in_another_process(tmp_path):
    ids, length = prompts((21,))
    options = {"max_new_tokens": 12, "num_return_sequences": 4, "temperature": 2.0, **SIZES}
    state = pax.start(CHAIN, ids, length, **options)
    fed = jax.jit(functools.partial(feed, CHAIN, budget=32))(state, jnp.array([21, 0, 0, 0]))
    snapshot.save(tmp_path / "prompt", fed, CHAIN)
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / "prompt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    here = jax.jit(lambda: pax.generate(CHAIN, ids, length, **options))()
    assert json.loads(done.stdout) == [tokens_of(here), 21 + 4 * 11, 3]
    assert int(here.stats.tokens_fed) == 21 + 4 * 11


# --- what must not be gone on from -----------------------------------------------------------------------


def chunk(path):
    """The largest file, which holds arrays."""
    return max((p for p in (path / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("which", ["params", "config.json", "manifest.json"])
@pytest.mark.parametrize("at", [0.2, 0.7])
def test_a_flipped_byte_is_refused(copy, which, at):
    path = chunk(copy) if which == "params" else copy / which
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(snapshot.SnapshotError, match=r"changed|missing|cannot be read|version"):
        snapshot.restore(copy, CHAIN)


def test_a_missing_chunk_is_refused(copy):
    gone = chunk(copy)
    gone.unlink()
    with pytest.raises(snapshot.SnapshotError, match=f"missing: {gone.relative_to(copy).as_posix()}"):
        snapshot.restore(copy, CHAIN)


def test_a_truncated_file_is_refused(copy):
    path = chunk(copy)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(snapshot.SnapshotError, match=f"changed: {path.relative_to(copy).as_posix()}"):
        snapshot.restore(copy, CHAIN)


@pytest.mark.parametrize("salt", [4, -3, jnp.array([3, 0])])
def test_another_models_snapshot_is_refused(saved, salt):
    with pytest.raises(snapshot.SnapshotError, match=r"another model.*Load the model that it was saved with"):
        snapshot.restore(saved, Chain(jnp.asarray(salt, jnp.int32)))


def test_what_is_no_snapshot_is_refused(tmp_path):
    checkpoint.save(tmp_path / "model", {"hidden_size": 8}, {"embed": jnp.ones(3)})
    with pytest.raises(snapshot.SnapshotError, match="no snapshot but a model"):
        snapshot.restore(tmp_path / "model", CHAIN)
    with pytest.raises(snapshot.SnapshotError, match="cannot be read"):
        snapshot.restore(tmp_path, CHAIN)


def test_nothing_is_overwritten(saved):
    with pytest.raises(snapshot.SnapshotError, match="exists and is not overwritten"):
        snapshot.save(saved, jnp.ones(3), CHAIN)


def test_a_snapshot_is_no_model(saved):
    with pytest.raises(
        models.CheckpointError, match=r"step5 holds no model but a snapshot; restore it with models.snap"
    ):
        models.load(saved)


Pair = collections.namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (CHAIN, "is a Chain; a snapshot holds arrays and structs"),
        (Pair(jnp.ones(1), jnp.ones(1)), "is a Pair; a snapshot holds arrays and structs of paxattn, in plain tuples"),
        (collections.OrderedDict(a=jnp.ones(1)), "is a OrderedDict; "),
        (np.ma.array([1.0, 2.0]), "is a MaskedArray; "),
        (3, "is a int; "),
        ({1: jnp.ones(1)}, "has the key 1; the keys of a dict must be strings"),
        (np.array([2**40 + 5]), "is of int64, which JAX would cut to int32; convert it, or enable jax_enable_x64"),
        (np.ones(2), "is of float64, which JAX would cut to float32"),
        (np.zeros((0, 3)), "is of float64, which JAX would cut to float32"),
        (np.array(["a"]), "is of <U1, which JAX does not have; leave it out"),
        (pax.sinks_and_window(1, 4), "score is static and a SinksAndWindow; of static fields only numbers"),
    ],
)
def test_what_cannot_be_restored_is_not_saved(part, words, tmp_path):
    with pytest.raises(snapshot.SnapshotError, match=f"^state.0.1[ .]{words}"):
        snapshot.save(tmp_path / "parent" / "no", ((jnp.ones(3), part),), CHAIN)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_orbax_does_not_store_is_refused(tmp_path):
    with pytest.raises(snapshot.SnapshotError, match=r"of no dtype that Orbax stores \(.*uint4.*\); convert it"):
        snapshot.save(tmp_path / "no", jnp.ones(3, "uint4"), CHAIN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("told", [{"dict": [], "more": 1}, {"Pair": []}, 3, "a"])
def test_what_another_version_described_is_refused(told):
    with pytest.raises(snapshot.SnapshotError, match="unknown here; restore it with the version that saved it"):
        snapshot._rebuild(told, {})


@pytest.mark.parametrize("where", ["paxattn.blocks:Blocks", "paxattn.blocks:Gone", "paxattn.gone:X", "os:PathLike"])
def test_another_versions_structs_are_refused(where):
    with pytest.raises(snapshot.SnapshotError, match=f"a {where} of other; here it has"):
        snapshot._rebuild({"struct": where, "fields": {"other": None}}, {})


# --- the fingerprint -------------------------------------------------------------------------------------


def test_a_fingerprint_follows_every_parameter():
    weights = jnp.arange(24, dtype=jnp.float32).reshape(4, 6) / 7
    names = [snapshot.fingerprint(Chain(w)) for w in (
        weights, weights.at[2, 3].add(1e-6), weights[::-1], weights.T, weights.astype(jnp.bfloat16), weights * 1,
    )]  # fmt: skip
    assert names[-1] == names[0]
    assert len(set(names)) == len(names) - 1
