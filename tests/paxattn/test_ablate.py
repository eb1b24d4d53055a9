"""The ablation call: rows say what was measured, tokens are compared, a file is taken up where it stopped."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxattn as pax
from models.llama import Llama, random_llama
from models.shapes import CONFIGS
from pallas_kernels import api
from paxattn.ablation import runs, sweep
from paxattn.ablation.cases import cases, label, swept
from paxattn.ablation.plot import plot
from paxattn.ablation.pool import PoolRun
from paxattn.ablation.runs import ModelRun, live_slots
from paxattn.ablation.table import Table, read
from paxattn.typing import Array, static, struct
from tests.toys import HEADS, Chain, Toy, prompts

TOY, CHAIN = Toy.create(), Chain(jnp.int32(7))
SMALL = {"rows": 2, "context": 9, "max_new_tokens": 6, "repeats": 1}
LENGTHS = pax.draw_lengths("alpaca", 40, longest=60)
POOL = {"pool_tokens": 512, "max_num_seqs": 8, "max_model_len": 128, "max_num_batched_tokens": 64}


def test_a_row_says_what_was_run_and_what_came():
    (row,) = pax.ablate(TOY, block_size=4, query_heads=HEADS, **SMALL)
    assert (row["block_size"], row["rows"], row["context"]) == (4, 2, 9)
    assert (row["status"], row["same_tokens"]) == ("OK", True)
    held = [-(-n // 4) * 4 for n in range(9, 14)]  # after the last step nobody holds anything
    assert row["wasted"] == pytest.approx(1 - sum(range(9, 14)) / sum(held))
    assert row["blocks_peak"] == 2 * 4
    assert row["table_bytes"] == 4 * (2 * 4 + 2 + 9)
    assert row["pool_bytes"] == 9 * 4 * TOY.cache_spec.bytes_per_token
    assert row["peak_bytes"] > row["pool_bytes"]
    assert min(row[k] for k in ("compile_s", "prefill_s", "decode_s", "kernel_us", "decode_tokens_per_s")) > 0
    assert row["decode_tokens_per_s"] == pytest.approx(2 * 5 / row["decode_s"])
    json.dumps(row)


@pytest.mark.parametrize("way", [{"num_return_sequences": 3, "temperature": 0.8}, {"num_beams": 3}])
def test_rows_that_share_a_prompt_save_blocks(way):
    (row,) = pax.ablate(CHAIN, block_size=4, **way, **SMALL)
    assert row["status"] == "OK"
    assert 0.2 < row["saving"] < 2 / 3
    assert row["blocks_copied"] > 0


def test_live_slots_count_a_shared_token_once():
    table = pax.PageTable.create(num_blocks=9, block_size=4, max_num_seqs=3, max_model_len=12)
    table, _, _ = pax.append(table, jnp.array([6, 0, 3]))
    table = pax.fork(table, jnp.array([0, 0, 2]))
    assert live_slots(table) == 9
    table, _, _ = pax.append(table, jnp.array([1, 0, 0]))  # row 0 has a tail of its own now, of three tokens
    assert live_slots(table) == 4 + 3 + 2 + 3


def test_a_pool_that_is_too_small_is_a_status_and_has_no_say():
    rows = pax.ablate(CHAIN, num_blocks=[7, 40], block_size=4, **SMALL)
    assert [(row["status"], row["same_tokens"]) for row in rows] == [("OUT_OF_BLOCKS", None), ("OK", True)]


def test_other_tokens_are_noticed(monkeypatch, tmp_path):
    tokens = {1: "a", 4: "b", 8: "a"}
    monkeypatch.setattr(runs, "prepare", lambda model, run, query_heads: run)
    monkeypatch.setattr(runs, "measure", lambda run, **options: {
        "status": "OK", "repeatable": True, "tokens_sha256": tokens[run.block_size]})  # fmt: skip
    options = {"block_size": [1, 4, 8], "save": tmp_path / "rows.json", "threads": 2, **SMALL}
    with pytest.raises(sweep.TokensDifferError, match=r"1 of 3 combinations.*'block_size': 4"):
        pax.ablate(CHAIN, **options)
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved == pax.ablate(CHAIN, exact=False, **options)
    assert [row["same_tokens"] for row in saved] == [True, False, True]


def test_other_questions_may_have_other_tokens():
    row = {"status": "OK", "repeatable": True, **label(ModelRun())}
    rows = [row | {"tokens_sha256": "a"}, row | {"tokens_sha256": "b", "temperature": 0.5},
            row | {"tokens_sha256": "b", "temperature": 0.5, "attention": "xla", "repeatable": False}]  # fmt: skip
    sweep.compare(rows)
    assert [r["same_tokens"] for r in rows] == [True, True, False]


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_a_file_is_taken_up_where_it_stopped(monkeypatch, tmp_path, suffix):
    path, asked = tmp_path / f"rows.{suffix}", []

    def measure(lengths, run):
        asked.append(run.block_size)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"wasted": 0.1 * len(asked), "saving": None, "repeatable": True, "steps": len(asked)}

    monkeypatch.setattr(sweep.pool, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        pax.ablate(LENGTHS, block_size=[1, 16, 32], save=path, **POOL)
    rows = pax.ablate(LENGTHS, block_size=[1, 16, 32], save=path, **POOL)
    assert asked == [1, 16, 32, 32]
    assert [row["steps"] for row in rows] == [1, 2, 4]
    assert rows == pax.ablate(LENGTHS, block_size=[1, 16, 32], save=path, **POOL)
    assert len(asked) == 4
    pax.ablate(LENGTHS[:, 1:], block_size=16, save=path, **POOL)
    assert len(asked) == 5, "another trace is another subject"
    assert rows == pax.ablate(LENGTHS, block_size=[1, 16, 32], save=path, **POOL)


def test_a_kernel_that_was_not_timed_is_measured_again(monkeypatch, tmp_path):
    asked = []

    def measure(timed, **_):
        asked.append(timed)
        return {"status": "OK", "repeatable": True, "tokens_sha256": "a"} | ({"kernel_us": 1.0} if timed else {})

    monkeypatch.setattr(runs, "prepare", lambda model, run, query_heads: query_heads is not None)
    monkeypatch.setattr(runs, "measure", measure)
    options = {"save": tmp_path / "rows.csv", "block_size": [4, 8]}
    first = pax.ablate(CHAIN, **options)
    timed = pax.ablate(CHAIN, query_heads=1, **options)
    assert [row["kernel_us"] for row in timed] == [1.0, 1.0]
    assert timed == [row | {"kernel_us": 1.0} for row in first]
    assert pax.ablate(CHAIN, query_heads=1, **options) == pax.ablate(CHAIN, **options) == timed
    assert read(tmp_path / "rows.csv") == timed, "in the place of the old rows"
    assert asked == [False, False, True, True]


@pytest.mark.parametrize("digits", ["12345678901e3456", "1234567890123456", "00000000000000_1"])
def test_digests_stay_text(tmp_path, digits):
    row = {"subject": digits, "tokens_sha256": digits, "steps": 3, "wasted": 1e-9, "num_blocks": None, "exact": True}
    table = Table(tmp_path / "rows.csv")
    table.put(row, row)
    table.write()
    assert read(tmp_path / "rows.csv") == [row]


def test_numbers_of_numpy_are_plain():
    options = {"block_size": np.array([4, 8]), "max_num_seqs": [np.int64(3)], "watermark": np.float32(0.25)}
    options |= {"pool_tokens": jnp.int32(512), "way": np.array("oracle")}
    rows = [case.asked for case in cases(PoolRun, options)]
    assert [[(type(row[name]), row[name]) for name in options] for row in rows] == [
        [(int, size), (int, 3), (float, 0.25), (int, 512), (str, "oracle")] for size in (4, 8)]  # fmt: skip
    assert label(PoolRun(watermark=np.float64(0.5)))["watermark"].__class__ is float


def test_every_field_of_a_pool_can_be_swept():
    from paxattn.serving.policy import first_come, shortest_prompt

    rows = pax.ablate(LENGTHS, admit=[first_come, shortest_prompt], watermark=[0.01, 1.0], **POOL)
    assert [(row["admit"], row["watermark"]) for row in rows] == [
        ("first_come", 0.01), ("first_come", 1.0), ("shortest_prompt", 0.01), ("shortest_prompt", 1.0),
    ]  # fmt: skip
    assert rows[0]["requests_at_once"] > rows[1]["requests_at_once"]
    assert rows[1]["preemptions"] == rows[3]["preemptions"] == 0
    assert rows[2]["mean_wait_steps"] != rows[0]["mean_wait_steps"]


@dataclasses.dataclass(frozen=True)
class Salted:
    """A config of the simplest kind."""

    salt: int = 7
    words: tuple[int, ...] = ()


def test_every_field_of_a_models_config_can_be_swept(tmp_path):
    made, told = [], []

    def make(config):
        made.append(config.salt)
        return Chain(jnp.int32(config.salt))

    options = {"make": make, "save": tmp_path / "rows.json", "block_size": [4, 8], **SMALL}
    rows = pax.ablate(Salted(), salt=[1, 2], watch=lambda row: told.append(dict(row)), **options)
    assert [(row["salt"], row["block_size"], row["same_tokens"]) for row in rows] == [
        (1, 4, True), (1, 8, True), (2, 4, True), (2, 8, True),
    ]  # fmt: skip
    assert rows == told
    assert rows[0]["tokens_sha256"] != rows[2]["tokens_sha256"]
    assert (swept(rows), made) == (["salt", "block_size"], [1, 2])
    again = pax.ablate(Salted(salt=2), watch=told.append, **options)
    assert [row["subject"] for row in again] == [rows[2]["subject"]] * 2
    assert len(told) == 4, "nothing is measured twice"


def test_a_config_that_changes_no_array_is_another_model(monkeypatch):
    monkeypatch.setattr(runs, "prepare", lambda model, run, query_heads: run)
    monkeypatch.setattr(runs, "measure", lambda run, **_: {
        "status": "OK", "repeatable": True, "tokens_sha256": run.seed})  # fmt: skip
    rows = pax.ablate(Salted(), make=lambda config: CHAIN, words=[(1, 2), (3,)], **SMALL)
    assert [row["words"] for row in rows] == ["(1, 2)", "(3,)"]
    assert rows[0]["subject"] != rows[1]["subject"]


def test_every_size_of_a_kernel_can_be_swept(monkeypatch):
    """It reaches the call in every layer, though layers are traced once for each attention."""
    seen = []

    def spy(*given, sizes=None, **options):
        seen.append(sizes)
        return api.xla.paged_attention(*given, **options)

    monkeypatch.setitem(api.IMPLEMENTATIONS, "mosaic", spy)
    model = random_llama(dataclasses.replace(CONFIGS["tiny"], num_hidden_layers=1), jax.random.key(0))
    state = pax.start(model, *prompts((3, 2)), max_new_tokens=4)
    asked = {"stages": 3, "kv_tile": [64, 128]}
    for case in cases(ModelRun, asked):
        jax.eval_shape(functools.partial(pax.step, budget=4, attention=case.run.attention), model, state)
    assert seen == [{"stages": 3, "kv_tile": 64}, {"stages": 3, "kv_tile": 128}]
    rows = [case.asked for case in cases(ModelRun, asked)]
    assert [(row["kv_tile"], row["attention"]) for row in rows] == [
        (64, "mosaic(stages=3, kv_tile=64)"), (128, "mosaic(stages=3, kv_tile=128)"),
    ]  # fmt: skip
    assert swept(rows) == ["kv_tile"]


def test_ways_are_ordered_as_they_must_be():
    rows = pax.ablate(LENGTHS, way=["reserve-max", "power-of-two", "oracle", "paged"], **POOL)
    wasted = {row["way"]: row["wasted"] for row in rows}
    assert wasted["reserve-max"] > wasted["power-of-two"] > wasted["oracle"] > wasted["paged"]
    (single,) = pax.ablate(LENGTHS, block_size=1, **POOL)
    assert single["wasted"] == 0
    (shared,) = pax.ablate(LENGTHS, num_return_sequences=2, **POOL)
    assert 0 < shared["saving"] < 0.5


@pytest.mark.parametrize(("subject", "options", "message"), [
    (CHAIN, {"blok_size": 3}, "unknown options blok_size; ModelRun has rows, context.*; mosaic has kv_tile"),
    (Salted(), {"make": CHAIN, "pepper": 3}, "unknown options pepper; ModelRun has rows.*; Salted has salt, words"),
    (Salted(), {"salt": [1, 2]}, "Salted is no model: say with make="),
    (CHAIN, {"salt": [1, 2]}, "unknown options salt; ModelRun has"),
    (CHAIN, {"attention": ["auto", "xla"], "kv_tile": 64}, "kv_tile is a size of \"mosaic\"; attention 'xla' has none"),
    (CHAIN, {"workers": 3}, "workers is 3, must be at most 2"),
    (LENGTHS, {"rows": 3, "kv_tile": 64}, "unknown options kv_tile, rows; PoolRun has way, block_size"),
    (LENGTHS, {"block_size": []}, "block_size is an empty list"),
    (LENGTHS, {"way": "static"}, "way 'static' is unknown"),
    (LENGTHS, {"pool_tokens": 30}, "a request takes"),
    (LENGTHS, {"max_num_batched_tokens": 3}, "at least max_num_seqs"),
    (LENGTHS[0], {}, r"they must be integers \[2, R\]"),
    (LENGTHS - 1, {}, "a length is below 1"),
    (CHAIN, {"max_new_tokens": 1}, "max_new_tokens is 1"),
    (CHAIN, {"num_beams": 2, "temperature": 0.5}, "beams are neither"),
    (LENGTHS, {"save": "rows.txt"}, "must end in .json or .csv"),
    (LENGTHS, {"admit": [lambda queue: queue.ticket, lambda queue: -queue.ticket]}, "are both called admit=<lambda>"),
    (LENGTHS, {"keep": lambda queue: queue.ticket, "save": "rows.json"}, "a lambda has none"),
    (CHAIN, {"block_size": [4, 8, 4], "rows": 3}, "are both called block_size=4, rows=3: give each value once"),
    (CHAIN, {"block_size": [1, 2.0]}, "block_size is 2.0, must be an integer"),
    (CHAIN, {"block_size": 0}, r"block_size is 0, must be an integer in \[1, 2147483647\]"),
    (CHAIN, {"rows": 2**31}, "rows is 2147483648, must be"),
    (CHAIN, {"context": "x"}, "context is 'x', must be"),
    (CHAIN, {"num_beams": True}, "num_beams is True, must be"),
    (CHAIN, {"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0, must be"),
    (CHAIN, {"seed": -1}, "seed is -1, must be"),
    (CHAIN, {"temperature": [0.0, float("nan")]}, "temperature is nan, must be a number"),
    (CHAIN, {"temperature": "hot"}, "temperature is 'hot', must be a number"),
    (CHAIN, {"num_blocks": 3, "context": 9, "block_size": 4}, r"num_blocks is 3, must be an integer in \[4"),
    (CHAIN, {"attention": "flash"}, "attention 'flash' is unknown; choose one of auto, reference"),
    (CHAIN, {"attention": None}, "attention None is unknown"),
    (CHAIN, {"repeats": 0}, "repeats is 0, must be"),
    (CHAIN, {"threads": 1.5}, "threads is 1.5, must be"),
    (TOY, {"query_heads": 3}, "query_heads is 3, must be a multiple of the model's 2 KV heads"),
    (TOY, {"query_heads": "4"}, "query_heads is '4', must be"),
    (LENGTHS, {"query_heads": 4}, "query_heads is 4, but lengths have no attention"),
    (LENGTHS, {"admit": "fifo"}, "admit is 'fifo', must be an order"),
    (LENGTHS, {"watermark": 1.5}, r"watermark is 1.5, must be a number in \[0, 1\]"),
    (LENGTHS, {"max_num_seqs": None}, "max_num_seqs is None, must be"),
    (LENGTHS[:, :0], {}, "R at least 1"),
])  # fmt: skip
def test_wrong_questions_are_refused(subject, options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        pax.ablate(subject, **options)


def test_lengths_fit_every_pool_before_any_is_measured(monkeypatch):
    monkeypatch.setattr(sweep.pool, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match="a request takes"):
        pax.ablate(LENGTHS, **POOL | {"pool_tokens": [512, 30]})
    with pytest.raises(ValueError, match="a request takes 2048 tokens of room"):  # what is reserved, not what is used
        pax.ablate(np.array([[1000], [500]]), way="power-of-two", pool_tokens=1600)


@pytest.mark.parametrize(("name", "text"), [
    ("rows.json", "{"), ("rows.json", '{"rows": []}'), ("rows.json", "[1]"),
    ("rows.csv", "a,b\n1,2\n3\n"), ("rows.csv", "a,b\n1,2,3\n"), ("rows.csv", "a\n" + "1" * 200_000),
])  # fmt: skip
def test_a_file_of_another_form_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        pax.ablate(LENGTHS, save=tmp_path / name, **POOL)
    assert (tmp_path / name).read_text() == text


def test_a_plot_has_a_panel_a_figure_and_a_line_a_series(tmp_path):
    pytest.importorskip("matplotlib")
    row = label(PoolRun()) | {"wasted": 0.1, "saving": 0.0, "steps": 9}
    rows = [row | {"block_size": size, "way": way} for size in (1, 16) for way in ("paged", "oracle")]
    figure = plot(rows, tmp_path / "a" / "plot.svg")
    assert [axes.get_title() for axes in figure.axes] == ["memory wasted, %"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["block_size 1", "block_size 16"]
    assert (tmp_path / "a" / "plot.svg").read_text().lstrip().startswith("<?xml")
    with pytest.raises(ValueError, match="some field has two values"):
        plot(rows[:1])
    with pytest.raises(ValueError, match="panel 'speed' is unknown"):
        plot(rows, panels=["speed"])
    with pytest.raises(ValueError, match="no row has more than zero of saving; choose other panels"):
        plot(rows, panels=["saving"])
    with pytest.raises(ValueError, match="not every row has a field 'nope'; choose of way, block_size"):
        plot(rows, by=["nope"])
    with pytest.raises(ValueError, match="some field has two values"):
        plot([{"wasted": 0.1}, {"wasted": 0.2}])
    for path in (tmp_path / "plot.doc", tmp_path, tmp_path / "a" / "plot.svg" / "plot.svg"):
        with pytest.raises(ValueError, match=str(path)):
            plot(rows, path)


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"paxattn\[notebooks\]"):
        plot([])


@struct
class Windowed:
    """Numbers and a setting beside them."""

    salt: Array
    window: int = static(default=3)

    vocab_size, cache_spec = CHAIN.vocab_size, CHAIN.cache_spec


def test_subjects_are_told_apart():
    assert sweep.fingerprint(LENGTHS) != sweep.fingerprint(LENGTHS + np.int32(1))
    assert sweep.fingerprint(TOY) == sweep.fingerprint(Toy.create()) != sweep.fingerprint(Toy.create(1))
    weights = jnp.arange(99, dtype=jnp.float32).reshape(9, 11) / 7
    others = [weights, weights.at[8, 9].add(1e-6), weights[::-1], weights.T, weights.astype(jnp.bfloat16), weights > 3,
              weights + 1j, weights + 2j, jax.random.key(0), jax.random.key(1)]  # fmt: skip
    names = [sweep.fingerprint(model) for model in (*map(Chain, others), Windowed(weights), Windowed(weights, 4))]
    assert len(set(names)) == len(names)
    assert names[0] == sweep.fingerprint(Chain(weights * 1)) == sweep.fingerprint(pax.pack(Chain(weights)))


def test_a_model_with_anothers_arrays_is_another():
    config = dataclasses.replace(CONFIGS["tiny"], num_hidden_layers=1)
    arrays = random_llama(config, jax.random.key(0)).parameters()
    changes = ({}, {"sliding_window": 4}, {"rope": dataclasses.replace(config.rope, rope_theta=2.0)})
    models = [Llama(dataclasses.replace(config, **change), lambda name, _: arrays[name]) for change in changes]
    names = [sweep.fingerprint(model) for model in models]
    assert len(set(names)) == 3
    assert names == [sweep.fingerprint(pax.pack(model)) for model in models]


def test_a_config_outside_the_tree_counts(monkeypatch):
    names = [sweep.fingerprint(CHAIN)]
    for salt in (8, 9):
        monkeypatch.setattr(Chain, "config", Salted(salt), raising=False)
        names.append(sweep.fingerprint(CHAIN))
    assert len(set(names)) == 3
