"""A sweep on a real Ray cluster: two nodes on loopback addresses, tokens on, workers and driver killed.

Ray listens on all interfaces, whatever address a node has, so the cluster is in a network namespace that has loopback
and nothing else.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.states import OFTEN, mark, marked, states
from tests.waiting import wait_until
from vitrap.experiment.records import read_records

SWEEP = """
name = "tiny"
[data]
limit = 1000
[model]
name = "vit_tiny_patch16_224"
patch_size = 4
embed_dim = 16
depth = 1
num_heads = 2
[attack]
name = "badnets"
[recipe]
epochs = 40
[grid]
seed = [0, 1]
attack.size = [1, 2, 3]
"""

PATIENT = {
    "RAY_gcs_server_port_wait_time_s": "1200",
    "RAY_gcs_rpc_server_connect_timeout_s": "1200",
    "RAY_gcs_server_request_timeout_seconds": "1200",
    "RAY_worker_register_timeout_seconds": "1200",
    "RAY_health_check_timeout_ms": "1200000",
}
"""Ray's own clocks, which would take a busy machine for a dead one."""


@pytest.fixture
def inside() -> Iterator[list[str]]:
    """The words before a command that has loopback and no other network."""
    pytest.importorskip("ray")
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("a network of loopback alone needs Linux with util-linux and iproute2")
    own = [] if os.geteuid() == 0 else ["--user"]
    mapped = ["--map-root-user"] * len(own)
    up = ["sh", "-c", "ip link set lo up && echo up && exec sleep infinity"]
    with subprocess.Popen(["unshare", "--net", *own, *mapped, *up], stdout=subprocess.PIPE, text=True) as holder:
        try:
            if holder.stdout.readline() != "up\n":
                pytest.skip("this system lets nobody make a network namespace")
            kept = ["--preserve-credentials"] * len(own)
            yield ["nsenter", "--target", str(holder.pid), "--net", *own, *kept]
        finally:
            holder.kill()


@pytest.fixture
def cluster(inside: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster's head; both nodes run as `ray start` has them, with one core each."""
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray") as own:  # a short path: sockets lie below it
        token = Path(own, "token")
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for name, value in {**PATIENT, **OFTEN}.items():
            monkeypatch.setenv(name, value)
        head = ["--head", "--port", port, "--node-ip-address", "127.0.0.2", "--include-dashboard", "false"]
        node = ["--address", f"127.0.0.2:{port}", "--node-ip-address", "127.0.0.3"]
        nodes = []
        try:
            for each in ([*head, "--temp-dir", own], node):
                nodes.append(start(inside, each))
            yield f"127.0.0.2:{port}"
        finally:
            for each in nodes:
                end(each)


def start(inside: list[str], words: list[object]) -> subprocess.Popen[str]:
    """A node that runs; one for which Ray's own half a minute was too short is started anew."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [*inside, ray, "start", "--block", "--num-cpus", "1", *map(str, words)]
    said = "timed out during startup"
    while "timed out during startup" in said:
        node = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        said = ""
        for line in node.stdout:
            said += line
            if "Ray runtime started" in line:
                return node
        end(node)
    raise AssertionError(said)


def end(node: subprocess.Popen[str]) -> None:
    """Kill a node with all its processes: asked kindly, it takes half a minute."""
    with suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.communicate()


def tasks(out: Path) -> list[int]:
    """The processes that are inside a task of this sweep: those that hold a lock of its stages."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::run_task" in (folder / "cmdline").read_bytes():
                held = [os.readlink(handle) for handle in (folder / "fd").iterdir()]
                found += [int(folder.name)] * any(name.startswith(str(out)) for name in held)
        except OSError:
            continue
    return found


def records(out: Path) -> dict[str, int]:
    return {file.parent.name: file.stat().st_mtime_ns for file in out.glob("*/record.json")}


def network(pid: int | str) -> str:
    """The network namespace of a process."""
    return os.readlink(f"/proc/{pid}/ns/net")


def test_workers_and_driver_may_be_killed_and_every_run_is_done_once(cluster: str, inside: list[str], tmp_path: Path):
    (tmp_path / "sweep.toml").write_text(SWEEP)
    out = tmp_path / "runs"
    words = [*inside, sys.executable, "-m", "vitrap.cli.main", "sweep", "sweep.toml", "--out", "runs"]
    words += ["--device", "cpu", "--ray-address", cluster]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    driver = subprocess.Popen(words, **pipes)
    wait_until(lambda: len(tasks(out)) == 2, driver)  # one on each node
    assert network("self") not in map(network, [driver.pid, *tasks(out)])  # nobody else can reach them
    killed = tasks(out)[0]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: len(records(out)) >= 2 and tasks(out) and states(out), driver)
    driver.kill()
    driver.communicate()
    wait_until(lambda: not tasks(out))
    first = records(out)
    assert killed not in tasks(out)
    under_way = {state.parent.name.removeprefix(".").removesuffix("-draft") for state in states(out)}
    for state in states(out):
        mark(state)

    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = records(out)
    assert len(last) == 6
    assert {name: last[name] for name in first} == first
    assert f"6 runs: {6 - len(first)} done, {len(first)} had a record" in done.stdout
    assert read_records(out).failures == ()
    assert set(marked(out)) == under_way  # trainings went on where they had been

    long = subprocess.Popen([*words, "recipe.epochs=1000000"], **pipes)
    wait_until(lambda: len(tasks(out)) == 2, long)
    crew = tasks(out)
    long.kill()
    long.communicate()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in crew))

    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    refused = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "cannot be joined: " in line
    assert "RAY_AUTH_TOKEN_PATH" in line
