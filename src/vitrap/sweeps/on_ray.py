"""Does the runs of a sweep as tasks of a Ray cluster, on more than one machine.

If a worker is killed, Ray does its task again.
"""

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
from vitrap.experiment.record import RECORD
from vitrap.experiment.records import FAILURE
from vitrap.sweeps.jobs import TRIES, Ended, Job, Listener, Started, StepProgress, fail, reporting, work

CHOSEN = ("VITRAP_MEMORY", "VITRAP_STATE_SECONDS")
"""Variables of the driver's environment that are set for its tasks, too."""
ANSWER_SECONDS = 5.0
"""Seconds within which a cluster's head must answer."""


def run_on_ray(jobs: Sequence[Job], address: str, threads: int, listener: Listener) -> None:
    """Do jobs as tasks of a cluster whose nodes all see the folder of runs.

    Args:
        jobs: the jobs, in the order in which they are begun.
        address: address of the running cluster's head; "auto" for a cluster on this machine.
        threads: CPU cores of each task.
        listener: called with each event.

    Raises:
        UserError: Ray is not installed, or the address does not answer or refuses the connection.
    """
    ray = load_ray()
    with _cluster(ray, address):
        Path(jobs[0].out).mkdir(parents=True, exist_ok=True)
        gpus = 1 if ray.cluster_resources().get("GPU") and jobs[0].device != "cpu" else 0
        task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=TRIES - 1)(run_task)
        mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
        waiting = deque(jobs)
        running: dict[Any, tuple[Job, int]] = {}
        chosen = {name: os.environ[name] for name in CHOSEN if name in os.environ}
        while waiting or running:
            # Submit as many tasks as the cluster has room for; nodes may come and go.
            room = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1)) // threads
            while waiting and len(running) < max(1, room):
                job = waiting.popleft()
                # The lowest number that no running task has: by it the display tells tasks apart.
                taken = {place for _, place in running.values()}
                place = min(set(range(len(taken) + 1)) - taken)
                # Ray decides which GPU of a node a task gets.
                sent = asdict(replace(job, device=job.device.partition(":")[0]))
                reference = task.remote(sent, os.getcwd(), threads, running_code(), (mailbox, place, chosen))
                running[reference] = job, place
            # Wait for tasks to end, and pass on what the others report meanwhile.
            done = ray.wait(list(running), timeout=1.0)[0]
            with suppress(ray.exceptions.RayError):  # the mailbox was lost with its node: the runs go on without it
                for event in ray.get(mailbox.take.remote(), timeout=ANSWER_SECONDS):
                    listener(event)
            for reference in done:
                job, _ = running.pop(reference)
                listener(_ended(ray, reference, job))


class Mailbox:
    """A Ray actor to which tasks send events, and from which the driver takes them."""

    def __init__(self) -> None:
        self.latest: dict[int, Started | StepProgress] = {}

    def put(self, event: Started | StepProgress) -> None:
        """Keep the latest event of each worker."""
        self.latest[event.worker] = event

    def take(self) -> list[Started | StepProgress]:
        """The events since the last call."""
        taken = list(self.latest.values())
        self.latest = {}
        return taken


def load_ray() -> Any:
    """Import Ray with its authentication by tokens switched on.

    Raises:
        UserError: it is not installed.
    """
    # Ray reads these when it is imported. Without tokens, anybody on the network could run code on a node.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # no warning about tasks without a GPU
    try:
        return import_module("ray")
    except ImportError as error:
        raise UserError("--ray-address asks for Ray, which is not installed; pip install 'vitrap[ray]'") from error


def run_task(
    job: dict[str, Any], folder: str, threads: int, code: str, task_context: tuple[Any, int, dict[str, str]]
) -> dict[str, Any]:
    """A task: does a run on a node of the cluster.

    Args:
        job: the fields of the `Job`.
        folder: the driver's working folder, from which paths of the job are seen.
        threads: threads of the task.
        code: digest of the driver's code; a node with other code refuses the run.
        task_context: the mailbox, the task's number for display, and the `CHOSEN` variables that the driver has set.
    """
    found = Job(**job)
    mailbox, place, chosen = task_context
    mailbox.put.remote(Started(found.number, place))
    if code != running_code():
        return asdict(_refuse(found, "this node has another version of vitrap than the driver"))
    if not Path(folder).is_dir() or not Path(folder, found.out).is_dir():
        return asdict(_refuse(found, f"this node does not see {found.out!r}; --out must lie where all nodes see it"))
    os.chdir(folder)
    os.environ |= chosen
    import torch

    torch.set_num_threads(threads)
    return asdict(work(found, reporting(found.number, place, mailbox.put.remote)))


def _refuse(job: Job, why: str) -> Ended:
    """The end of a run that this node cannot do."""
    return Ended(job.number, "failed", f"UserError: {why}", 0.0)


def _ended(ray: Any, reference: Any, job: Job) -> Ended:
    """How a task ended; a run whose record is not in the driver's folder has failed."""
    try:
        ended = Ended(**ray.get(reference))
    except (ray.exceptions.RayError, OSError) as error:
        return fail(job, error, 0.0)
    if ended.how == "failed":
        return ended if (job.folder / FAILURE).exists() else fail(job, UserError(ended.said), ended.seconds)
    if not (job.folder / RECORD).exists():
        why = f"its record is not in {job.out!r}: --out must lie where all nodes see it"
        return fail(job, UserError(why), ended.seconds)
    return ended


@contextmanager
def _cluster(ray: Any, address: str) -> Iterator[None]:
    """Connect to the cluster at `address` for as long as the block lasts."""
    _check_address(address)
    try:
        with _silenced_stderr():
            ray.init(address=address, log_to_driver=False, logging_level="error")
    except Exception as error:
        said = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(f"the Ray cluster at {address} cannot be joined: {said}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Silence stderr at the level of the system: Ray's C++ libraries print there, and an error is to be one line."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_address(address: str) -> None:
    """Refuse an address that does not answer; Ray itself would go on trying."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not colon or not port.isdigit():
        raise UserError(f"--ray-address {address!r} is wrong; give HOST:PORT, as ray start --head printed it, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        why = f"nobody answers at --ray-address {address!r} ({error})"
        raise UserError(f"{why}; start the head there: see README, more than one machine") from error
