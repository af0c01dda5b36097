"""Does the runs of a sweep in worker processes of this machine.

A worker that is killed is replaced, and its run is tried again.
"""

import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess

from vitrap.sweeps.jobs import TRIES, Ended, Job, Listener, Started, fail, reporting, work

PATIENCE = 2.0
"""Seconds that a worker has to remove its drafts when it is told to stop."""


@dataclass
class Worker:
    """A worker process, the connection to it, and its present job; None: it is idle."""

    number: int
    process: BaseProcess
    connection: Connection
    job: Job | None = None


def run_local(jobs: Sequence[Job], devices: Sequence[str], threads: int, listener: Listener) -> None:
    """Do jobs side by side, with a worker for each device.

    Args:
        jobs: the jobs, in the order in which they are begun.
        devices: where each worker computes.
        threads: threads of each worker, so that all together have the machine's cores.
        listener: called with each event.
    """
    context = get_context("spawn")
    waiting = deque(jobs)
    tries: Counter[int] = Counter()
    workers: list[Worker] = []
    try:
        workers += [_start_worker(context, number, threads) for number in range(min(len(devices), len(jobs)))]
        while waiting or any(worker.job for worker in workers):
            # Give each idle worker the next job.
            for worker in workers:
                if worker.job is None and waiting:
                    _send_job(worker, replace(waiting.popleft(), device=devices[worker.number]), listener)
            # Wait until busy workers send something, or die, which ends their connection.
            busy = [worker for worker in workers if worker.job]
            for connection in wait([worker.connection for worker in busy]):
                worker = next(worker for worker in busy if worker.connection is connection)
                _receive_event(worker, waiting, tries, listener)
                if worker.job is None and not worker.process.is_alive():
                    workers[worker.number] = _start_worker(context, worker.number, threads)
    finally:
        _stop_workers(workers)


def _start_worker(context: SpawnContext, number: int, threads: int) -> Worker:
    """Start a worker process."""
    ours, theirs = context.Pipe()
    process = context.Process(target=_do_jobs, args=(theirs, number, threads), daemon=True)
    process.start()
    theirs.close()  # so that the worker's death ends the connection
    return Worker(number, process, ours)


def _send_job(worker: Worker, job: Job, listener: Listener) -> None:
    """Send a job to a worker."""
    worker.job = job
    with suppress(BrokenPipeError):  # it has died: `_receive_event` finds its connection ended
        worker.connection.send(job)
    listener(Started(job.number, worker.number))


def _receive_event(worker: Worker, waiting: deque[Job], tries: Counter[int], listener: Listener) -> None:
    """Receive an event from a worker; if it has died, its job is tried again or has failed."""
    job = worker.job
    assert job is not None
    try:
        event = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        worker.job = None
        tries[job.number] += 1
        if tries[job.number] < TRIES:
            waiting.appendleft(job)
            return
        event = fail(job, RuntimeError(f"its worker died {TRIES} times (exit {worker.process.exitcode})"), 0.0)
    if isinstance(event, Ended):
        worker.job = None
    listener(event)


def _stop_workers(workers: Sequence[Worker]) -> None:
    """End all workers: idle ones are told to, others get time to remove their drafts."""
    for worker in workers:
        if worker.job:
            worker.process.terminate()
        with suppress(OSError):
            worker.connection.send(None)
    until = time.monotonic() + PATIENCE
    for worker in workers:
        worker.process.join(max(0.0, until - time.monotonic()))
        worker.process.kill()
        worker.process.join()
        worker.connection.close()


def _do_jobs(connection: Connection, number: int, threads: int) -> None:
    """The main function of a worker process: do the jobs that the driver sends, until it sends None or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the driver tells workers to stop
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # drafts are cleared on the way out
    threading.Thread(target=_stop_with_driver, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is imported
    import torch

    torch.set_num_threads(threads)
    with suppress(EOFError, BrokenPipeError):
        while (job := connection.recv()) is not None:
            connection.send(work(job, reporting(job.number, number, connection.send)))


def _stop_with_driver() -> None:
    """Wait for the driver's end, and then end this worker."""
    driver = parent_process()
    assert driver is not None
    driver.join()
    signal.alarm(round(PATIENCE))  # the system ends the process even if the main thread is busy outside of Python
    with suppress(ProcessLookupError):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
