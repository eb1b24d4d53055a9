"""Text in, text out: streaming, stop strings, batches, and what is refused."""

import dataclasses

import pytest

import models
import paxattn as pax
from models.cli import main
from models.eviction import eviction
from models.shapes import CONFIGS
from tests.paths import GOLDEN

TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def lm():
    return models.load("smollm2-135m")


@pytest.fixture(scope="module")
def whole(lm):
    return lm.generate([TEXT], chat=False, max_new_tokens=30).outputs[0]


def test_stream_pieces_are_the_whole_text(lm, whole):
    pieces = list(lm.stream(TEXT, chat=False, max_new_tokens=30, steps=3))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 3


def test_stop_strings_end_before_the_text(lm, whole):
    output = lm.generate([TEXT], chat=False, max_new_tokens=30, stop_strings=["answer"]).outputs[0]
    assert output.text == whole.text[: whole.text.index("answer")]
    assert output.finish_reason == "stop"
    assert output.token_ids == whole.token_ids[: len(output.token_ids)]
    assert len(output.token_ids) < len(whole.token_ids)
    streamed = lm.stream(TEXT, chat=False, max_new_tokens=30, stop_strings=["answer"])
    assert "".join(streamed) == output.text


def test_more_prompts_than_rows_are_answered_in_order(lm, whole):
    run = lm.generate(["Water boils at", TEXT, "Once"], chat=False, max_new_tokens=6, max_num_seqs=2)
    assert len(run.outputs) == 3
    assert run.outputs[1].token_ids == whole.token_ids[:6]
    assert run.outputs[1].finish_reason == "length"
    assert run.stats["blocks_allocated"] == run.stats["blocks_freed"]


def test_more_prompts_than_rows_are_answered_as_in_one_batch(lm):
    """Sampled, cut by stop strings, through a pool that holds hardly two of them."""
    prompts = [TEXT, "Water boils at", "Once", "The sky", "One two three"]
    options = {"chat": False, "max_new_tokens": 12, "temperature": 0.8, "stop_strings": [" the"], "seed": 3}
    together = lm.generate(prompts, **options)
    few = lm.generate(prompts, max_num_seqs=2, block_size=4, num_blocks=13, **options)
    assert [o.token_ids for o in few.outputs] == [o.token_ids for o in together.outputs]
    assert [(o.text, o.finish_reason) for o in few.outputs] == [(o.text, o.finish_reason) for o in together.outputs]
    assert few.stats["tokens_reserved_unpaged"] < together.stats["tokens_reserved_unpaged"]
    with pytest.raises(ValueError, match="may need 4 blocks of 4 tokens; the pool has 3 to"):
        lm.generate(prompts, max_num_seqs=2, block_size=4, num_blocks=4, **options)


def test_sampling_follows_the_seed():
    tiny = models.load(GOLDEN / "tiny_llama")

    def draw(seed):
        return tiny.generate([[82, 154, 252]], max_new_tokens=8, temperature=1.0, top_p=0.9, seed=seed).outputs

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, r"prompt \d is empty"),
        ([49152], {}, "a token id is 49152"),
        ([5], {"max_new_tokens": 9000}, "max_position_embeddings"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([5], {"temperature": -1.0}, "temperature is -1"),
        ([5], {"num_beam": 2}, "unknown options num_beam"),
        ([5], {"max_num_seqs": 0}, "max_num_seqs is 0"),
        ([5] * 40, {"num_blocks": 2}, "never fits"),
        ([5], {"block_size": 0}, "block_size is 0"),
        ([5], {"num_blocks": 1}, "num_blocks is 1"),
        ([5], {"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
        ([5], {"steps": 0}, "steps is 0"),
        ([5], {"key": 3}, "unknown options key"),
        ([5], {"stop_strings": ["a", ""]}, "none of them empty"),
        ([5], {"stop_strings": "answer"}, "must be a list of texts"),
        ([1.5], {}, r"a prompt is \[1.5\], must be a text or a list of token ids"),
        (5, {}, r"one prompt of ids is given as \[ids\]"),
    ],
)
def test_bad_input_is_refused(lm, monkeypatch, prompt, options, message):
    """In one batch and through the engine alike, whichever prompt it is, and before any cache exists."""
    monkeypatch.setattr(pax.Cache, "create", None)
    for prompts, rows in (([prompt], 64), ([[7], [8], prompt], 2)):
        with pytest.raises(ValueError, match=message):
            lm.generate(prompts, **{"max_num_seqs": rows} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"length_penalty": 2.0}, "belong to beam search"),
        ({"early_stopping": "never"}, "belong to beam search"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2 at temperature 0"),
        ({"num_return_sequences": 2, "temperature": 0.0}, "give a temperature above 0, or as many num_beams"),
        ({"speculate": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens is 0"),
    ],
)
def test_options_of_batches_are_never_dropped(options, message):
    tiny = models.load(GOLDEN / "tiny_llama")
    for rows in (64, 2):
        with pytest.raises(ValueError, match=message):
            tiny.generate([[5], [6], [7]], max_new_tokens=2, max_num_seqs=rows, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"num_blocks": 2}, "blocks that the prompt takes is 3; the pool has 1"),
    ],
)
def test_a_mesh_loses_no_check(options, message):
    """Whose programs see these as traced values."""
    tiny = models.load(GOLDEN / "tiny_llama", mesh=pax.make_mesh(1, 1))
    with pytest.raises(ValueError, match=message):
        tiny.generate([[5], [5] * 40], **options)


def test_a_text_is_one_prompt(lm, whole):
    (answer,) = lm.generate(TEXT, chat=False, max_new_tokens=30).outputs
    assert answer.token_ids == whole.token_ids


def test_a_stream_returns_why_it_ended(lm):
    tiny = models.load(GOLDEN / "tiny_llama")
    tiny = dataclasses.replace(tiny, model=tiny.model.first(1), tokenizer=lm.tokenizer)
    reasons = []

    def stream(num_blocks):
        options = {"max_new_tokens": 20, "eos_token_id": (), "num_blocks": num_blocks}
        reasons.append((yield from tiny.stream([82, 154, 252], **options)))

    assert all("".join(stream(num_blocks)) for num_blocks in (None, 2))
    assert reasons == ["length", "out_of_blocks"]


def test_logits_in_blocks_of_nothing(lm):
    with pytest.raises(ValueError, match="block_size is 0"):
        lm.logits([5, 6], block_size=0)


def test_a_model_without_tokenizer_takes_ids():
    tiny = models.load(GOLDEN / "tiny_llama")
    assert tiny.tokenizer is None
    assert tiny.generate([[87]], max_new_tokens=3).outputs[0].text is None
    with pytest.raises(ValueError, match="has no tokenizer"):
        tiny.generate(["text"])


def test_orbax_round_trip(tmp_path, capsys):
    assert main(["convert", str(GOLDEN / "tiny_llama"), str(tmp_path / "out"), "--json"]) == 0
    again = models.load(tmp_path / "out")
    tiny = models.load(GOLDEN / "tiny_llama")
    prompt = [[82, 154, 252]]
    assert again.generate(prompt, max_new_tokens=9).outputs == tiny.generate(prompt, max_new_tokens=9).outputs
    assert main(["convert", str(GOLDEN / "tiny_llama"), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err


REPEATS = "one two three four one two three four one two"


@pytest.mark.parametrize("how", ["ngram", "self:8"])
def test_speculation_is_unobservable_on_real_weights(lm, whole, how):
    """Both prompts in one batch, so that the rows accept differently."""
    plain = lm.generate([TEXT, REPEATS], chat=False, max_new_tokens=30)
    run = lm.generate([TEXT, REPEATS], chat=False, max_new_tokens=30, speculate=how)
    assert [o.token_ids for o in run.outputs] == [o.token_ids for o in plain.outputs]
    assert run.outputs[0].token_ids == whole.token_ids
    assert run.stats["blocks_allocated"] == run.stats["blocks_freed"]
    total = run.stats["speculation"]
    assert total["tokens_per_step"] > 1
    assert len(total["rows"]) == 2
    assert total["accepted"] == sum(row["accepted"] for row in total["rows"]) > 0
    if how == "ngram":
        assert run.stats["steps"] < plain.stats["steps"]
        stop = lm.generate([TEXT, REPEATS], chat=False, max_new_tokens=30, speculate=how, stop_strings=["answer"])
        assert stop.outputs[0].text == whole.text[: whole.text.index("answer")]


def test_speculation_by_name_or_object_spans_batches():
    tiny = models.load(GOLDEN / "tiny_llama")
    prompts = [[82, 154, 252], [87], [5, 6, 7, 5, 6], [9, 9]]
    plain = tiny.generate(prompts, max_new_tokens=12)
    for how in (pax.NGram(1), "self:1", f"draft:{GOLDEN / 'tiny_llama3_rope_tied'}"):
        run = tiny.generate(prompts, max_new_tokens=12, max_num_seqs=2, speculate=how, num_speculative_tokens=3)
        assert [o.token_ids for o in run.outputs] == [o.token_ids for o in plain.outputs]
        assert len(run.stats["speculation"]["rows"]) == 4


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("medusa", "choose ngram, self:M"),
        ("self:0", "0 cannot be its first"),
        ("self:x", "choose ngram"),
        ("draft:", "choose ngram"),
        ("draft:/no/such/dir", "/no/such/dir"),
    ],
)
def test_bad_drafters_are_refused(how, message):
    with pytest.raises((ValueError, OSError), match=message):
        models.load(GOLDEN / "tiny_llama").generate([[5]], max_new_tokens=2, speculate=how)


def test_eviction_by_name_or_object_in_batches_and_through_the_engine():
    """The same tokens every way, with fewer blocks."""
    tiny = models.load(GOLDEN / "tiny_llama")
    prompts = [[82, 154, 252, 9, 9, 1, 7, 30], [87, 8, 4], [5, 6, 7, 5, 6]]
    common = {"max_new_tokens": 16, "block_size": 2, "eos_token_id": ()}
    plain = tiny.generate(prompts, **common)
    runs = [tiny.generate(prompts, evict=how, **common) for how in ("sinks:2,window:5", pax.sinks_and_window(2, 5))]
    runs.append(tiny.generate(prompts, evict="sinks:2,window:5", max_num_seqs=2, **common))
    assert runs[0].stats == runs[1].stats
    for run in runs:
        assert [o.token_ids for o in run.outputs] == [o.token_ids for o in runs[0].outputs]
        assert run.stats["blocks_allocated"] == run.stats["blocks_freed"]
        assert run.stats["blocks_peak"] < plain.stats["blocks_peak"]


@pytest.mark.parametrize(("options", "message"), [
    ({"evict": "window"}, "write window:W or sinks:S,window:W"),
    ({"evict": "sinks:2,window:0"}, "window 0"),
    ({"evict": "window:4", "num_beams": 2}, "neither beams nor a rollback"),
    ({"evict": "window:4", "speculate": "ngram"}, "neither beams nor a rollback"),
])  # fmt: skip
def test_evictions_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.load(GOLDEN / "tiny_llama").generate([[5]], max_new_tokens=2, **options)


@pytest.mark.parametrize("how", ["sinks:1,window:8", pax.sinks_and_window(1, 8)], ids=["name", "object"])
def test_a_window_of_the_models_own_has_no_sinks(how):
    with pytest.raises(ValueError, match="a window of 8 tokens: no sinks"):
        eviction(how, dataclasses.replace(CONFIGS["tiny"], sliding_window=8))
