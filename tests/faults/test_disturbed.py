"""Every command that writes, killed and out of disk at its operations on files: nothing half, nothing lost, no noise.

A kill comes before an operation (`kill`) or within a write (`torn`). A disk is full from an operation on (`full`), for
files beyond a size (`small`, which reaches libraries' own writes), or as a file system of so many pages (`pages`).
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.faults.commands import COMMANDS, Command, Words, lay_out
from tests.faults.conftest import Tally, sample
from tests.faults.folders import Content, look, wrong_between
from tests.forks import Ended, Fault, Forks

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs fork and the folders of Linux")
KINDS = {"kill": 2, "torn": 1, "full": 1, "small": 1, "pages": 1}
"""Kinds of faults, and how many of each are tried of a command in a sample."""
PAGE = 4096


@dataclass(frozen=True)
class Undisturbed:
    """A command that nobody disturbed: its folder before it, what was there before and after, and how it ended."""

    folder: Path
    before: Content
    after: Content
    ended: Ended
    sizes: tuple[int, ...]


def call(forks: Forks, folder: Path, words: Words, fault: Fault = None) -> Ended:
    """`vitrap WORDS` in a folder; a word with a star is the file that it matches."""
    found = [str(next(folder.glob(word)).relative_to(folder)) if "*" in word else word for word in words]
    return forks.call(folder, found, fault, at=folder, VITRAP_DATA=str(folder / "data"), COLUMNS="250")


@pytest.fixture(scope="session")
def undisturbed(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Undisturbed]:
    @cache
    def reach(calls: tuple[Words, ...]) -> Path:
        """A folder in which these calls were made."""
        folder = tmp_path_factory.mktemp("before") / "work"
        if not calls:
            folder.mkdir()
            lay_out(folder)
            return folder
        shutil.copytree(reach(calls[:-1]), folder)
        ended = call(forks, folder, calls[-1])
        assert ended.code == 0, ended.said
        return folder

    @cache
    def undisturbed(name: str) -> Undisturbed:
        command = COMMANDS[name]
        folder = tmp_path_factory.mktemp("undisturbed")
        shutil.copytree(reach(command.before), folder / "before")
        command.change(folder / "before")
        shutil.copytree(folder / "before", folder / "after")
        ended = call(forks, folder / "after", command.words)
        assert ended.code == 0, ended.said
        before, after = look(folder / "before"), look(folder / "after")
        assert not before.half
        assert not after.half
        written = [name for name, content in after.whole.items() if before.whole.get(name) != content]
        sizes = {(folder / "after" / name).stat().st_size for name in written}
        return Undisturbed(folder / "before", before, after, ended, tuple(sorted(sizes)))

    return undisturbed


def numbers(kind: str, whole: Undisturbed) -> list[int]:
    """All numbers of a kind of fault that a command meets."""
    if kind in ("kill", "full"):
        return list(range(1, len(whole.ended.operations) + 1))
    if kind == "pages":
        return list(range(1 + sum(-(-size // PAGE) for size in whole.sizes)))
    return sorted({most for size in whole.sizes for most in (0, size // 2, size - 1)})


@contextmanager
def disk(folder: Path, before: Path, pages: int | None) -> Iterator[Path]:
    """A copy of a folder: on a disk of its own with so many free pages, or anywhere."""
    place = folder / "work"
    if pages is None:
        shutil.copytree(before, place)
        yield place
        shutil.rmtree(place)
        return
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    try:
        shutil.copytree(before, place, dirs_exist_ok=True)
        used = os.statvfs(place)
        resize(place, used.f_blocks - used.f_bfree + pages)
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
        place.rmdir()


def resize(place: Path, pages: int | None = None) -> None:
    """Give a disk so many pages, or plenty."""
    size = f"size={1 << 30 if pages is None else pages * PAGE}"
    subprocess.run(["mount", "-o", f"remount,{size}", place], check=True)


@pytest.fixture(scope="session")
def can_mount(tmp_path_factory: pytest.TempPathFactory) -> bool:
    place = tmp_path_factory.mktemp("disk")
    made = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True)
    if not made or made.returncode:
        return False
    subprocess.run(["umount", place], check=True)
    return True


def wrong_at_its_end(kind: str, ended: Ended, command: Command) -> Iterator[str]:
    """What is wrong with how a disturbed call ended."""
    lines = ended.err.splitlines()
    if kind in ("kill", "torn"):
        killed = -signal.SIGKILL if kind == "kill" else -signal.SIGXFSZ
        if ended.code not in (killed, 0, *((1,) if command.several else ())):
            yield f"ends with {ended.code}: {lines[-1:]}"
    elif ended.code:
        if ended.code not in ((1, 2) if command.several else (2,)):
            yield f"ends with {ended.code}, {len(lines)} lines: {lines[-1:]}"
        if "Traceback" in ended.said:
            yield f"a traceback of {len(lines)} lines: {lines[-1:]}"
        if not command.several and (len(lines) != 1 or not lines[0].startswith("vitrap: ")):
            yield f"not one line on stderr but {len(lines)}: {lines[-1:]}"


def wrong_with(
    forks: Forks, command: Command, whole: Undisturbed, place: Path, fault: tuple[str, int]
) -> Iterator[str]:
    """What is wrong with a disturbed call, with what it leaves, and with the call after it."""
    kind = fault[0]
    ended = call(forks, place, command.words, None if kind == "pages" else fault)
    yield from wrong_at_its_end(kind, ended, command)
    now = look(place)
    yield from wrong_between(whole.before, now, whole.after, command.redone)
    if kind not in ("kill", "torn"):
        if drafts := now.drafts - whole.before.drafts:
            yield f"drafts stay: {sorted(drafts)}"
        if ended.code == 0 and now.whole != whole.after.whole:
            yield "it says that it is done, and is not"
    if now.whole == whole.after.whole:  # nothing is left to be done; `poison` would refuse a second call
        return
    if kind == "pages":
        resize(place)
    ended = call(forks, place, command.again or command.words)
    if ended.code:
        yield f"the next call ends with {ended.code}: {ended.err.splitlines()[-1:]}"
        return
    then = look(place)
    names = then.whole.keys() | whole.after.whole.keys()
    if other := [name for name in names if then.whole.get(name) != whole.after.whole.get(name)]:
        yield f"the next call comes to something else: {sorted(other)}"
    if drafts := then.drafts - whole.before.drafts:
        yield f"drafts stay after the next call: {sorted(drafts)}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_half_nothing_lost_no_noise(  # noqa: PLR0913
    name: str,
    kind: str,
    forks: Forks,
    undisturbed: Callable[[str], Undisturbed],
    can_mount: bool,
    tmp_path: Path,
    tally: Tally,
) -> None:
    if kind == "pages" and not can_mount:
        pytest.skip("this user mounts no file system")
    command, whole = COMMANDS[name], undisturbed(name)
    turn = list(COMMANDS).index(name)
    wrong: dict[str, list[str]] = {}
    tried = sample(numbers(kind, whole), KINDS[kind], turn)
    for number in tried:
        with disk(tmp_path, whole.folder, number if kind == "pages" else None) as place:
            if found := list(wrong_with(forks, command, whole, place, (kind, number))):
                operation = whole.ended.operations[number - 1] if kind in ("kill", "full") else ""
                wrong[f"{kind} {number} {operation}".strip()] = found
    tally("kills" if kind in ("kill", "torn") else "full disks", len(tried), len(wrong))
    if wrong:
        pytest.fail("\n".join(f"{fault}: {'; '.join(found)}" for fault, found in wrong.items()), pytrace=False)
