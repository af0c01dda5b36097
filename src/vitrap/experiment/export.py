"""Writes a poisoned data set for other tools: npy arrays, and `poison.json`, which says what they carry."""

import tempfile
from pathlib import Path

import numpy as np

from vitrap.contracts import Fitted, ImageSet, Implant
from vitrap.errors import UserError
from vitrap.experiment.make_stages import backdoor_notice
from vitrap.experiment.plan import Plan
from vitrap.experiment.predict import triggered
from vitrap.experiment.progress import Tick
from vitrap.experiment.streams import stream
from vitrap.files import whole_folder, write_json
from vitrap.images import CHUNK
from vitrap.printable import printable
from vitrap.tensors.pixels import to_bytes


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not empty, or that cannot be made.

    Raises:
        UserError: naming the folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} is there already and not an empty folder; give another with -o")
    there = next(above for above in folder.absolute().parents if above.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be made ({error.strerror}); give another with -o") from error


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
        check_folder(folder)  # another process may have made it meanwhile
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
            np.save(draft / f"{name}.npy", values.cpu().numpy(), allow_pickle=False)
        if test.classes:
            names = (" ".join(printable(name).split()) or str(label) for label, name in enumerate(test.classes))
            (draft / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        write_json(
            draft / "poison.json", {**backdoor_notice(plan.spec, "poisoned set"), "threat": plan.spec.attack.threat}
        )


def _save_images(path: Path, data: ImageSet, tick: Tick) -> None:
    """Write the images at working size as uint8 `n h w c`, a chunk at a time."""
    shape = (len(data), data.size, data.size, data.pixels.shape[1])
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    for rows in data.rows(CHUNK):
        out[rows.cpu().numpy()] = to_bytes(data.images(rows)).permute(0, 2, 3, 1).cpu().numpy()
        tick()
    out.flush()
