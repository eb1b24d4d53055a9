"""The `paxattn` command: generate, inspect, convert, serve-bench, ablate.

    paxattn generate "The capital of France is" --no-chat       text, or --json
    paxattn inspect  smollm2-135m                               what is in a checkpoint, how many blocks fit
    paxattn convert  smollm2-135m my-checkpoint                 to Orbax, with a checked manifest
    paxattn serve-bench --shapes tiny                           more requests than rows: tokens a second
    paxattn ablate   --block-size 1,16,128                      what paging costs and saves, a row a combination

Errors of the user's making end with one line and exit code 2; Ctrl-C ends with exit code 130.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Generator, Sequence

from models import ablate, arguments, hosts, serve_bench

EXAMPLES = """examples:
  paxattn generate "What is a page table?" "Write a haiku about memory."
  paxattn generate "The capital of France is" --no-chat --max-new-tokens 30 --json
  paxattn generate --prompt-ids "504,3575,282" --prompt-ids "1780" --max-new-tokens 8
  paxattn generate --prompt-file prompts.txt --temperature 0.8 --top-p 0.95 --seed 7
  paxattn generate "Once upon a time" --no-chat --stream --block-size 1
  paxattn generate "The capital of France is" --no-chat --num-beams 4 --num-return-sequences 4 --json
  paxattn generate "Name a colour." --num-return-sequences 4 --temperature 0.8
  paxattn generate "Count: 1 2 3 1 2 3 1 2" --no-chat --speculate ngram --json
  paxattn generate "Once upon a time" --no-chat --max-new-tokens 200 --evict sinks:4,window:64 --show-pages
  paxattn inspect smollm2-135m
  paxattn inspect smollm2-135m --watch "Once upon a time" "Water boils at" --block-size 4
  paxattn convert smollm2-135m ./smollm2-orbax
  paxattn serve-bench --shapes tiny --requests 64 --max-num-seqs 16 --num-blocks 800 --json
  paxattn ablate --block-size 1,16,128 --rows 4 --context 128 --save ablation.json
  paxattn ablate --block-size 1,16,128 --lengths sharegpt --set watermark=0.01,0.1
  paxattn serve-bench --shapes 8B --dtype bfloat16 --mesh data=2,model=4
"""


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    from paxattn.version import __version__

    top = argparse.ArgumentParser(
        prog="paxattn",
        description="Language models through a paged KV cache, in one jitted program.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"paxattn {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        return sub

    arguments.add_generate(command("generate", "Answer prompts, all in one batch."))
    arguments.add_inspect(command("inspect", "Show a checkpoint's configuration and what its cache costs."))
    arguments.add_convert(command("convert", "Write an Orbax directory with a sha256 manifest."))
    serve_bench.add_arguments(command("serve-bench", "Serve a workload of requests and say how fast it went."))
    ablate.add_arguments(command("ablate", "Sweep block size or any other field: memory, sharing, speed."))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        commands = {"generate": _generate, "inspect": _inspect, "convert": _convert}
        commands |= {"serve-bench": serve_bench.main, "ablate": ablate.main}
        return commands[options.command](options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError, OverflowError) as error:
        print(f"paxattn: {error}", file=sys.stderr)
        return 2


def _prompts(options: argparse.Namespace) -> list[str | list[int]]:
    prompts: list[str | list[int]] = list(options.text)
    if options.prompt_file is not None:
        text = options.prompt_file.read_text("utf-8")
        lines = [line for line in text.split("\n") if line.strip()]  # splitlines splits where JSON goes on
        prompts += map(_read_json, lines) if options.prompt_file.suffix == ".jsonl" else lines
    for ids in options.prompt_ids:
        try:
            prompts.append([int(token) for token in ids.split(",")])
        except ValueError as error:
            raise ValueError(f"--prompt-ids {ids!r} must be integers separated by commas, like 1,2,3.") from error
    if not prompts:
        raise ValueError("no prompt was given; pass TEXT, --prompt-file or --prompt-ids.")
    return prompts


def _read_json(line: str) -> str | list[int]:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError):
        prompt = None
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(token) is int for token in prompt)):
        return prompt
    raise ValueError(f"a line is {line[:80]!r}, must be an object whose 'prompt' is a text or a list of token ids.")


def _generate(options: argparse.Namespace) -> int:
    prompts = _prompts(options)
    beside = [f"--{name}" for name in ("stream", "json", "mesh") if getattr(options, name)]
    if options.show_pages and beside:
        raise ValueError(f"--show-pages draws the pages of one device below the answers; leave out {beside[0]}.")
    if options.stream and (options.json or len(prompts) > 1):
        raise ValueError("--stream prints one answer as text; give one prompt and leave out --json.")
    knobs = ("chat", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    knobs += ("block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "attention")
    knobs += ("num_return_sequences", "num_beams", "length_penalty")
    knobs += ("speculate", "num_speculative_tokens", "evict")
    settings = {name: getattr(options, name) for name in knobs}
    settings["early_stopping"] = {"false": False, "true": True}.get(options.early_stopping, options.early_stopping)

    import models
    from paxattn.viz import page_map

    lm = models.load(options.model, dtype=options.dtype, mesh=hosts.open_mesh(options))
    if options.stream:
        _print_stream(lm.stream(prompts[0], stop_strings=options.stop, **settings))
        return 0
    fullest, drawing = -1, ""

    def draw(state) -> None:
        nonlocal fullest, drawing
        if (used := int(state.cache.table.blocks.num_used)) > fullest:
            fullest, drawing = used, page_map(state.cache.table)

    if options.show_pages:
        settings |= {"watch": draw, "steps": 1}
    run = lm.generate(prompts, stop_strings=options.stop, **settings)
    outputs, stats = run.outputs, run.stats
    if options.json:
        answers = [dataclasses.asdict(output) for output in outputs]
        for answer in answers:
            if answer["sequences"] is None:
                del answer["sequences"]
        print(json.dumps({"model": lm.name, "outputs": answers, "stats": stats}, ensure_ascii=False))
        return 0
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"\n> {prompt}")
        for answer in output.sequences or [output]:
            score = f"[{answer.score:.4f}] " if isinstance(answer, models.Scored) else ""
            print(f"{score}{answer.text if answer.text is not None else answer.token_ids}")
        _print_end(output.finish_reason)
    if options.show_pages:
        none = "nothing to draw: every answer ended in the step that fed its prompt, and gave its pages back"
        print(f"\npage map when the pool was fullest\n{drawing if fullest else none}")
    if hosts.is_first():
        print(f"\n{_summary(stats)}", file=sys.stdout if options.show_pages else sys.stderr)
    return 0


def _print_stream(pieces: Generator[str, None, str]) -> None:
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            print()
            return _print_end(end.value)


def _print_end(reason: str) -> None:
    if reason not in ("stop", "length"):
        print(f"[ended early: {reason}]")


def _summary(stats: dict) -> str:
    peak, unpaged = stats["tokens_reserved_peak"], stats["tokens_reserved_unpaged"]
    guessed = ""
    if spec := stats.get("speculation"):
        guessed = (
            f"\n{spec['tokens_per_step']:.2f} tokens a verify step of a row: {spec['accepted']} of {spec['drafted']} "
            f"guessed tokens held; blocks: {spec['blocks_reserved']} reserved for guesses, "
            f"{spec['blocks_rolled_back']} rolled back"
        )
    return (
        f"{stats['steps']} steps, {stats['tokens_fed']} tokens fed; blocks: {stats['blocks_allocated']} allocated, "
        f"{stats['blocks_freed']} freed, {stats['blocks_copied']} copied, {stats['blocks_peak']} in use at most\n"
        f"room for {peak} tokens at the peak, {unpaged} without paging (every row as long as the longest may get): "
        f"{_saved(1 - peak / unpaged)}{guessed}"
        + (f"\nsharing saved {100 * saved:.0f}% of the blocks" if (saved := stats["sharing_saving"]) else "")
    )


def _saved(share: float) -> str:
    return f"{share:.0%} saved" if share >= 0 else f"{-share:.0%} more, as rows are shorter than their blocks"


def _inspect(options: argparse.Namespace) -> int:
    import jax

    import models
    from models.watch import watch

    if options.block_size < 1:
        raise ValueError(f"block_size is {options.block_size}, must be at least 1.")
    lm = models.load(options.source, dtype=options.dtype)
    if options.watch:
        if options.json:
            raise ValueError("--watch draws; leave out --json.")
        sizes = {"block_size": options.block_size, "max_new_tokens": options.max_new_tokens}
        watch(lm, options.watch, **sizes)
        return 0
    config, spec = lm.model.config, lm.model.cache_spec
    leaves = jax.tree.leaves(lm.model)
    size = sum(leaf.nbytes for leaf in leaves)
    block = spec.bytes_per_token * options.block_size
    free = _free_memory()
    facts = {
        "model": lm.name,
        "config": config.to_dict(),
        "parameters": sum(leaf.size for leaf in leaves),
        "bytes": size,
        "dtype": options.dtype,
        "kv_bytes_per_token": spec.bytes_per_token,
        "block_size": options.block_size,
        "block_bytes": block,
        "free_bytes": free,
        "blocks_that_fit": None if free is None else free // block,
        "tokens_that_fit": None if free is None else free // block * options.block_size,
    }
    if options.json:
        print(json.dumps(facts))
        return 0
    for name, value in config.to_dict().items():
        print(f"{name:28} {value}")
    print(f"\n{facts['parameters']:,} parameters, {size / 1e6:,.1f} MB in {options.dtype}")
    print(f"{spec.bytes_per_token:,} bytes of K and V a token, {block:,} a block of {options.block_size}")
    if free is None:
        print("how many blocks fit is unknown: this system does not say how much memory is free")
        return 0
    print(f"{facts['blocks_that_fit']:,} blocks ({facts['tokens_that_fit']:,} tokens) fit in {free / 1e9:,.1f} GB free")
    return 0


def _free_memory() -> int | None:
    """Bytes that the cache could take: the accelerator's, or the machine's on a CPU; None where nobody says."""
    import jax

    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # macOS, Windows
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _convert(options: argparse.Namespace) -> int:
    if options.target.exists():
        raise ValueError(f"{options.target} exists already; choose another place or remove it.")
    import models
    from models import checkpoint

    lm = models.load(options.source, dtype=options.dtype)
    checkpoint.save(options.target, lm.model.config.to_dict(), lm.model.parameters(), lm.tokenizer)
    if options.json:
        print(json.dumps({"model": lm.name, "target": str(options.target)}))
    else:
        print(f"wrote {options.target}; load it with --model {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
