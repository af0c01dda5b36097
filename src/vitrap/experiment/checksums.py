"""Checksums of the files of a stage or a run, by which a damaged or exchanged file is noticed when it is used.

They lie beside the files, as `sha256sum` writes and checks them. Folders made before there were any are taken as they
are.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from vitrap.errors import UserError
from vitrap.files import open_file, write_bytes

CHECKSUMS = "SHA256SUMS"
MODEL = "model.safetensors"
"""File with the weights of a run's victim, or of a stage's model."""
ALWAYS = (MODEL, "trigger.safetensors")
"""Files that every run has."""


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write the checksums of these files of a folder, in place of earlier ones."""
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in sorted(names)]
    write_bytes(folder / CHECKSUMS, "".join(lines).encode())


def damage(folder: Path, *names: str) -> str:
    """What is wrong with the files of a folder, or with these, such as "model.safetensors is missing".

    Returns:
        "" if all are as written, or if there are no checksums of them.
    """
    sums = folder / CHECKSUMS
    if not sums.exists():
        return ""
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.is_file() else []
    wrong = [] if lines else [f"{CHECKSUMS} is damaged"]
    for line in lines:
        checksum, _, name = line.partition("  ")
        file = folder / Path(name).name
        if names and file.name not in names:
            continue
        if not file.is_file():
            wrong.append(f"{file.name} is missing")
        elif _sha256(file) != checksum:
            wrong.append(f"{file.name} is damaged")
    return ", ".join(wrong)


def run_damage(folder: Path) -> str:
    """What is wrong with the files of a run's folder, beside its record; "" if nothing is."""
    return damage(folder) or ", ".join(f"{name} is missing" for name in ALWAYS if not (folder / name).is_file())


def check_run(folder: Path) -> None:
    """Refuse a run some of whose files are missing or damaged.

    Raises:
        UserError: naming them.
    """
    if wrong := run_damage(folder):
        raise UserError(
            f"run {str(folder)!r} is damaged ({wrong}); vitrap run with its spec and --out {str(folder.parent)!r}"
            " makes it anew"
        )


def _sha256(file: Path) -> str:
    """The SHA-256 of a file's content, as 64 hex digits."""
    with open_file(file) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
