"""Many devices: the checks of `devices.py` in a process with eight of them, and two processes that share a mesh."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from models.hosts import HEARTBEAT, PATIENCE
from tests.models.devices import CHECKS, SHARED
from tests.paths import GOLDEN, ROOT

TINY = str(GOLDEN / "tiny_llama")
EXPECTED = json.loads((GOLDEN / "tiny_llama" / "expected.json").read_text())


FAST = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
"""Compiling is what these tests do most of the time."""


@pytest.fixture(scope="module")
def found(request):
    calls = [getattr(item, "callspec", None) for item in request.session.items if "eight_devices" in item.name]
    names = [call.params["check"] for call in calls if call is not None]
    command, env = [sys.executable, "-m", "tests.models.devices", *names], os.environ | FAST
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(found, check):
    assert not found[check], found[check]


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*words, **variables):
    """A process with one CPU device."""
    env = os.environ | FAST | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, env=env, **pipes)


def two(*words, extra=()):
    """Two processes of the command line, the second with options of its own too."""
    address = f"127.0.0.1:{free_port()}"
    named = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    more = ((), extra)
    return [start("models.cli", *words, *more[i], **named, JAX_PROCESS_ID=str(i)) for i in range(2)]


@pytest.fixture(scope="module")
def shared():
    address = f"127.0.0.1:{free_port()}"
    pair = [start("tests.models.devices", address, str(i)) for i in range(2)]
    done = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], done[0][1][-2000:] + done[1][1][-2000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in done]


@pytest.mark.parametrize("check", SHARED)
def test_in_two_processes(shared, check):
    assert [results[check] for results in shared] == ["", ""]


def test_the_command_line_in_two_processes():
    """The first process answers, and says nothing but its JSON."""
    prompts = [word for p in EXPECTED["prompts"][:3] for word in ("--prompt-ids", ",".join(map(str, p)))]
    words = ("generate", *prompts, "--model", TINY, "--max-new-tokens", "6", "--speculate", "ngram", "--json")
    first, second = two(*words, "--mesh", "data=2,model=1")
    out, err = first.communicate(timeout=120)
    assert first.returncode == second.wait(timeout=60) == 0, err
    assert [answer["token_ids"] for answer in json.loads(out)["outputs"]] == [t[:6] for t in EXPECTED["greedy"][:3]]
    assert second.communicate()[0] == ""


@pytest.fixture(scope="module", autouse=True)
def lonely():
    """The first of two processes, whose other never comes; it waits while other tests run."""
    named = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    process = start("models.cli", "serve-bench", "--shapes", "tiny", "--mesh", "data=1,model=2", **named)
    yield process
    process.kill()
    process.communicate()


def test_a_process_does_not_wait_for_ever(lonely):
    out, err = lonely.communicate(timeout=2 * PATIENCE)
    assert lonely.returncode != 0
    assert f"waits for the other processes, {PATIENCE} s at most" in err
    assert out == ""


def test_a_mesh_that_does_not_fit_the_model_ends_with_every_size_that_does_not():
    words = ("generate", "--prompt-ids", "1", "--model", TINY, "--mesh", "data=1,model=3")
    process = start("models.cli", *words, XLA_FLAGS="--xla_force_host_platform_device_count=3")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "num_attention_heads = 8" in err
    assert "num_key_value_heads = 2" in err
    assert out == ""


def test_processes_that_were_started_differently_end():
    pair = two("serve-bench", "--shapes", "tiny", "--mesh", "data=1,model=2", extra=("--seed", "3"))
    for process in pair:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert 'seed: "' in err
        assert out == ""


def test_when_a_process_dies_the_other_ends():
    """Within the heartbeat, in the middle of a loop that would run for minutes."""
    sizes = ("--requests", "500", "--low", "200", "--high", "400", "--max-num-seqs", "8")
    survivor, victim = two("serve-bench", "--shapes", "tiny", *sizes, "--mesh", "data=1,model=2")
    for line in victim.stderr:
        if "[Gloo]" in line and "1 peer" in line:
            break
    victim.kill()
    died = time.monotonic()
    out, err = survivor.communicate(timeout=120)
    assert time.monotonic() - died < 3 * HEARTBEAT
    assert survivor.returncode != 0
    assert out == ""
    assert "another task died" in err or "Connection reset by peer" in err, err
    victim.communicate()
