"""What the assembler makes of the kernels for an H100, on a machine with or without one.

    a case  --JAX, for a described H100-->  PTX  --ptxas-->  registers, bytes spilled, products run one by one

    $ make assemble                                            the CUDA plugin of JAX (140 MB) beside the environment
    $ python -m pallas_kernels.assemble prefill decode --json  where the plugin is installed

The interpreter sees what a kernel computes and races for; a spill in the innermost loop, or matrix products that ptxas
"serialized" as something touched their registers, it does not see, and either costs more than most designs win. No
driver is asked and no GPU: the device is described in text.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from importlib import metadata

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels import mosaic
from pallas_kernels.cases import HOPPER_CASES, Case, make

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_WORDS = re.compile(
    r"^case (?P<case>.+)$"
    r"|(?P<serialized>instructions are serialized) due to .* function '(?P<function>\w+)'"
    r"|Compiling entry function '(?P<entry>\w+)'"
    r"|(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads$"
    r"|Used (?P<registers>\d+) registers",
    re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A kernel of a case: registers of a thread when it starts, bytes that it spills, and whether products wait."""

    case: str
    kernel: str
    registers: int
    spilled: int
    serialized: bool


class AssemblerError(RuntimeError):
    """JAX has no plugin of its version to compile for CUDA, or a kernel does not compile."""


def assemble(names: list[str] | None = None) -> list[Assembled]:
    """Each kernel of these cases of `HOPPER_CASES`, or of all.

    Raises:
      AssemblerError: JAX has no plugin to compile for CUDA, and the message says what to install; or a case fails.
      KeyError: there is no such case.
    """
    names = list(HOPPER_CASES) if names is None else names
    if unknown := [name for name in names if name not in HOPPER_CASES]:
        raise KeyError(f"no case {', '.join(unknown)}; there are {', '.join(HOPPER_CASES)}.")
    told = {"MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    child = [sys.executable, "-c", f"from pallas_kernels import assemble; assemble.compile_all({names!r})"]
    run = subprocess.run(child, env=os.environ | told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        raise problem(run.stdout)
    return read(run.stdout)


def problem(text: str) -> AssemblerError:
    """Why the process that compiles ended: before the first case for want of a plugin, later for a case's own sake."""
    said = text.strip().splitlines()
    if cases := [line.removeprefix("case ") for line in said if line.startswith("case ")]:
        return AssemblerError("\n".join([f"case {cases[-1]} does not compile for an H100:", *said[-20:]]))
    version = metadata.version("jaxlib")
    return AssemblerError(
        f"JAX compiles for no H100 here: {said[-1] if said else 'it was ended'}. It needs its CUDA plugin: "
        f"pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}, or `make assemble`."
    )


def compile_all(names: list[str]) -> None:
    """Compiles the cases one after the other, in a process whose output is read."""
    (device,) = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology="1x1x1").devices
    for name in names:
        print(f"case {name}", flush=True)
        _lower(HOPPER_CASES[name], device).compile()


def _lower(case: Case, device) -> jax.stages.Lowered:
    place = SingleDeviceSharding(device)
    arrays = make(case)
    dtypes = [jnp.bfloat16 if a.ndim > 2 else a.dtype for a in arrays]
    shapes = [jax.ShapeDtypeStruct(a.shape, d, sharding=place) for a, d in zip(arrays, dtypes, strict=True)]
    return jax.jit(functools.partial(mosaic.run, **case.all_options)).lower(*shapes)


def read(text: str) -> list[Assembled]:
    """What ptxas said, case by case; a kernel that is compiled twice counts once."""
    found, serial, case, kernel, spilled = {}, set(), "", "", 0
    for word in _WORDS.finditer(text):
        if word["case"]:
            case = word["case"]
        elif word["serialized"]:
            serial.add((case, word["function"]))
        elif word["entry"]:
            kernel = word["entry"]
        elif word["stores"]:
            spilled = int(word["stores"]) + int(word["loads"])
        else:
            name = kernel.removesuffix("_mosaic_gpu_kernel")
            found[case, name] = Assembled(case, name, int(word["registers"]), spilled, (case, kernel) in serial)
    return list(found.values())


def main() -> None:
    """The command: a line a kernel, or JSON; exit code 1 where products are serialized."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="case", help=", ".join(HOPPER_CASES))
    parser.add_argument("--json", action="store_true", help="a list of objects")
    options = parser.parse_args()
    try:
        kernels = assemble(options.names or None)
    except (AssemblerError, KeyError) as e:
        parser.error(e.args[0])
    if options.json:
        print(json.dumps([dataclasses.asdict(kernel) for kernel in kernels], indent=1))
    else:
        for k in kernels:
            note = "  products are serialized" if k.serialized else ""
            print(f"{k.case:28} {k.kernel:16} {k.registers:4} registers {k.spilled:5} bytes spilled{note}")
    sys.exit(any(kernel.serialized for kernel in kernels))


if __name__ == "__main__":
    main()
