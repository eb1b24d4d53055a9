"""The command line as a user meets it."""

import json
import types

import pytest

import models
from models.cli import main, parser
from models.lm import LM
from models.watch import watch
from paxattn.ablation import runs
from tests.paths import GOLDEN

TINY = str(GOLDEN / "tiny_llama")
ONE = ("generate", "--prompt-ids", "1", "--model", TINY)


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_gives_the_golden_tokens(capsys):
    row = json.loads((GOLDEN / "smollm2_expected.json").read_text())["rows"][0]
    code, out, _ = run(capsys, "generate", row["text"], "--no-chat", "--json")
    assert code == 0
    (answer,) = json.loads(out)["outputs"]
    assert answer["token_ids"] == row["greedy"]
    assert answer["prompt_ids"] == row["input_ids"]
    assert set(answer) == {"prompt_ids", "token_ids", "text", "finish_reason", "logprobs"}
    assert len(answer["logprobs"]) == len(row["greedy"])


def test_raw_ids_and_files(capsys, tmp_path):
    expected = json.loads((GOLDEN / "tiny_llama" / "expected.json").read_text())
    ids = [a for p in expected["prompts"][:2] for a in ("--prompt-ids", ",".join(map(str, p)))]
    code, out, _ = run(capsys, "generate", *ids, "--model", TINY, "--max-new-tokens", 6, "--block-size", 3, "--json")
    assert code == 0
    assert [o["token_ids"] for o in json.loads(out)["outputs"]] == [g[:6] for g in expected["greedy"][:2]]
    (tmp_path / "many.jsonl").write_text('{"prompt": "Hello"}\n{"prompt": "Bye"}\n')
    code, out, _ = run(capsys, "generate", "--prompt-file", tmp_path / "many.jsonl", "--max-new-tokens", 2, "--json")
    assert code == 0
    assert len(json.loads(out)["outputs"]) == 2


def test_the_page_map_and_the_saving_are_shown(capsys):
    code, out, _ = run(capsys, "generate", "--prompt-ids", "1,2,3", "--prompt-ids", "4", "--model", TINY,
                       "--show-pages", "--block-size", 4)  # fmt: skip
    assert code == 0
    assert "row A" in out
    assert "row B" in out
    assert "% saved" in out


def test_the_page_map_of_short_answers(capsys):
    """Each step is seen: what a row holds for two steps is drawn, and what nobody could see is said."""
    common = ("generate", "--prompt-ids", "1,2,3", "--model", TINY, "--show-pages", "--max-new-tokens")
    assert "row A" in run(capsys, *common, 2)[1]
    assert "nothing to draw: every answer ended in the step" in run(capsys, *common, 1)[1]


def test_a_stream_that_ends_early_says_so(capsys, monkeypatch):
    def pieces(*_, **__):
        yield "one "
        yield "two"
        return "out_of_blocks"

    monkeypatch.setattr(models.LM, "stream", pieces)
    out = run(capsys, "generate", "--prompt-ids", "1", "--model", TINY, "--stream")[1]
    assert out == "one two\n[ended early: out_of_blocks]\n"


def test_a_line_of_json_ends_where_its_text_does_not(capsys, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(models.LM, "encode", lambda self, prompt, **_: asked.append(prompt) or [1])
    lines = [{"prompt": "one\u2028line ü"}, {"prompt": [3, 4]}]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "x.jsonl").write_bytes(text.encode())
    common = ("generate", "--model", TINY, "--max-new-tokens", 1)
    assert run(capsys, *common, "--prompt-file", tmp_path / "x.jsonl")[0] == 0
    assert asked == [line["prompt"] for line in lines]


@pytest.mark.parametrize(
    "line", ['{"prompt": 5}', '{"prompt": null}', '{"prompt": [1.9, true]}', '{"text": "a"}', "[1]", "{"]
)
def test_prompts_of_a_file_are_texts_or_ids(capsys, tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line)
    code, out, err = run(capsys, "generate", "--prompt-file", tmp_path / "x.jsonl", "--model", TINY)
    assert (code, out) == (2, "")
    assert err == f"paxattn: a line is {line!r}, must be an object whose 'prompt' is a text or a list of token ids.\n"


def test_float16_everywhere(capsys, tmp_path):
    kind, out = ("--dtype", "float16"), tmp_path / "out"
    assert run(capsys, "convert", TINY, out, *kind)[0] == 0
    assert json.loads(run(capsys, "inspect", out, *kind, "--json")[1])["bytes"] == 2 * 203_200
    assert run(capsys, "generate", "--model", out, "--prompt-ids", "1", "--max-new-tokens", 2, *kind)[0] == 0
    assert parser().parse_args(["serve-bench", *kind]).dtype == "float16"


def test_more_prompts_than_rows_go_through_the_engine(capsys, tmp_path):
    expected = json.loads((GOLDEN / "tiny_llama" / "expected.json").read_text())
    ids = [a for p in expected["prompts"] for a in ("--prompt-ids", ",".join(map(str, p)))]
    code, out, err = run(
        capsys, "generate", *ids, "--model", TINY, "--max-new-tokens", 6, "--max-num-seqs", 1, "--json"
    )
    assert code == 0
    assert err == "", "no bar where nobody looks"
    assert [o["token_ids"] for o in json.loads(out)["outputs"]] == [g[:6] for g in expected["greedy"]]
    assert json.loads(out)["stats"]["preemptions"] == 0


def test_serve_bench(capsys):
    sizes = ("--requests", 9, "--low", 3, "--high", 20, "--max-num-seqs", 4, "--max-num-batched-tokens", 16)
    code, out, _ = run(capsys, "serve-bench", "--model", TINY, *sizes, "--num-blocks", 7, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["requests"] == 9
    assert facts["peak_blocks"] <= 6
    assert 27 <= facts["output_tokens"] <= 180
    assert facts["output_tokens_per_s"] == pytest.approx(facts["output_tokens"] / facts["seconds"])
    assert facts["seconds"] == pytest.approx(facts["prompt_seconds"] + facts["decode_seconds"])
    assert run(capsys, "serve-bench", "--shapes", "tiny", *sizes)[1].count("\n") == len(facts)


def test_ablate(capsys):
    sizes = ("--rows", 2, "--context", 5, "--max-new-tokens", 4, "--repeats", 1, "--set", "max_num_batched_tokens=7")
    code, out, _ = run(capsys, "ablate", "--model", TINY, "--block-size", "1,8", *sizes, "--json")
    assert code == 0
    rows = json.loads(out)
    assert [(row["block_size"], row["max_num_batched_tokens"], row["same_tokens"]) for row in rows] == [
        (1, 7, True), (8, 7, True)]  # fmt: skip
    assert rows[0]["wasted"] == 0 < rows[1]["wasted"]
    assert min(row["kernel_us"] for row in rows) > 0


def test_ablate_the_shapes_of_a_model(capsys, monkeypatch):
    seen = []

    def prepare(model, run, query_heads):
        seen.append((model.cache_spec.num_layers, model.cache_spec.head_dim, query_heads))
        return run

    monkeypatch.setattr(runs, "prepare", prepare)
    monkeypatch.setattr(runs, "measure", lambda *_, **__: {"status": "OK", "repeatable": True, "tokens_sha256": ""})
    asked = ("--block-size", "8", "--set", "num_hidden_layers=1,2", "--set", "head_dim=16,32")
    code, out, _ = run(capsys, "ablate", "--shapes", "tiny", *asked)
    assert code == 0
    assert seen == [(1, 16, 4), (1, 32, 4), (2, 16, 4), (2, 32, 4)]
    assert out.split()[:3] == ["num_hidden_layers", "head_dim", "same_tokens"]


def test_ablate_a_pool(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "lengths.csv").write_text("9,4\n3,20\n30,1\n")
    pool = ("--set", "pool_tokens=64", "--set", "max_model_len=32", "--set", "admit=first_come,shortest_prompt")
    files = ("--save", tmp_path / "rows.csv", "--plot", tmp_path / "plot.svg")
    code, out, _ = run(capsys, "ablate", "--block-size", "4", "--lengths", tmp_path / "lengths.csv", *pool, *files)
    assert code == 0
    assert out.split()[:2] == ["admit", "wasted"]
    assert out.count("\n") == 3
    assert (tmp_path / "rows.csv").read_text().count("\n") == 3
    assert (tmp_path / "plot.svg").exists()


def test_speculation_equals_greedy_and_counts(capsys):
    common = ["generate", "--prompt-ids", "5,6,7,5,6,7,5", "--model", TINY, "--max-new-tokens", 12, "--block-size", 3]
    plain = json.loads(run(capsys, *common, "--json")[1])
    code, out, _ = run(capsys, *common, "--json", "--speculate", "ngram", "--num-speculative-tokens", 5)
    assert code == 0
    answer = json.loads(out)
    assert answer["outputs"][0]["token_ids"] == plain["outputs"][0]["token_ids"]
    (row,) = answer["stats"]["speculation"]["rows"]
    assert set(row) == {"steps", "tokens", "tokens_per_step", "drafted", "accepted", "blocks_reserved",
                        "blocks_rolled_back"}  # fmt: skip
    assert row["tokens"] == len(plain["outputs"][0]["token_ids"]) - 1
    assert "guessed tokens held" in run(capsys, *common, "--speculate", "ngram", "--num-speculative-tokens", 5)[2]


def test_inspect(capsys):
    code, out, _ = run(capsys, "inspect", TINY, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["kv_bytes_per_token"] == 2 * 3 * 2 * 16 * 4
    assert facts["parameters"] * 4 == facts["bytes"]
    assert run(capsys, "inspect", TINY)[1].count("\n") > 10


def test_inspect_where_nobody_knows_how_much_memory_is_free(capsys, monkeypatch):
    monkeypatch.setattr("os.sysconf_names", {"SC_PAGE_SIZE": 30})
    monkeypatch.setattr("jax.devices", lambda: [types.SimpleNamespace(memory_stats=lambda: None)])
    facts = json.loads(run(capsys, "inspect", TINY, "--json")[1])
    assert [facts[name] for name in ("free_bytes", "blocks_that_fit", "tokens_that_fit")] == [None] * 3
    assert "how many blocks fit is unknown" in run(capsys, "inspect", TINY)[1]


@pytest.mark.parametrize("live", [False, True])
def test_watching_draws_the_fullest_map_or_every_one_in_place(capsys, monkeypatch, live):
    monkeypatch.setattr("sys.stdout.isatty", lambda: live)
    film = watch(models.load(TINY), [[1, 2, 3], [4]], block_size=4, max_new_tokens=6, eos_token_id=())
    out = capsys.readouterr().out
    most = max(frame.used for frame in film.frames)
    assert f"{most} of" in out
    assert "row A  |pdddd||" in out
    assert "Decode  | 10 tokens fed in 5 steps" in out
    assert out.count("\x1b[") == (2 * (len(film.frames) - 2) if live else 0)


def test_whoever_is_watched_sits_in_one_batch(monkeypatch):
    """By default as many rows as it takes, though other batches end earlier."""
    monkeypatch.setitem(LM.batches.__kwdefaults__, "max_num_seqs", 1)
    lm = models.load(TINY)
    film = watch(lm, [[1, 2, 3], [4]], block_size=4, max_new_tokens=6, eos_token_id=())
    assert film.moves[-1].ended.tolist() == [True, True]
    for options in ({"max_num_seqs": 1}, {"max_num_seqs": 3, "num_beams": 2}):
        with pytest.raises(
            ValueError, match=r"max_num_seqs is .*one batch, here of . rows; leave it out, or watch fewer"
        ):
            watch(lm, [[1], [2]], **options)
    with pytest.raises(ValueError, match="no prompt was given"):
        watch(lm, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "no prompt was given"),
        (["inspect", TINY, "--watch", "x", "--json"], "--watch draws; leave out --json"),
        (["generate", "--prompt-ids", "1,x"], "must be integers separated by commas"),
        (["generate", "--prompt-ids", "1", "--model", "/no/such/dir"], "/no/such/dir"),
        (["generate", "--prompt-ids", "1", "--model", TINY, "--block-size", "0"], "block_size is 0"),
        (["generate", "--prompt-ids", "1", "--model", TINY, "--attention", "flash"], "'flash' is unknown"),
        (["generate", "hello", "--model", TINY], "has no tokenizer"),
        (["serve-bench", "--shapes", "tiny", "--low", "9", "--high", "3"], "9..3 tokens"),
        (["serve-bench", "--shapes", "tiny", "--num-blocks", "20"], "the pool has 19 to hand out"),
        (["serve-bench", "--shapes", "tiny", "--steps", "0"], "steps is 0"),
        (["generate", "--prompt-ids", "1", "--model", TINY, "--speculate", "self"], "speculate is 'self'"),
        (["ablate", "--lengths", "/no/such/file"], "neither a file nor one of sharegpt"),
        (["ablate", "--lengths", "alpaca", "--set", "block"], "'block' must be FIELD=V"),
        (["ablate", "--lengths", "alpaca", "--set", "kernel=1"], "unknown options kernel"),
        (["generate", "--prompt-ids", "1", "--model", TINY, "--mesh", "2x1"], "write data=D,model=M"),
        (["generate", "--prompt-ids", "1", "--model", TINY, "--mesh", "data=8,model=8"], "takes 64 devices"),
        (["generate", "--prompt-ids", "1", "--mesh", "data=1,model=1", "--show-pages"], "leave out --mesh"),
        (["generate", "--prompt-ids", "1", "--show-pages", "--json"], "leave out --json"),
        (["generate", "a", "--stream", "--show-pages"], "leave out --stream"),
        ([*ONE, "--evict", "window:99999999999"], "must be below 2147483648"),
        ([*ONE, "--num-return-sequences", "2"], "give a temperature above 0"),
        (["serve-bench", "--shapes", "tiny", "--block-size", "0"], "block_size is 0"),
        (["serve-bench", "--shapes", "tiny", "--num-blocks", "0"], "num_blocks is 0"),
        (["serve-bench", "--shapes", "tiny", "--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["serve-bench", "--shapes", "tiny", "--seed", "-1"], "seed is -1"),
        (["serve-bench", "--shapes", "tiny", "--model", TINY], "are two models; leave one out"),
        (["serve-bench", "--shapes", "tiny", "--requests", "3", "--num-blocks", "2147483647"], "overflow"),
        (["generate", "a", "b", "--stream"], "--stream prints one answer"),
        (["generate", "--prompt-file", "/no/such/file"], "/no/such/file"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--top-k", "99999999999"], "--top-k: 99999999999 is outside [-2147483648, 2147483647]"),
        (["generate", "a", "--seed", str(2**63)], f"--seed: {2**63} is outside [{-(2**63)}, {2**63 - 1}]"),
        (["serve-bench", "--steps", "99999999999"], "--steps: 99999999999 is outside"),
        (["inspect", TINY, "--block-size", "-99999999999"], "--block-size: -99999999999 is outside"),
    ],
)
def test_integers_that_no_array_holds(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_help_has_examples_and_version(capsys):
    for arguments in (["--help"], ["generate", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        assert "examples:" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("paxattn ")
