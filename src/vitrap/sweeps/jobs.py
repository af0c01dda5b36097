"""One run of a sweep as a worker does it, on this machine or another, and the events that tell the driver about it."""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from vitrap.experiment.progress import DEFEND, MEASURE, Progress, no_progress
from vitrap.experiment.record import SCHEMA, Failure, to_table
from vitrap.experiment.records import FAILURE
from vitrap.experiment.spec import Spec, parse_spec
from vitrap.files import write_json
from vitrap.formats import Table

OFTEN = 0.25
"""Least seconds between two reports of a worker on the same step."""
TRIES = 3
"""A run counts as failed when its worker has been killed so many times."""


@dataclass(frozen=True)
class Job:
    """A run to do, as it is sent to a worker.

    Attributes:
        number: its place in the sweep.
        spec: its spec as a table, with the folders that its paths are relative to.
        hash: the spec's hash.
        out: the folder of runs.
        device: where to compute.
    """

    number: int
    spec: Table
    hash: str
    out: str
    device: str

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out) / f"{self.spec['name']}-{self.hash}"


@dataclass(frozen=True)
class Started:
    """A worker has begun a run."""

    number: int
    worker: int


@dataclass(frozen=True)
class StepProgress:
    """A worker has come so far in a step of its run: `done` of `total` ticks (None: unknown)."""

    number: int
    worker: int
    name: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Ended:
    """A run has ended.

    Attributes:
        number: the run's place in the sweep.
        how: "done", "kept" (its record still holds, and nothing was measured) or "failed".
        said: its result, or its error, in a line.
        seconds: how long it took.
    """

    number: int
    how: Literal["done", "kept", "failed"]
    said: str
    seconds: float


Event = Started | StepProgress | Ended
Listener = Callable[[Event], None]


def job(number: int, spec: Spec, out: Path, device: str) -> Job:
    """The job of a spec."""
    return Job(number, spec.located_table(), spec.hash(), str(out), device)


def work(job: Job, progress: Progress = no_progress) -> Ended:
    """Do a run; an error becomes a failure record in the run's folder."""
    from vitrap.experiment.run import run

    start = time.perf_counter()
    measured = False

    def noting(name: str, total: int | None) -> AbstractContextManager[Callable[[], None]]:
        """Note whether a step measures anything: if none does, the record was there already."""
        nonlocal measured
        measured = measured or name == MEASURE or name.startswith(DEFEND)
        return progress(name, total)

    try:
        record = run(parse_spec(job.spec), job.out, device=job.device, progress=noting)
    except Exception as error:  # whatever it is, a failed run does not stop the others
        return fail(job, error, time.perf_counter() - start)
    said = f"CDA {100 * record.victim.cda.value:.1f} %, ASR {100 * record.victim.asr.value:.1f} %"
    return Ended(job.number, "done" if measured else "kept", said, time.perf_counter() - start)


def fail(job: Job, error: BaseException, seconds: float) -> Ended:
    """Write a failure record, if the disk still takes one; the next call of the sweep tries the run again."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    failure = Failure(
        schema=SCHEMA,
        name=job.spec["name"],
        hash=job.hash,
        seed=job.spec["seed"],
        spec=parse_spec(job.spec).table(),
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
    """Sort jobs so that one job for each distinct `needs(job)` comes first, then all others.

    Jobs with the same need share a stage, such as the twin. So workers make different stages side by side, and do not
    wait for each other to make the same one.
    """
    first = set({needs(job): job.number for job in reversed(jobs)}.values())
    return sorted(jobs, key=lambda job: (job.number not in first, job.number))


def reporting(run: int, worker: int, send: Callable[[StepProgress], object]) -> Progress:
    """A display of progress that sends it to the driver."""

    @contextmanager
    def show(name: str, total: int | None) -> Iterator[Callable[[], None]]:
        done = 0
        last = time.monotonic()
        send(StepProgress(run, worker, name, done, total))

        def tick() -> None:
            nonlocal done, last
            done += 1
            if time.monotonic() - last > OFTEN:
                last = time.monotonic()
                send(StepProgress(run, worker, name, done, total))

        yield tick

    return show
