"""What the commands that answer, show and convert can be told, and the integers that a command line may hold.

    generate TEXT ... --model SRC ...          inspect SRC ...          convert SRC DST

An integer that no program could take is refused here, with its option's name: what comes later knows arrays.
"""

import argparse
from pathlib import Path

from models.hub import DEFAULT_MODEL
from models.load import DTYPES


def int32(text: str) -> int:
    """An integer of 32 bits."""
    return _within(text, 2**31)


def int64(text: str) -> int:
    """An integer of 64 bits, which a seed may be; a key of JAX keeps the lower 32."""
    return _within(text, 2**63)


def _within(text: str, end: int) -> int:
    value = int(text)
    if not -end <= value < end:
        raise argparse.ArgumentTypeError(f"{value} is outside [{-end}, {end - 1}].")
    return value


def add_dtype(sub: argparse.ArgumentParser) -> None:
    """The option --dtype."""
    sub.add_argument("--dtype", default="float32", choices=DTYPES, help="of weights and cache")


def add_generate(sub: argparse.ArgumentParser) -> None:
    """Options of `paxattn generate`."""
    add = sub.add_argument
    add("text", nargs="*", metavar="TEXT", help="a prompt; several are answered together")
    add("--prompt-file", type=Path, help="one prompt a line; of a .jsonl file the field 'prompt'")
    add(
        "--prompt-ids",
        action="append",
        default=[],
        metavar="1,2,3",
        help="raw token ids, no template; repeatable",
    )
    add(
        "--model",
        default=DEFAULT_MODEL,
        metavar="SRC",
        help="directory, .gguf, Orbax directory, hub id or name",
    )
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="use the chat template (default: where there is one)",
    )
    add("--max-new-tokens", type=int32, default=64, metavar="N")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int32, default=0, metavar="K", help="0 turns it off")
    add("--top-p", type=float, default=1.0, metavar="P", help="1 turns it off")
    add("--min-p", type=float, default=0.0, metavar="P", help="0 turns it off")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 turns it off")
    add(
        "--num-return-sequences", type=int32, default=1, metavar="M", help="answers a prompt; all are shown, best first"
    )
    add("--num-beams", type=int32, default=1, metavar="N", help="above 1: beam search")
    add("--length-penalty", type=float, default=1.0, metavar="P", help="beam score: log-probability / length ** P")
    add("--early-stopping", default="false", choices=("false", "true", "never"), help="when beam search may stop")
    add("--seed", type=int64, default=0)
    add("--speculate", metavar="HOW", help="guess and verify: ngram, self:M (first M layers), draft:SRC (a checkpoint)")
    add("--evict", metavar="HOW", help="give blocks back while rows live: sinks:S,window:W or window:W, in tokens")
    add("--num-speculative-tokens", type=int32, default=4, metavar="K", help="tokens guessed a step at most")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="STRING",
        help="end an answer before this text; repeatable",
    )
    add("--block-size", type=int32, default=16, metavar="S", help="tokens a block of the cache")
    add("--num-blocks", type=int32, metavar="N", help="blocks in the pool (default: enough for all rows)")
    add("--max-num-seqs", type=int32, default=64, metavar="B", help="rows of a batch at most")
    add(
        "--max-num-batched-tokens",
        type=int32,
        default=512,
        metavar="T",
        help="tokens a prefill step feeds at most",
    )
    add("--attention", default="auto", metavar="NAME", help="auto, mosaic, xla or reference")
    add("--mesh", metavar="data=D,model=M", help="all devices of all processes: data shards x devices a model")
    add("--stream", action="store_true", help="print a single answer as it grows")
    add("--show-pages", action="store_true", help="draw the page map where the pool was fullest")
    add_dtype(sub)


def add_inspect(sub: argparse.ArgumentParser) -> None:
    """Options of `paxattn inspect`."""
    sub.add_argument("source", metavar="SRC")
    sub.add_argument("--block-size", type=int32, default=16, metavar="S")
    sub.add_argument("--watch", nargs="+", metavar="TEXT", help="answer these and draw the page map on the way")
    sub.add_argument("--max-new-tokens", type=int32, default=32, metavar="N", help="of each answer that is watched")
    add_dtype(sub)


def add_convert(sub: argparse.ArgumentParser) -> None:
    """Options of `paxattn convert`."""
    sub.add_argument("source", metavar="SRC")
    sub.add_argument("target", metavar="DST", type=Path)
    add_dtype(sub)
