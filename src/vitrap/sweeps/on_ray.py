"""Runs as tasks of a Ray cluster, for more than one machine. Ray does a task again whose worker was killed."""

import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from vitrap.errors import UserError
from vitrap.experiment.code import running_code
from vitrap.sweeps.jobs import TRIES, Ended, Job, Listener, Started, Step, fail, reporting, work

CHOSEN = ("VITRAP_MEMORY", "VITRAP_STATE_SECONDS")
"""Variables of the driver's environment that its tasks get."""
REACH = 5.0
"""Seconds within which a cluster's head must answer."""


def run_on_ray(jobs: Sequence[Job], address: str, threads: int, hear: Listener) -> None:
    """Do jobs as tasks of a cluster whose nodes all see the folder of runs.

    Args:
        jobs: in the order in which they are begun.
        address: of the running cluster's head, "auto" for the one of this machine.
        threads: a task's share of CPU cores.
        hear: is told what happens.

    Raises:
        UserError: Ray is not installed, or the address does not answer or lets nobody in.
    """
    ray = load_ray()
    with _cluster(ray, address):
        Path(jobs[0].out).mkdir(parents=True, exist_ok=True)
        gpus = 1 if ray.cluster_resources().get("GPU") and jobs[0].device != "cpu" else 0
        task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=TRIES - 1)(do)
        mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
        waiting, running = deque(jobs), {}
        chosen = {name: os.environ[name] for name in CHOSEN if name in os.environ}
        while waiting or running:
            room = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1)) // threads  # nodes come and go
            while waiting and len(running) < max(1, room):
                job, taken = waiting.popleft(), {place for _, place in running.values()}
                place = min(set(range(len(taken) + 1)) - taken)
                told = asdict(replace(job, device=job.device.partition(":")[0]))  # which of its GPUs, Ray decides
                running[task.remote(told, os.getcwd(), threads, running_code(), (mailbox, place, chosen))] = job, place
            done = ray.wait(list(running), timeout=1.0)[0]
            with suppress(ray.exceptions.RayError):  # a mailbox that went with its node: the runs go on unwatched
                for news in ray.get(mailbox.take.remote(), timeout=REACH):
                    hear(news)
            for one in done:
                hear(_ended(ray, one, running.pop(one)[0]))


class Mailbox:
    """Where tasks tell what they are at, and the driver reads it."""

    def __init__(self) -> None:
        self.news: dict[int, Started | Step] = {}

    def tell(self, news: Started | Step) -> None:
        """Keep the latest of each worker."""
        self.news[news.worker] = news

    def take(self) -> list[Started | Step]:
        """What is new."""
        taken, self.news = list(self.news.values()), {}
        return taken


def load_ray() -> Any:
    """Ray, with its tokens asked for.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # before ray is there: without it anybody can run code on a node
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a task without a GPU is no reason for a warning
    try:
        return import_module("ray")
    except ImportError as error:
        raise UserError("--ray-address asks for Ray, which is not installed; pip install 'vitrap[ray]'") from error


def do(
    job: dict[str, Any], folder: str, threads: int, code: str, told: tuple[Any, int, dict[str, str]]
) -> dict[str, Any]:
    """A task: a run, on whatever node; paths are as seen from the driver's folder.

    `told` is mailbox, place and the driver's own `CHOSEN` variables; where it has none, each node keeps its own.
    """
    found, (mailbox, place, chosen) = Job(**job), told
    mailbox.tell.remote(Started(found.number, place))
    if code != running_code():
        return asdict(_refuse(found, "this node has another version of vitrap than the driver"))
    if not Path(folder).is_dir() or not Path(folder, found.out).is_dir():
        return asdict(_refuse(found, f"this node does not see {found.out!r}; --out must lie where all nodes see it"))
    os.chdir(folder)
    os.environ |= chosen
    import torch

    torch.set_num_threads(threads)
    return asdict(work(found, reporting(found.number, place, mailbox.tell.remote)))


def _refuse(job: Job, why: str) -> Ended:
    return Ended(job.number, "failed", f"UserError: {why}", 0.0)


def _ended(ray: Any, reference: Any, job: Job) -> Ended:
    """How a task ended; a run whose record did not come to the driver's folder has failed."""
    try:
        ended = Ended(**ray.get(reference))
    except (ray.exceptions.RayError, OSError) as error:
        return fail(job, error, 0.0)
    if ended.how == "failed":
        return ended if (job.folder / "failure.json").exists() else fail(job, UserError(ended.said), ended.seconds)
    if not (job.folder / "record.json").exists():
        why = f"its record is not in {job.out!r}: --out must lie where all nodes see it"
        return fail(job, UserError(why), ended.seconds)
    return ended


@contextmanager
def _cluster(ray: Any, address: str) -> Iterator[None]:
    """A connection to the cluster at `address`, for as long as the block lasts."""
    _reach(address)
    try:
        with _mute():
            ray.init(address=address, log_to_driver=False, logging_level="error")
    except Exception as error:
        said = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(f"the Ray cluster at {address} cannot be joined: {said}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _mute() -> Iterator[None]:
    """Keep what Ray's own libraries say past Python off stderr: a refusal is one line, and ours."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _reach(address: str) -> None:
    """Refuse an address that nobody answers at: Ray itself would go on trying."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not colon or not port.isdigit():
        raise UserError(f"--ray-address {address!r} is wrong; give HOST:PORT, as ray start --head printed it, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=REACH).close()
    except (OSError, OverflowError) as error:
        why = f"nobody answers at --ray-address {address!r} ({error})"
        raise UserError(f"{why}; start the head there: see README, more than one machine") from error
