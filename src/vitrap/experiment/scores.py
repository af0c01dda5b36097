"""Writes and reads a screen's score of each single image, in a file beside the record in the run's folder.

With two such files, screens can be combined, and their differences paired image by image, without a forward pass.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from jaxtyping import Bool, Shaped
from torch import Tensor

from vitrap.errors import UserError
from vitrap.experiment.checksums import damage, write_checksums
from vitrap.experiment.defence_rows import Row, ScreenRow, row_settings
from vitrap.tensor_file import read_tensor_file, write_tensor_file

FOLDER = "scores"
KINDS = ("held_out", "clean", "triggered")
PARTS = ("victim", "twin", "index")
SCORES_FILE = re.compile(r"-[0-9a-f]{16}\.safetensors")


@dataclass(frozen=True)
class ByKind:
    """A number for each image, by what kind of image it is.

    Attributes:
        held_out: images held out of the training set for thresholds.
        clean: clean test images.
        triggered: triggered test images, of those that count for the ASR.
    """

    held_out: Shaped[Tensor, " h"]
    clean: Shaped[Tensor, " c"]
    triggered: Shaped[Tensor, " t"]


@dataclass(frozen=True)
class Scores:
    """A screen's score of each image that it was measured on; all tensors are on the CPU.

    Attributes:
        victim: scores (float32) of the screen that was fitted to the victim.
        twin: scores of the screen that was fitted to the clean twin, on the same images.
        index: each image's row (int64) in the data set it comes from: in its training set for `held_out`, in its test
            set for the others.
        hits: which of the triggered images the victim gives the goal's label.
    """

    victim: ByKind
    twin: ByKind
    index: ByKind
    hits: Bool[Tensor, " t"]


def scores_file(name: str, key: str) -> str:
    """The file with the scores of a row of this defence and this key, relative to the run's folder."""
    return f"{FOLDER}/{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-{key}.safetensors"


def write_scores(folder: Path, row: ScreenRow, scores: Scores, carried: Mapping[str, Any]) -> None:
    """Write the file that `row.scores` names into a run's folder, whole or not at all.

    `carried` goes into the file's metadata: what run and backdoor it belongs to.
    """
    parts = {part: getattr(scores, part) for part in PARTS}
    tensors = {f"{part}.{kind}": getattr(numbers, kind) for part, numbers in parts.items() for kind in KINDS}
    about = {
        "defence": row.name,
        "settings": json.dumps(row_settings(row)),
        "vitrap": json.dumps(carried),
    }
    path = folder / row.scores
    path.parent.mkdir(exist_ok=True)
    write_tensor_file(path, {**tensors, "hits": scores.hits}, about)
    write_checksums(path.parent, [file.name for file in path.parent.glob("*.safetensors")])


def read_scores(folder: str | Path, row: Row) -> Scores:
    """Read a screen's score of each image that it was measured on.

    Args:
        folder: the run's folder.
        row: the screen's row of the run's record, one of `record.defences`.

    Raises:
        UserError: the row is not a screen's, is older than these files, or its file is missing or damaged.
    """
    if not isinstance(row, ScreenRow):
        raise UserError(f"defence {row.name!r} is a {row.kind}, and only a screen scores images; give a screen's row")
    if not row.scores:
        raise UserError(f"the row of {row.name!r} was measured before scores were kept; defend the run with it again")
    path = Path(folder) / FOLDER / PurePath(row.scores).name
    try:
        if wrong := damage(path.parent, path.name):
            raise OSError(wrong)
        found = read_tensor_file(path).tensors
        parts = {part: ByKind(*(found[f"{part}.{kind}"] for kind in KINDS)) for part in PARTS}
        return Scores(**parts, hits=found["hits"])
    except (OSError, KeyError, UserError) as error:
        raise UserError(
            f"scores {str(path)!r} are missing or damaged ({error}); remove the file and defend the run with"
            f" {row.name!r} again"
        ) from error


def drop_unnamed(folder: Path, rows: Sequence[Row]) -> None:
    """Remove those files of scores in a run's folder, and drafts of such files, that no row names."""
    named = {PurePath(row.scores).name for row in rows if isinstance(row, ScreenRow)}
    for file in (folder / FOLDER).glob("*"):
        if file.name not in named and SCORES_FILE.search(file.name):
            file.unlink(missing_ok=True)
