"""Decoding on a CPU against Hugging Face transformers with PyTorch, in one run on the same cores.

    round 1:  paxattn  generate  loop        every sample: one token, then one token and `new` more
    round 2:  loop  generate  paxattn        milliseconds a step = (long - short) / new
    ...                                      first token = short

SmolLM2-135M shapes in float32, greedy, no end token. PyTorch lives in an environment of its own, which this
script makes once under the user's cache directory unless `--torch-python` names an interpreter that has it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import record

HERE = Path(__file__).parent
OURS = "paxattn"
PEERS = {f"transformers {way}": way for way in ("generate", "loop", "compiled")}
VOCABULARY, SPECIAL = 49152, 17  # SmolLM2: token ids, of which the first are special
REST = 0.5  # seconds between samples
QUIET = 0.05  # share of the cores that others may take before the table warns
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # the builds without CUDA, a tenth of the size

type Decode = Callable[[np.ndarray, int], tuple[float, np.ndarray]]  # prompt [B, Lp], new -> seconds, tokens


@dataclass(frozen=True)
class Case:
    """What is decoded: `new` tokens after the first one, which is all there is when `new` is 0."""

    rows: int
    prompt: int
    new: int

    def __str__(self) -> str:
        what = f"{self.new} steps after {self.prompt}" if self.new else f"first token after {self.prompt}"
        return f"{self.rows} x {what}"


CASES = (Case(1, 128, 64), Case(8, 128, 64), Case(1, 512, 0))


def torch_python(named: str | None) -> str:
    """An interpreter that has PyTorch and transformers: the one named, or one in an environment made once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = named or str(cache / "paxattn" / "torch-env" / "bin" / "python")
    if not named and not Path(python).exists():
        folder = Path(python).parents[1]
        print(f"making an environment for PyTorch in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "--extra-index-url", TORCH_INDEX]
        subprocess.run([*install, "torch", "transformers>=5,<6", "gguf", "accelerate"], check=True)
    if subprocess.run([python, "-c", "import torch, transformers"]).returncode:
        raise SystemExit(f"{python} cannot import these: install them there, or delete its folder")
    return python


class Peer:
    """The process of hf_decode.py: one line asks for one timed decode."""

    def __init__(self, python: str, gguf: str | None):
        command = [python, str(HERE / "hf_decode.py"), *(["--gguf", gguf] if gguf else [])]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=HERE)
        self.versions: dict[str, str] = self._answer()

    def decode(self, way: str, prompt: np.ndarray, new: int) -> tuple[float, np.ndarray]:
        """Seconds and tokens of one decode, timed on the peer's side of the pipe."""
        request = {"way": way, "prompt": prompt.tolist(), "new": new}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self._answer()
        return answer["seconds"], np.asarray(answer["tokens"])

    def _answer(self) -> dict:
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"the peer ended with status {self.process.wait()}; what it said is above")
        return json.loads(line)


def paxattn_decode(source: str | None) -> Decode:
    """Our side: one jitted program for all lengths of a case, compiled before it is timed."""
    import jax
    import jax.numpy as jnp

    import models
    import paxattn as pax

    model = models.load(source or "smollm2-135m", dtype="float32").model
    generate = jax.jit(pax.generate, static_argnames="max_model_len")
    longest = 1 + max(case.new for case in CASES)

    def decode(prompt: np.ndarray, new: int) -> tuple[float, np.ndarray]:
        rows, width = prompt.shape
        ids, length = jnp.asarray(prompt), jnp.full(rows, width, jnp.int32)
        limits = {"max_new_tokens": jnp.int32(new), "max_model_len": width + longest}
        start = time.perf_counter()
        out = jax.block_until_ready(generate(model, ids, length, **limits))
        seconds = time.perf_counter() - start
        assert (out.length == new).all(), out.length
        return seconds, np.asarray(out.token_ids)[:, :new]

    return decode


def rest() -> float:
    """Half a second in which neither side works; returns the share of the cores that others took."""
    time.sleep(REST / 2)  # threads of the side before stop spinning
    before = _ticks()
    time.sleep(REST / 2)
    total, idle = (after - at for after, at in zip(_ticks(), before, strict=True))
    return 1 - idle / total if total else 0.0


def _ticks() -> tuple[int, int]:
    """Clock ticks of all cores since boot, and the idle ones among them; zeros if the system does not say."""
    stat = Path("/proc/stat")
    words = stat.read_text().split("\n", 1)[0].split()[1:9] if stat.exists() else "0" * 8
    ticks = [int(word) for word in words]
    return sum(ticks), ticks[3] + ticks[4]


def measure(case: Case, sides: dict[str, Decode], rounds: int) -> dict:
    """Raw samples of every side on one case, the sides taking turns, the order reversed each round."""
    prompt = np.random.default_rng(0).integers(SPECIAL, VOCABULARY, (case.rows, case.prompt), dtype=np.int32)
    asks = [1, 1 + case.new] if case.new else [1]
    seconds = {name: {new: [] for new in asks} for name in sides}
    tokens, busy = {}, []
    for turn in range(rounds + 1):  # round 0 compiles and warms
        for name in list(sides) if turn % 2 else reversed(sides):
            for new in asks:
                others = rest()
                took, tokens[name] = sides[name](prompt, new)
                if turn:
                    seconds[name][new].append(took)
                    busy.append(round(others, 3))
    timed = {name: timing(case, seconds[name]) | {"tokens": tokens[name].tolist()} for name in sides}
    return row(case, timed) | {"busy_with_others": record.summary(busy)}


def timing(case: Case, seconds: dict[int, list[float]]) -> dict:
    """Milliseconds to the first token, and a step after it: the difference of medians, and of minima."""
    spans = {new: record.summary([1e3 * s for s in samples]) for new, samples in seconds.items()}
    if not case.new:
        return {"first_token_ms": spans[1]}
    long, short = spans[1 + case.new], spans[1]
    step = {what: (long[what] - short[what]) / case.new for what in ("median", "min")}
    return {"first_token_ms": short, "all_tokens_ms": long, "step_ms": step}


def row(case: Case, sides: dict[str, dict]) -> dict:
    """One line of the record: the case, every side, the fastest way of the peer, and the ratio to it."""
    key = "step_ms" if case.new else "first_token_ms"
    best = min((s for s in sides if s != OURS), key=lambda s: sides[s][key]["median"], default=None)
    line = {"case": str(case), **vars(case), "compares": key, "peer": best, "sides": sides}
    if OURS in sides and best:
        same = [a == b for a, b in zip(sides[OURS]["tokens"], sides[best]["tokens"], strict=True)]
        line |= {  # equal tokens mean something only with equal weights
            "times_faster": sides[best][key]["median"] / sides[OURS][key]["median"],
            "rows_with_equal_tokens": sum(same),
        }
    return line


def table(lines: list[dict]) -> str:
    """Medians and minima, one line a case and side."""
    text = [f"{'case':<30}{'side':<24}{'what':<16}{'median ms':>10}{'min ms':>10}"]
    for line in lines:
        for name, side in line["sides"].items():
            what = line["compares"]
            mark = " *" if name == line["peer"] else ""
            values = f"{side[what]['median']:10.1f}{side[what]['min']:10.1f}"
            text.append(f"{line['case']:<30}{name + mark:<24}{what:<16}{values}")
        if "times_faster" in line:
            rows = f"{line['rows_with_equal_tokens']} of {line['rows']} rows with equal tokens"
            text.append(f"{'':<30}{line['times_faster']:.2f} times faster than it (*); {rows}")
        if (busy := max(line["busy_with_others"]["samples"])) > QUIET:
            text.append(f"{'':<30}not quiet: between samples others took up to {busy:.0%} of the cores")
    return "\n".join([*text, "* the fastest way of the peer"])


METHOD = """
Greedy decoding, float32, no end token. A round asks every side in turn for 1 token and for 1 + new tokens,
half a second of rest before each; rounds reverse the order of the sides; round 0 compiles and is dropped.
step_ms = (time of 1 + new - time of 1) / new, of medians and of minima; first_token_ms = time of 1. The peer
is transformers with SDPA and torch.no_grad, PyTorch threads = cores, by generate() and by a hand loop with
DynamicCache, and when asked by that loop with StaticCache and torch.compile: the fastest median is what we
compare with. Prompts are random token ids, the same for every side. busy_with_others is the share of the
cores in use while both sides rested.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--torch-python", help="a Python with torch and transformers; made if not given")
    add(
        "--gguf",
        help="weights for both sides (the peer needs gguf, accelerate); random for the peer without",
    )
    add("--compiled", action="store_true", help="the peer under torch.compile too (needs a C++ compiler)")
    add("--rounds", type=int, default=5)
    add("--only", choices=("ours", "peer"), help="measure one side alone")
    add("--json", action="store_true", help="print the record instead of the table")
    record.add_options(parser, "cpu_decode.json")
    arguments = parser.parse_args()

    sides: dict[str, Decode] = {} if arguments.only == "peer" else {OURS: paxattn_decode(arguments.gguf)}
    peer = None if arguments.only == "ours" else Peer(torch_python(arguments.torch_python), arguments.gguf)
    if peer:
        ways = {name: way for name, way in PEERS.items() if way != "compiled" or arguments.compiled}
        sides |= {name: partial(peer.decode, way) for name, way in ways.items()}
    lines = []
    for case in CASES:
        fit = {name: side for name, side in sides.items() if case.new or not name.endswith("compiled")}
        lines.append(measure(case, fit, arguments.rounds))

    same = "The weights are those of one GGUF file, on both sides."
    weights = same if arguments.gguf else "The peer's weights are random, seed 0."
    about = {"method": METHOD + weights, "peers": peer.versions if peer else {}}
    if arguments.json:
        print(json.dumps(record.document("cpu_decode", lines, **about), indent=1))
    else:
        print(table(lines))
    if arguments.save:
        print(f"written: {record.write('cpu_decode', lines, **about)}", file=sys.stderr)


if __name__ == "__main__":
    main()
