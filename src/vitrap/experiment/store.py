"""Where results are kept: stages that many runs share, and one folder a run, each written whole or not at all.

A stage is a folder named by the hash of all it depends on. It is made as a draft under another name and renamed into
place, so a process killed at any moment leaves no half stage. The next call makes it anew, or goes on with the training
whose state the draft holds.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vitrap.errors import UserError
from vitrap.experiment.checksums import damage, write_checksums
from vitrap.files import check_folder, put_in_place, read_json, write_json

STALE = 7 * 24 * 3600
"""Seconds after which a draft counts as left behind, unless it is being worked on."""
DEPENDS = "depends.json"
"""In a stage: all that it depends on."""
STATE = "training.safetensors"
"""In a draft: the state of the training under way, from which the next call goes on."""
LOCKS = "locks"
OFTEN = 0.2
"""Seconds after which a process that waits for a lock asks again."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """Names a result that is stored.

    Attributes:
        kind: "clean" (a surrogate or a twin), "trigger", "victim", "retrained" (after a filter) or "defended" (what a
            defence makes of a twin).
        depends: everything that decides its content, as JSON can write it.
    """

    kind: str
    depends: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The stage's key; its folder is named after kind and key."""
        return key_of(self.depends)


def key_of(depends: Mapping[str, Any]) -> str:
    """Sixteen hex digits that change whenever anything does that a result depends on."""
    text = json.dumps(depends, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Store:
    """The folder that runs and stages live in.

    Attributes:
        root: the folder.
        waiting: shows, by a name for it, that another process is being waited for.
    """

    root: Path
    waiting: Callable[[str], AbstractContextManager[Any]] = nullcontext

    def check(self, run: str = "", remedy: str = "choose another with --out") -> None:
        """Refuse a folder that cannot be written, before any work is done; nothing is made yet.

        Drafts that killed processes have left among the stages are removed.

        Args:
            run: name of the folder below it that a run is to be written into.
            remedy: what to do about it.

        Raises:
            UserError: naming the folder and why.
        """
        for folder in (self.root, self.root / LOCKS, self.root / "stages", self.root / run):
            check_folder(folder, f"output folder {str(folder)!r}", remedy)
        self._remove_old_drafts()

    def _remove_old_drafts(self) -> None:
        """Remove drafts that killed processes left, unless one has the state of a training of the last week."""
        for draft in (self.root / "stages").glob(".*"):
            with suppress(OSError):  # a living process holds the stage's lock, or another has swept the draft
                kept = (draft / STATE).exists() and time.time() - draft.stat().st_mtime < STALE
                if not kept:
                    stage = "-".join(draft.name.removeprefix(".").split("-")[:2])
                    with _lock(self.root, stage).acquire(blocking=False):
                        shutil.rmtree(draft)

    def find_or_make(self, stage: Stage, make: Callable[[Path], None], force: bool = False) -> Path:
        """The folder of a stage, made by `make(folder)` unless it is there already (or `force`).

        One that is there but damaged is made anew, and the log says so. Of several processes that need it, one makes
        it and the others wait. What `make` finds in its folder is the state of a training that an earlier process
        began, or nothing.
        """
        place = self.root / "stages" / f"{stage.kind}-{stage.key}"
        if not force and self.find(stage.kind, stage.key):
            return place
        with self.alone(place.name, f"wait for another's {stage.kind}"):
            if not force and self.find(stage.kind, stage.key):
                return place
            if place.exists() and not force:
                log.warning("vitrap: stage %r is damaged (%s); it is made anew", str(place), stage_damage(place))
            draft = place.with_name(f".{place.name}-draft")
            _clear(draft, whole=force)
            draft.mkdir(parents=True, exist_ok=True)
            os.utime(draft)  # so that `_remove_old_drafts` does not take it for abandoned
            try:
                make(draft)
                write_json(draft / DEPENDS, stage.depends)
                (draft / STATE).unlink(missing_ok=True)
                write_checksums(draft, os.listdir(draft))
                put_in_place(draft, place, replace=place.exists())
            except UserError:  # it would come again
                _clear(draft, whole=True)
                raise
            finally:
                _clear(draft)
        return place

    def find(self, kind: str, key: str) -> Path | None:
        """The folder of the stage of this kind and key; None where it is missing or damaged."""
        place = self.root / "stages" / f"{kind}-{key}"
        return place if place.exists() and not stage_damage(place) else None

    @contextmanager
    def alone(self, name: str, waiting: str) -> Iterator[None]:
        """Within the block no other process is in a block of that name; whoever must wait says so."""
        with locked(self.root, name, lambda: self.waiting(waiting)):
            yield


@contextmanager
def locked(out: Path, name: str, waiting: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Iterator[None]:
    """Within the block no other process is in a block of the same name for the same folder of runs.

    A killed process holds no lock: the system's own lock on a file counts, not whether the file is there. The files in
    the folder `locks` are never deleted: one process could lock the deleted file while another locks a new one.
    Processes of several machines see each other's locks where the file system has POSIX locks over them, as NFS does.
    """
    lock = _lock(out, name)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        with waiting():
            lock.acquire(poll_interval=OFTEN)
    try:
        yield
    finally:
        lock.release()


def _lock(out: Path, name: str) -> FileLock:
    """The lock of a name for a folder of runs, not yet acquired."""
    folder = out / LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")


def stage_damage(place: Path) -> str:
    """What is wrong with the folder of a stage; "" if nothing is."""
    try:
        key = key_of(read_json(place / DEPENDS))
    except (OSError, ValueError, RecursionError):
        return f"{DEPENDS} is missing or damaged"
    return damage(place) if place.name.endswith(key) else "it is another stage"


def _clear(draft: Path, whole: bool = False) -> None:
    """Remove a draft: all of it, or what is not the state of a training."""
    if whole or not (draft / STATE).exists():
        shutil.rmtree(draft, ignore_errors=True)
        return
    for file in draft.iterdir():
        if file.name != STATE:
            file.unlink()
