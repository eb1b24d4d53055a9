"""Tokenizers built from GGUF metadata and from Hugging Face files; text that streams out whole."""

import functools
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE

from models import checkpoint
from models.gguf import open_gguf
from models.tokenizer import Detokenizer, check_fits, load_tokenizer
from models.weights import CheckpointError
from tests.paths import GOLDEN

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<|im|>{{ m['role'] + ':' + m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im|>{% endif %}"
)


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in own else next(others)) for b in range(256)]


LETTERS = byte_letters()


def spelled(content: bytes) -> str:
    return "".join(LETTERS[b] for b in content)


# "1234" by different cuts is 1234, 123 4 or 1 2 3 4; halves of an emoji, one grown together with a mark.
FACE = "😀".encode()
MERGES = [
    (spelled(left), spelled(right))
    for left, right in [
        (b"1", b"2"), (b"3", b"4"), (b"12", b"34"), (b"12", b"3"), (b" ", b"t"), (b"h", b"e"), (b" t", b"he"),
        (FACE[:1], FACE[1:2]), (FACE[2:3], FACE[3:]), (FACE[2:], b"!"),
    ]
]  # fmt: skip
TOKENS = ["<|im|>", "<|end|>", "<tool>", *LETTERS, *(left + right for left, right in MERGES), "zq"]


def metadata(**changes):
    """A GGUF file's tokenizer: two control tokens, one of the user's, all bytes, a few merges."""
    fields = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "token_type": [3, 3, 4] + [1] * (len(TOKENS) - 3),
        "merges": [f"{left} {right}" for left, right in MERGES],
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | changes
    stated = {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}
    return stated | {"tokenizer.chat_template": TEMPLATE}


@pytest.fixture
def build(tmp_path):
    def from_metadata(**changes):
        return load_tokenizer(tmp_path / "x.gguf", metadata(**changes))

    return from_metadata


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


# --- built from GGUF -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", [*"1234", " the", " ", *"1234", "z", "q"]),
        ("llama-bpe", ["<|im|>", "123", "4", " the", " ", "123", "4", "zq"]),
        ("gpt-2", ["1234", " the", " ", "1234", "z", "q"]),
    ],
)
def test_each_pre_cuts_its_own_way(build, pre, expected):
    assert pieces(build(pre=pre), "1234 the 1234zq") == expected


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "gpt-2"])
@settings(deadline=None)
@given(text=st.text())
def test_decode_undoes_encode(pre, text):
    tokenizer = tokenizer_of(pre)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert max(tokenizer.encode(text), default=0) < tokenizer.vocab_size


def test_a_beginning_and_an_end_only_where_the_file_asks(build):
    assert build().encode("h") == [TOKENS.index("h")]
    assert build(add_bos_token=True).encode("h") == [0, TOKENS.index("h")]
    assert build(add_bos_token=True, add_eos_token=True).encode("h") == [0, TOKENS.index("h"), 1]
    assert build(pre="llama-bpe", add_bos_token=False).encode("h") == [TOKENS.index("h")]


def test_special_tokens(build):
    tokenizer = build(eot_token_id=0, eom_token_id=1)
    assert tokenizer.eos_token_ids == (1, 0)
    assert build(eos_token_id=None).eos_token_ids == ()
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.encode("<|im|>h<tool>") == [0, TOKENS.index("h"), 2]
    assert tokenizer.decode([0, 2, 1]) == "<|im|><tool><|end|>"
    assert tokenizer.decode([0, 2, 1], skip_special_tokens=True) == "<tool>"  # the user's own stays


def test_chat(build):
    tokenizer = build(add_bos_token=True)
    assert tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode_chat("hi")) == "<|im|>user:hi<|end|><|im|>"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert tokenizer.decode(tokenizer.encode_chat(turns)) == "<|im|>system:s<|end|><|im|>user:u<|end|><|im|>"
    with pytest.raises(CheckpointError, match=r"roles \['robot'\] \(no robots\)"):
        tokenizer.encode_chat([{"role": "robot", "content": "beep"}])


def test_no_chat_template(tmp_path):
    without = {key: value for key, value in metadata().items() if "template" not in key}
    tokenizer = load_tokenizer(tmp_path / "x.gguf", without)
    assert not tokenizer.has_chat_template
    with pytest.raises(CheckpointError, match="no chat template"):
        tokenizer.encode_chat("hi")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"model": "llama"},
            "tokenizer.ggml.model is 'llama'; known here: gpt2. Put the model's tokenizer.json",
        ),
        ({"pre": None}, "tokenizer.ggml.pre is 'missing'; known here"),
        ({"pre": "default"}, "tokenizer.ggml.pre is 'default'; known here"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'; known here: smollm, llama-bpe"),
        ({"tokens": None}, "0 tokens"),
        ({"tokens": TOKENS[:-1]}, f"{len(TOKENS) - 1} tokens"),
        ({"tokens": [*TOKENS[:-1], "<|im|>"]}, f"{len(TOKENS) - 1} of them distinct"),
        ({"tokens": 7}, "TypeError"),
        ({"merges": ["no such"]}, "broken.*tokenizer.json beside it"),
        ({"eos_token_id": len(TOKENS)}, "outside"),
        ({"bos_token_id": -1}, "outside"),
    ],
)
def test_a_tokenizer_that_cannot_be_built(build, changes, says):
    with pytest.raises(CheckpointError, match=says):
        build(**changes)


def test_check_fits(build):
    check_fits(build(), len(TOKENS))
    with pytest.raises(CheckpointError, match=f"{len(TOKENS)} ids, .*only {len(TOKENS) - 1} rows"):
        check_fits(build(), len(TOKENS) - 1)


# --- Hugging Face files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"pre": "llama-bpe", "eot_token_id": 0}, {"add_bos_token": True, "eos_token_id": None}],
)
def test_a_checkpoint_keeps_its_tokenizer(build, tmp_path, changes):
    tokenizer = build(**changes)
    checkpoint.save(tmp_path / "model", {}, {"x": jnp.zeros(3)}, tokenizer)
    checkpoint.load(tmp_path / "model")
    again = load_tokenizer(tmp_path / "model")
    assert again.eos_token_ids == tokenizer.eos_token_ids
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode("the 1234<|end|>") == tokenizer.encode("the 1234<|end|>")
    assert again.encode_chat("hi") == tokenizer.encode_chat("hi")


def test_a_tokenizer_json_beside_the_file_comes_first(build, tmp_path):
    build(pre="gpt-2").save(tmp_path)
    assert pieces(build(pre="smollm"), "1234") == ["1234"]
    assert load_tokenizer(tmp_path / "x.gguf", {}) is not None


def test_none_where_there_is_none(tmp_path):
    assert load_tokenizer(tmp_path) is None
    assert load_tokenizer(tmp_path / "x.gguf", {"general.architecture": "llama"}) is None


def test_broken_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read the tokenizer files"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("stated", "expected"), [([1, 0], (1, 0)), (0, (0,)), (None, (1,))])
def test_the_generation_config_says_what_ends_a_text(build, tmp_path, stated, expected):
    build().save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    assert load_tokenizer(tmp_path).eos_token_ids == expected


# --- streaming -------------------------------------------------------------------------------------------


def sentencepiece(folder):
    """A Llama 2 kind of tokenizer: words with leading spaces, bytes as tokens of their own."""
    words = ["<s>", "</s>", "▁", "▁the", "he", "é"]
    vocab = {token: i for i, token in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    backend = Backend(BPE(vocab=vocab, merges=[], byte_fallback=True))
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(strip)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@functools.cache
def tokenizer_of(kind):
    with tempfile.TemporaryDirectory() as folder:
        if kind == "sentencepiece":
            return sentencepiece(Path(folder))
        return load_tokenizer(Path(folder) / "x.gguf", metadata(pre=kind))


# Ids that meet in interesting ways come up more often than by chance.
BYTES = [*"😀é�".encode(), 0xFF, ord("A")]
FAVOURITES = {
    "smollm": [0, 1, 2, *(3 + b for b in BYTES), *range(259, len(TOKENS))],
    "sentencepiece": [*range(6), *(6 + b for b in BYTES)],
}


@pytest.mark.parametrize("kind", FAVOURITES)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_deltas_add_up_to_the_whole(kind, data):
    tokenizer = tokenizer_of(kind)
    nobodys = tokenizer.vocab_size  # an embedding may have more rows than there are tokens
    ids = st.sampled_from([*FAVOURITES[kind], nobodys]) | st.integers(0, nobodys - 1)
    chunks = data.draw(st.lists(st.lists(ids, max_size=5), max_size=8))
    skip = data.draw(st.booleans())
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    deltas, seen = [], []
    for chunk in chunks:
        deltas.append(stream.push(chunk))
        seen += chunk
        assert tokenizer.decode(seen, skip_special_tokens=skip).startswith("".join(deltas))
    assert "".join(deltas) + stream.flush() == tokenizer.decode(seen, skip_special_tokens=skip)
    assert stream.flush() == ""
    assert stream.push([TOKENS.index("A")] if kind == "smollm" else [4]) in ("A", "he")  # a new text


@settings(deadline=None)
@given(text=st.text(), size=st.integers(1, 4))
def test_nothing_is_held_back_longer_than_needed(text, size):
    """Valid text comes out with its last byte, however it is chunked; U+FFFD might be half of something."""
    tokenizer = tokenizer_of("smollm")
    ids, stream = [3 + b for b in text.encode()], Detokenizer(tokenizer)
    deltas = [stream.push(ids[at : at + size]) for at in range(0, len(ids), size)]
    if not text.endswith("�"):
        assert "".join(deltas) == text
    assert "".join(deltas) + stream.flush() == text


def test_no_half_characters():
    stream = Detokenizer(tokenizer_of("smollm"))
    ids = tokenizer_of("smollm").encode("a😀!b")
    assert len(ids) == 4
    assert [stream.push([i]) for i in ids] == ["a", "", "😀!", "b"]
    assert stream.push([3 + 0xF0]) == ""
    assert stream.flush() == "�"


# --- the real one ----------------------------------------------------------------------------------------


def test_smollm2_equals_hugging_face(smollm2_path):
    tokenizer = load_tokenizer(smollm2_path, open_gguf(smollm2_path).metadata)
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (49152, (2,))
    rows = json.loads((GOLDEN / "smollm2_expected.json").read_text("utf-8"))["rows"]
    assert len(rows) == 7
    for row in rows:
        assert (tokenizer.encode_chat if row["chat"] else tokenizer.encode)(row["text"]) == row["input_ids"]
        assert tokenizer.decode(row["greedy"]) == row["greedy_text"]
        stream = Detokenizer(tokenizer)
        assert "".join(stream.push([i]) for i in row["greedy"]) + stream.flush() == row["greedy_text"]


@pytest.mark.skipif(find_spec("torch") is not None, reason="transformers imports PyTorch wherever it is installed")
def test_no_torch_and_no_notice_about_it(tmp_path):
    """In a process of its own: some other test may have imported anything."""
    (tmp_path / "metadata.json").write_text(json.dumps(metadata()))
    program = (
        "import json, sys; from pathlib import Path; from models.tokenizer import load_tokenizer; "
        f"folder = Path({str(tmp_path)!r}); fields = json.loads((folder / 'metadata.json').read_text()); "
        "tokenizer = load_tokenizer(folder / 'x.gguf', fields); tokenizer.save(folder); "
        "print(load_tokenizer(folder).encode_chat('h'), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
    assert "PyTorch" not in done.stderr
