"""One run of a sweep as a worker does it, on this machine or another, and the news of it."""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from vitrap.experiment.progress import Progress, no_progress
from vitrap.experiment.record import SCHEMA, Failure, Table, to_table
from vitrap.experiment.records import FAILURE
from vitrap.experiment.spec import Spec, parse_spec
from vitrap.files import write_json

OFTEN = 0.25
"""Seconds between two ticks that a worker reports."""
TRIES = 3
"""A run whose worker is killed so many times has failed."""


@dataclass(frozen=True)
class Job:
    """A run to do.

    Attributes:
        number: its place in the sweep.
        label: what sets it apart from the others.
        spec: its spec as a table.
        hash: of the spec.
        out: the folder of runs.
        device: where to compute.
    """

    number: int
    label: str
    spec: Table
    hash: str
    out: str
    device: str = "auto"

    @property
    def folder(self) -> Path:
        """The run's own."""
        return Path(self.out) / f"{self.spec['name']}-{self.hash}"


@dataclass(frozen=True)
class Started:
    """A worker has taken a run."""

    number: int
    worker: int


@dataclass(frozen=True)
class Step:
    """What a worker is at: so many ticks of so many (None: unknown) are done."""

    number: int
    worker: int
    name: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Ended:
    """A run has ended: made, found finished, or failed; `said` is what came out, or the error, in a line."""

    number: int
    how: Literal["done", "kept", "failed"]
    said: str
    seconds: float


News = Started | Step | Ended
Listener = Callable[[News], None]


def job(number: int, label: str, spec: Spec, out: Path) -> Job:
    """The job that does a spec."""
    return Job(number, label, spec.table(), spec.hash(), str(out))


def work(job: Job, progress: Progress = no_progress) -> Ended:
    """Do a run, or find it done; an error becomes a failure record beside where its record would be."""
    from vitrap.experiment.run import run

    start, measured = time.perf_counter(), False

    def noting(name: str, total: int | None) -> AbstractContextManager[Callable[[], None]]:
        nonlocal measured
        measured = measured or name == "measure" or name.startswith("defend ")
        return progress(name, total)

    try:
        record = run(parse_spec(job.spec), job.out, device=job.device, progress=noting)
    except Exception as error:  # a failed run does not stop the others
        return fail(job, error, time.perf_counter() - start)
    said = f"CDA {100 * record.victim.cda.value:.1f} %, ASR {100 * record.victim.asr.value:.1f} %"
    return Ended(job.number, "done" if measured else "kept", said, time.perf_counter() - start)


def fail(job: Job, error: BaseException, seconds: float) -> Ended:
    """Leave a failure record, where the disk still takes one; the next call tries the run again."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    failure = Failure(
        schema=SCHEMA,
        name=job.spec["name"],
        hash=job.hash,
        seed=job.spec["seed"],
        spec=job.spec,
        error=line,
        traceback=tuple("".join(traceback.format_exception(error)).splitlines()),
        seconds=seconds,
        environment={name: version(name) for name in ("vitrap", "torch", "timm")},
    )
    with suppress(OSError):
        job.folder.mkdir(parents=True, exist_ok=True)
        write_json(job.folder / FAILURE, to_table(failure))
    return Ended(job.number, "failed", line, seconds)


def interleaved(jobs: Sequence[Job], needs: Callable[[Job], object]) -> list[Job]:
    """First a job for each of the things that jobs `need` and share, so that workers make them side by side."""
    first = set({needs(job): job.number for job in reversed(jobs)}.values())
    return sorted(jobs, key=lambda job: (job.number not in first, job.number))


def reporting(run: int, worker: int, send: Callable[[Step], object]) -> Progress:
    """A display of progress that sends it to the driver."""

    @contextmanager
    def show(name: str, total: int | None) -> Iterator[Callable[[], None]]:
        done, last = 0, time.monotonic()
        send(Step(run, worker, name, done, total))

        def tick() -> None:
            nonlocal done, last
            done += 1
            if time.monotonic() - last > OFTEN:
                last = time.monotonic()
                send(Step(run, worker, name, done, total))

        yield tick

    return show
