"""Beam search and parallel sampling on real checkpoints; Hugging Face transformers is the referee."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import paxattn as pax
from models.cli import main
from tests.paths import GOLDEN
from tests.toys import assert_same

TINY = ("tiny_llama", "tiny_llama3_rope_tied")


@functools.cache
def tiny(name):
    return models.load(GOLDEN / name).model, json.loads((GOLDEN / name / "expected.json").read_text())


@functools.partial(
    jax.jit, static_argnames=("num_beams", "num_return_sequences", "block_size", "max_new_tokens", "early_stopping")
)
def search(model, ids, length, length_penalty=1.0, eos_token_id=2, **options):
    return pax.beam_search(model, ids, length, length_penalty=length_penalty, eos_token_id=eos_token_id, **options)


def packed(prompts, width=48):
    ids = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return jnp.asarray(ids), jnp.array([len(p) for p in prompts])


def sequences(result):
    """[[(token ids, score)]]: a prompt's sequences, best first."""
    token_ids, length, score = map(np.asarray, (result.token_ids, result.length, result.score))
    places = [range(len(row)) for row in length]
    return [[(token_ids[i, j, : length[i, j]].tolist(), score[i, j]) for j in row] for i, row in enumerate(places)]


def agree(got, wanted, scores, atol=1e-3):
    assert [tokens for tokens, _ in got] == wanted
    # rtol: a float32 holds seven digits, and a negative length penalty makes scores of hundreds.
    np.testing.assert_allclose([score for _, score in got], scores, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("block_size", "together"), [(1, True), (3, False), (16, True), (16, False)])
def test_beams_equal_hugging_faces(name, block_size, together):
    model, expected = tiny(name)
    options = {"max_new_tokens": 24, "block_size": block_size}
    prompts = expected["prompts"]
    batches = [prompts] if together else [[prompt] for prompt in prompts]
    runs = [search(model, *packed(b), num_beams=4, num_return_sequences=4, **options) for b in batches]
    found = [beams for run in runs for beams in sequences(run)]
    for got, wanted, scores in zip(found, expected["beam4"], expected["beam4_scores"], strict=True):
        agree(got, wanted, scores)
    runs = [search(model, *packed(b), num_beams=3, length_penalty=2.0, **options) for b in batches]
    for got, (wanted, score) in zip((s for r in runs for s in sequences(r)), expected["beam3_lp2"], strict=True):
        agree(got, [wanted], [score])


CASES = json.loads((GOLDEN / "tiny_llama" / "beams.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, list(c.values())[:4])))
def test_beams_that_end_early_equal_hugging_faces(case):
    model, expected = tiny("tiny_llama")
    options = {name: value for name, value in case.items() if name not in ("sequences", "eos_token_id")}
    eos = jnp.array(case["eos_token_id"])
    n = case["num_beams"]
    result = search(model, *packed(expected["prompts"]), eos_token_id=eos, num_return_sequences=n, **options)
    for got, wanted in zip(sequences(result), case["sequences"], strict=True):
        agree(got, [w["token_ids"] for w in wanted], [w["score"] for w in wanted], atol=1e-4)
    ends = np.asarray(result.finish_reason) == pax.Finish.STOP
    last = np.asarray([[tokens[-1] for tokens, _ in beams] for beams in sequences(result)])
    assert (np.isin(last, case["eos_token_id"]) == ends).all()


@pytest.fixture(scope="module")
def lm():
    return models.load("smollm2-135m")


def test_real_weights(lm):
    rows = [r for r in json.loads((GOLDEN / "smollm2_expected.json").read_text())["rows"] if "beam4" in r]
    run = lm.generate([row["input_ids"] for row in rows], num_beams=4, num_return_sequences=4, max_new_tokens=24)
    for output, row in zip(run.outputs, rows, strict=True):
        agree([(s.token_ids, s.score) for s in output.sequences], row["beam4"], row["beam4_scores"])
        assert output.token_ids == row["beam4"][0]
        np.testing.assert_allclose(sum(output.logprobs) / 24, output.sequences[0].score, rtol=1e-5)
    assert run.stats["blocks_allocated"] == run.stats["blocks_freed"]
    assert 0 < run.stats["sharing_saving"] < 1
    lines = run.stats["sharing_steps"]
    assert len(lines) == run.stats["steps"]
    assert [sum(column) for column in zip(*lines, strict=True)] == [
        run.stats[name] for name in ("block_steps_held", "block_steps_shared", "block_steps_unshared", "blocks_copied")
    ]


def test_samples_on_the_command_line(capsys):
    tiny = ["--model", str(GOLDEN / "tiny_llama"), "--prompt-ids", "82,154,252", "--prompt-ids", "7"]
    options = ["--num-return-sequences", "3", "--max-new-tokens", "6", "--block-size", "2", "--json"]
    drawn = [*tiny, *options, "--temperature", "0.8"]
    assert main(["generate", *drawn]) == 0
    answers = json.loads(capsys.readouterr().out)["outputs"]
    assert [len(a["sequences"]) for a in answers] == [3, 3]
    for answer in answers:
        scores = [s["score"] for s in answer["sequences"]]
        assert scores == sorted(scores, reverse=True)
        assert {"token_ids", "text", "score"} <= set(answer["sequences"][0])
        assert answer["sequences"][0]["token_ids"] == answer["token_ids"]
    assert main(["generate", *drawn, "--max-num-seqs", "4"]) == 0
    assert_same(json.loads(capsys.readouterr().out)["outputs"], answers)  # whatever batch a prompt falls into


def test_beams_on_the_command_line(capsys):
    _, expected = tiny("tiny_llama")
    ids = ",".join(map(str, expected["prompts"][1]))
    command = ["generate", "--model", str(GOLDEN / "tiny_llama"), "--prompt-ids", ids, "--max-new-tokens", "24"]
    command += ["--num-beams", "4", "--num-return-sequences", "2", "--block-size", "3"]
    assert main([*command, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert [s["token_ids"] for s in out["outputs"][0]["sequences"]] == expected["beam4"][1][:2]
    assert out["stats"]["sharing_saving"] > 0.3
    assert main([*command, "--show-pages"]) == 0
    shown = capsys.readouterr().out
    assert "*" in shown.split("page map")[1]
    assert "sharing saved" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-beams", "2", "--temperature", "0.5"], "beam search takes no temperature"),
        (["--num-beams", "2", "--stop", "x"], "beam search takes no stop_strings"),
        (["--num-beams", "2", "--num-return-sequences", "3"], "at most num_beams = 2"),
        (["--num-beams", "0"], "num_beams is 0"),
        (["--num-return-sequences", "0"], "num_return_sequences is 0"),
        (["--length-penalty", "2"], "belong to beam search"),
        (["--num-beams", "5", "--max-num-seqs", "4"], "a prompt takes 5 rows"),
        (["--num-beams", "2", "--stream"], "a stream is one answer"),
    ],
)
def test_options_that_contradict_are_refused(capsys, options, message):
    assert main(["generate", "Hello", *options]) == 2
    assert message in capsys.readouterr().err
