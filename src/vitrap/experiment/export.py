"""Writes a poisoned data set for other tools: npy arrays, and `poison.json`, which says what they carry."""

import io
import os
from pathlib import Path

import numpy as np

from vitrap.contracts import Fitted, ImageSet, Implant
from vitrap.errors import UserError
from vitrap.experiment.plan import Plan
from vitrap.experiment.predict import triggered
from vitrap.experiment.progress import Tick
from vitrap.experiment.stages import backdoor_notice
from vitrap.experiment.streams import stream
from vitrap.files import check_folder, draft_of, named_errors, whole_folder, write_bytes, write_json
from vitrap.images import CHUNK
from vitrap.printable import printable
from vitrap.tensors.pixels import to_bytes


def check_new(folder: Path) -> None:
    """Refuse a folder that is not empty, or that cannot be made.

    Raises:
        UserError: naming the folder.
    """
    if os.path.exists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} is there already and not an empty folder; give another with -o")
    for place in (folder.parent, folder, draft_of(folder)):
        check_folder(place, f"folder {str(folder)!r}", "give another with -o")


def check_export(attack: str, implant: Implant) -> None:
    """Refuse an attack whose poisoned set would not be all that its victim is trained on.

    Raises:
        UserError: nothing that is stored is poisoned, or the trigger is known only after training.
    """
    after = implant.edit is not None or (implant.objective is not None and implant.objective.along)
    if implant.poison is None or after:
        why = "poisons no stored image" if implant.poison is None else "knows its trigger only after training"
        raise UserError(f"attack {attack} {why}, so there is no poisoned set to write; use vitrap run instead")


def write_poisoned(plan: Plan, fitted: Fitted, implant: Implant, folder: Path, tick: Tick) -> None:
    """Write the training set that the plan's victim is trained on, and the test set, into a new folder.

    The folder appears when it is complete. `train_*` and `test_*` are in the format of vitrap's data cache, so that
    `npy:FOLDER` opens them; docs/record.md lists the rest.

    Raises:
        UserError: the folder is not empty, or the attack has no poisoned set to write.
    """
    check_export(plan.spec.attack_name, implant)
    assert implant.poison is not None
    assert fitted.trigger is not None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as draft:
        check_new(folder)  # another process may have made it meanwhile
        train, test, goal = plan.world.train, plan.world.test, plan.goal
        poisoned = implant.poison(train, stream(plan.spec.seed, "poison"))
        _save_images(draft / "train_images.npy", poisoned, tick)
        _save_images(draft / "test_images.npy", test, tick)
        _save_images(draft / "triggered_images.npy", triggered(test, fitted.trigger, tick), tick)
        numbers = {
            "train_labels": poisoned.labels,
            "train_poisoned": poisoned.poisoned,
            "train_covers": poisoned.covers,
            "train_true_labels": train.labels,
            "train_index": train.index,
            "test_labels": test.labels,
            "triggered_labels": goal.labels(test.labels),
        }
        for name, values in numbers.items():
            content = io.BytesIO()
            np.save(content, values.cpu().numpy(), allow_pickle=False)
            write_bytes(draft / f"{name}.npy", content.getvalue())
        if test.classes:
            names = (" ".join(printable(name).split()) or str(label) for label, name in enumerate(test.classes))
            write_bytes(draft / "classes.txt", ("\n".join(names) + "\n").encode())
        write_json(
            draft / "poison.json", {**backdoor_notice(plan.spec, "poisoned set"), "threat": plan.spec.attack.threat}
        )


def _save_images(path: Path, data: ImageSet, tick: Tick) -> None:
    """Write the images at working size as uint8 `n h w c`, a chunk at a time.

    Not through a memory map: where the disk is full, writing to one kills the process.
    """
    shape = (len(data), data.size, data.size, data.pixels.shape[1])
    with named_errors(path), path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for rows in data.rows(CHUNK):
            file.write(to_bytes(data.images(rows)).permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
            tick()
