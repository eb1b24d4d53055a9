"""A measurement and everything needed to doubt it: machine, versions, flags, commit, method, every raw sample.

    write("cpu_decode", rows, method="...")   ->   benchmarks/results/<folder>/cpu_decode.json

A number without its samples cannot be checked later, and one measured on uncommitted code cannot be repeated:
both are in the file, the second as `dirty`.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
from importlib import metadata
from pathlib import Path

import jax

import paxattn

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def machine() -> dict:
    """CPU model, cores usable by this process, memory, load when asked."""
    info = _text("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info)
    memory = re.search(r"MemTotal:\s*(\d+) kB", _text("/proc/meminfo"))
    flags = set(re.findall(r"\b(avx2|avx512f|avx512_bf16|amx_bf16)\b", info))
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cpu_flags": sorted(flags),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2),
    }


def device() -> dict:
    """Where JAX computes, and how many of them."""
    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}


def versions(peers: dict[str, str] | None = None) -> dict:
    """Versions of Python, of our packages, and of `peers` as they report themselves."""
    ours = {"python": platform.python_version(), "paxattn": paxattn.__version__}
    return ours | {p: metadata.version(p) for p in PACKAGES} | (peers or {})


def commit() -> dict:
    """The commit measured, and whether tracked files differ from it; PAXATTN_COMMIT names it for a bare copy."""
    if told := os.environ.get("PAXATTN_COMMIT"):
        return {"commit": told, "dirty": False}
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "-uno"))}


def summary(samples: list[float]) -> dict:
    """Median, minimum, and the samples themselves, in the order in which they were taken."""
    return {"median": statistics.median(samples), "min": min(samples), "samples": samples}


def document(name: str, rows: list[dict], *, method: str, peers: dict[str, str] | None = None) -> dict:
    """The whole record of one run."""
    return {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "device": device(),
        "versions": versions(peers),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **commit(),
        "method": " ".join(method.split()),
        "rows": rows,
    }


def add_options(parser: argparse.ArgumentParser, names: str, tiny: str | None = None) -> None:
    """Adds `--save`, and `--tiny` where there is a small case: what is tiny is never kept."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--save", action="store_true", help=f"write benchmarks/results/<device>/{names}")
    if tiny:
        group.add_argument("--tiny", action="store_true", help=tiny)


def write(name: str, rows: list[dict], *, method: str, peers: dict[str, str] | None = None, devices: int = 1) -> Path:
    """Write one run to `results/<device>/<name>.json`, or to `<device>x2` where two were used."""
    record = document(name, rows, method=method, peers=peers)
    path = RESULTS / (_folder(record) + (f"x{devices}" if devices > 1 else "")) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return path


def _folder(record: dict) -> str:
    """A folder name such as `amd-epyc-2-cores`, `h100` or `nvidia-a100-sxm4-40gb`."""
    on_cpu, kind = record["device"]["platform"] == "cpu", record["device"]["kind"]
    if short := re.search(r"\b(h100|h200|gh200|b200)\b", kind.lower()):
        return short[0]
    kind = f"{record['machine']['cpu']} {record['machine']['cores']} cores" if on_cpu else kind
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def _text(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
