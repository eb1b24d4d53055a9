"""Several processes, one program: they find each other, see that they were started alike, and only the first speaks.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID    said by hand
    Slurm, Open MPI, a Kubernetes indexed job                     found by jax.distributed

Every wait has an end: for processes that do not come (PATIENCE), and for one that has died (HEARTBEAT).
"""

import argparse
import json
import os
import re
import sys
from importlib import metadata
from typing import Any

import jax

import paxattn as pax

PATIENCE = 60
"""Seconds to wait for another process to appear, or to say what it was started with."""

HEARTBEAT = 20
"""Seconds without a sign of life after which a process counts as dead, and the others end."""

_MANAGED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""How many processes a launcher started."""


def open_mesh(options: argparse.Namespace) -> jax.sharding.Mesh | None:
    """The mesh that `--mesh` asks for, over the devices of all processes; before JAX has looked at any device.

    Raises:
      ValueError: no such mesh, or processes that were started with other options.
    """
    if options.mesh is None:
        return None
    sizes = re.fullmatch(r"data=(\d+),model=(\d+)", options.mesh)
    if sizes is None:
        raise ValueError(f"--mesh is {options.mesh!r}; write data=D,model=M with two numbers, like data=1,model=2.")
    if several_processes():
        join_processes()
        speak_once()
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib")} | {"paxattn": pax.__version__}
    agree("start", {name: str(value) for name, value in vars(options).items()} | versions)
    return pax.make_mesh(*map(int, sizes.groups()))


def several_processes() -> bool:
    """Whether the environment says that this process is one of several."""
    in_job = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    return "JAX_COORDINATOR_ADDRESS" in os.environ or in_job or any(int(os.environ.get(n, 1)) > 1 for n in _MANAGED)


def join_processes() -> None:
    """`jax.distributed.initialize` from the environment, with waits that end; JAX ends the process if they do."""
    print(f"paxattn waits for the other processes, {PATIENCE} s at most.", file=sys.stderr, flush=True)
    numbers = {name: int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if name in os.environ}
    jax.distributed.initialize(
        num_processes=numbers.get("JAX_NUM_PROCESSES"),
        process_id=numbers.get("JAX_PROCESS_ID"),
        initialization_timeout=PATIENCE,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=HEARTBEAT,
    )


def is_first() -> bool:
    """Whether this is the process that answers, or the only one."""
    return jax.process_index() == 0


def speak_once() -> None:
    """Only the first process writes to stdout, and only Python does: Gloo's own lines go to stderr."""
    sys.stdout = os.fdopen(os.dup(1) if is_first() else os.open(os.devnull, os.O_WRONLY), "w")
    os.dup2(2, 1)


def agree(topic: str, facts: dict[str, Any], seconds: int = PATIENCE) -> None:
    """Compares what every process says with what the first one says; nothing to do where there is only one.

    Raises:
      ValueError: they differ, or one does not say anything in time.
    """
    from jax._src.distributed import global_state  # where JAX and Orbax keep it: there is no public name

    if (client := global_state.client) is None:
        return
    mine = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
    place = f"paxattn/{topic}/{{}}/".format
    turn = len(client.key_value_dir_get(place(jax.process_index())))  # a topic may come up again: another model, say
    client.key_value_set(f"{place(jax.process_index())}{turn}", json.dumps(mine))
    for process in range(jax.process_count()):
        try:
            said = client.blocking_key_value_get(f"{place(process)}{turn}", 1000 * seconds)
        except Exception as error:  # jaxlib's own kinds
            raise ValueError(f"process {process} did not say its {topic} within {seconds} s: {error}") from error
        theirs = json.loads(said)
        if differing := sorted(name for name in mine | theirs if mine.get(name) != theirs.get(name)):
            listed = "; ".join(f"{name}: {mine.get(name)} here, {theirs.get(name)} there" for name in differing)
            here = jax.process_index()
            raise ValueError(f"the {topic} of process {process} is not that of process {here}: {listed}.")
