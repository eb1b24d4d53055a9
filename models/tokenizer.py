"""Text to token ids and back: from Hugging Face files where there are some, else from a GGUF file's metadata.

    directory: tokenizer.json, tokenizer_config.json, chat_template.jinja ---.
    x.gguf with a tokenizer.json beside it ----------------------------------+--> Tokenizer --> Detokenizer
    x.gguf alone: tokens, merges, token types, pre, chat template -----------'    encode        ids -> deltas
                                                                                  decode        (streaming)

transformers' own way from GGUF to a tokenizer needs PyTorch; this one needs the `tokenizers` package.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.weights import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# tokenizer.ggml.pre: how text is cut before byte-pair encoding. Other names exist; each stands for a pattern
# of its own, and a wrong one gives ids that look right; a file that names none may be of any.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_GPT2, _SMOLLM = ("gpt-2", "gpt2"), ("smollm",)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Tokenizer:
    """A fast Hugging Face tokenizer and the ids that end a text."""

    hf: "PreTrainedTokenizerFast"
    eos_token_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included: the rows that an embedding needs."""
        return max(self.hf.get_vocab().values(), default=-1) + 1

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` works."""
        return bool(self.hf.chat_template)

    def encode(self, text: str) -> list[int]:
        """The ids of raw text; a beginning-of-sequence id only if the model's tokenizer asks for one."""
        return self.hf.encode(text)

    def encode_chat(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a chat, ready for the assistant's answer.

        Args:
            messages: Turns `{"role": "user", "content": "..."}` in order, or the text of a single user turn.

        Raises:
            CheckpointError: There is no chat template, or it refuses these messages.
        """
        from jinja2.exceptions import TemplateError

        if not self.has_chat_template:
            raise CheckpointError(
                "this tokenizer has no chat template: encode the text as it is, or put chat_template.jinja "
                "beside the model's other files"
            )
        one = isinstance(messages, str)
        turns = [{"role": "user", "content": messages}] if one else [dict(turn) for turn in messages]
        try:
            text = self.hf.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            roles = [turn.get("role") for turn in turns]
            raise CheckpointError(
                f"the chat template refuses messages with roles {roles} ({error}); give each role and content"
            ) from error
        return self.hf.encode(str(text), add_special_tokens=False)  # the template writes its own

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        # Not hf.decode: it may tidy spaces before punctuation, and is then no sum of its parts.
        return self.hf.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def save(self, directory: Path) -> None:
        """Writes the Hugging Face files (and the ids that end a text), for `load_tokenizer(directory)`."""
        self.hf.save_pretrained(directory)
        ends = json.dumps({"eos_token_id": list(self.eos_token_ids)})
        (directory / "generation_config.json").write_text(ends + "\n", encoding="utf-8")


class Detokenizer:
    """Text piece by piece: the deltas of any chunking, and `flush` at the end, add up to `decode` of all ids.

        push [240] "", push [159, 152] "", push [128, 33] "😀!", flush ""

    Nothing that a later id could change is given out: no half character, and no run of SentencePiece byte
    tokens that goes on (such a run is text or not as a whole).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        added = tokenizer.hf.added_tokens_decoder if skip_special_tokens else {}
        self._skip = {i for i, token in added.items() if token.special}
        # The last piece given out (left context: SentencePiece strips a leading space), then what is held.
        self._ids: list[int] = []
        self._held = 0

    def push(self, ids: Iterable[int]) -> str:
        """Takes any number of new ids; returns the text that they settle."""
        return "".join(self._step(int(i)) for i in ids if i not in self._skip)

    def flush(self) -> str:
        """The text still held back, a broken character as U+FFFD; the next `push` begins a new text."""
        delta = self._pending()
        self._ids, self._held = [], 0
        return delta

    def _step(self, token: int) -> str:
        name = self._tokenizer.hf.backend_tokenizer.id_to_token(token)
        if name is None:  # decode drops it, so that the tokens on its two sides meet
            return ""
        self._ids.append(token)
        self._held += 1
        delta = self._pending()
        if delta.endswith("\N{REPLACEMENT CHARACTER}") or _BYTE_TOKEN.fullmatch(name):
            return ""
        self._ids, self._held = self._ids[-self._held :], 0
        return delta

    def _pending(self) -> str:
        given = self._tokenizer.decode(self._ids[: len(self._ids) - self._held])
        return self._tokenizer.decode(self._ids)[len(given) :]


def load_tokenizer(path: Path, gguf_metadata: Mapping[str, Any] | None = None) -> Tokenizer | None:
    """The tokenizer that belongs to a model, or None if it comes without one.

    Args:
        path: The model's directory or `.gguf` file. A tokenizer.json in it or beside it comes first.
        gguf_metadata: The key-value part of the GGUF file.

    Raises:
        CheckpointError: Files that cannot be read, or a kind of GGUF tokenizer that is not known here.
    """
    directory = path if path.is_dir() else path.parent
    if (directory / "tokenizer.json").is_file():
        return _from_directory(directory)
    if gguf_metadata is not None and "tokenizer.ggml.model" in gguf_metadata:
        return _from_gguf(gguf_metadata)
    return None


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises CheckpointError if the tokenizer has more ids than an embedding has rows (`vocab_size`)."""
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's embedding only {vocab_size} rows: "
            "they do not belong together; take the tokenizer that came with these weights"
        )


def _fast_tokenizer() -> "type[PreTrainedTokenizerFast]":
    # Imported late (0.5 s), and without the notice that PyTorch is missing: nothing here wants it.
    logging.getLogger("transformers").addFilter(_not_about_torch)
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast


def _not_about_torch(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("PyTorch was not found")


def _from_directory(directory: Path) -> Tokenizer:
    try:
        hf = _fast_tokenizer().from_pretrained(directory, local_files_only=True)
        generation = directory / "generation_config.json"
        ends = json.loads(generation.read_text("utf-8")).get("eos_token_id") if generation.is_file() else None
    except Exception as error:  # `tokenizers` raises plain Exception
        raise CheckpointError(
            f"cannot read the tokenizer files in {directory}: {error}; fetch tokenizer*.json again"
        ) from error
    ids = ends if isinstance(ends, list) else [hf.eos_token_id if ends is None else ends]
    return Tokenizer(hf, tuple(i for i in ids if i is not None))


def _from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    kind, pre = metadata["tokenizer.ggml.model"], str(metadata.get("tokenizer.ggml.pre", "missing"))
    for key, value, known in (("model", kind, ("gpt2",)), ("pre", pre, _SMOLLM + _LLAMA3 + _GPT2)):
        if value not in known:
            raise CheckpointError(
                f"the GGUF file's tokenizer.ggml.{key} is {value!r}; known here: {', '.join(known)}. Put the "
                "model's tokenizer.json (with tokenizer_config.json) beside the file: it comes first"
            )
    try:
        return _byte_level_bpe(metadata, pre)
    except Exception as error:  # `tokenizers` raises plain Exception
        raise CheckpointError(
            f"the GGUF file's tokenizer is broken: {type(error).__name__}: {error}. Fetch the file again, or "
            "put the model's tokenizer.json beside it"
        ) from error


def _byte_level_bpe(metadata: Mapping[str, Any], pre: str) -> Tokenizer:
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    def field(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    tokens = field("tokens", [])
    types = field("token_type", [1] * len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    if not tokens or not len(vocab) == len(tokens) == len(types):
        raise ValueError(f"{len(tokens)} tokens, {len(vocab)} of them distinct, with {len(types)} types")
    named = {name: field(f"{name}_token_id") for name in ("bos", "eos", "unknown", "padding", "eot", "eom")}
    named = {name: int(i) for name, i in named.items() if i is not None}
    if wrong := {name: i for name, i in named.items() if not 0 <= i < len(tokens)}:
        raise ValueError(f"special tokens outside the {len(tokens)} tokens: {wrong}")

    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in field("merges", []))]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _LLAMA3))
    backend.pre_tokenizer = _cut(pre)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    # Types 3 (control) and 4 (user-defined) are found in text first of all; decode can leave out the former.
    special = {t: kind == 3 for t, kind in zip(tokens, types, strict=True) if kind in (3, 4)}
    backend.add_tokens([AddedToken(t, special=its, normalized=False) for t, its in special.items()])
    roles = (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token"))
    hf = _fast_tokenizer()(
        tokenizer_object=backend,
        add_bos_token=field("add_bos_token", pre in _LLAMA3),
        add_eos_token=field("add_eos_token", False),
        chat_template=metadata.get("tokenizer.chat_template"),
        **{role: tokens[named[name]] for name, role in roles if name in named},
    )
    return Tokenizer(hf, tuple(dict.fromkeys(named[name] for name in ("eos", "eot", "eom") if name in named)))


def _cut(pre: str) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if pre in _GPT2:
        return ByteLevel(add_prefix_space=False)
    first = Digits(individual_digits=True) if pre in _SMOLLM else Split(Regex(_LLAMA3_SPLIT), "isolated")
    return Sequence([first, ByteLevel(add_prefix_space=False, use_regex=pre in _SMOLLM)])
