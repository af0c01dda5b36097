"""`poison`: writes a poisoned data set for other tools: npy arrays, and `poison.json`, which says what they carry."""

import io
import os
from pathlib import Path

import numpy as np

from vitrap.contracts import Fitted, ImageSet, Implant
from vitrap.errors import UserError, some_of
from vitrap.experiment.machine import computing_threads
from vitrap.experiment.plan import Plan, make_plan
from vitrap.experiment.predict import triggered
from vitrap.experiment.progress import Progress, Tick, no_progress
from vitrap.experiment.run import run_folder, threads_of
from vitrap.experiment.spec import Spec
from vitrap.experiment.stages import Stages, backdoor_notice, implant_of, read_fit, read_stream, stored_set
from vitrap.experiment.store import Store
from vitrap.files import check_folder, draft_of, named_errors, whole_folder, write_bytes, write_json
from vitrap.images import CHUNK
from vitrap.printable import printable
from vitrap.tensors.pixels import to_bytes

NOTICE = "poison.json"
"""The file that says what the arrays carry."""


def poison(
    spec: Spec, folder: str | Path, out: str | Path = "runs", *, device: str = "auto", progress: Progress = no_progress
) -> None:
    """Write the poisoned training set of a spec for other tools: exactly the images that `run` trains the victim on.

    Args:
        spec: which attack on which data.
        folder: a new folder for the files.
        out: folder of stages, where runs find the surrogate and the trigger that are made here.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: displays what is being done.

    Raises:
        UserError: something about the spec, the data or a folder is wrong, or the attack has no poisoned set to write,
            which may be known only once it is fitted; no folder has been made.
    """
    with computing_threads(threads_of(run_folder(spec, out))):
        _write_poison(spec, Path(folder), Path(out), device, progress)


def _write_poison(spec: Spec, folder: Path, out: Path, device: str, progress: Progress) -> None:
    """Make a spec's trigger, and write the training set that it poisons."""
    store = Store(out, lambda name: progress(name, None))
    check_new(folder)
    store.check()
    # Open the data, and check all that can be checked before work starts.
    plan = make_plan(spec, device, progress=progress)
    # An attack that edits weights poisons no image, whatever its trigger: it is refused before that is fitted.
    if spec.attack.threat == "weights":
        check_export(spec.attack_name, Implant())
    # Make the trigger, or take it from the store.
    stages = Stages(plan, store, "nothing", progress)
    trigger_folder = stages.trigger(stages.surrogates())
    # Poison with the random stream that a run's victim would be poisoned with.
    fitted = read_fit(plan, trigger_folder)
    implant = implant_of(plan, fitted, read_stream(trigger_folder, spec.seed))
    with progress("poison the training set", None) as tick:
        write_poisoned(plan, fitted, implant, folder, tick)


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
    assert fitted.trigger is not None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as draft:
        check_new(folder)  # another process may have made it meanwhile
        train, test, goal = plan.world.train, plan.world.test, plan.goal
        poisoned = stored_set(implant, train, plan.spec.seed)
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
        about = {**backdoor_notice(plan.spec, "poisoned set"), "threat": plan.spec.attack.threat}
        if plan.world.passed_over:
            about["passed_over"] = some_of(plan.world.passed_over)
        write_json(draft / NOTICE, about)


def _save_images(path: Path, data: ImageSet, tick: Tick) -> None:
    """Write the images at working size as uint8 `n h w c`, a chunk at a time.

    Not through a memory map: where the disk is full, writing to one kills the process.
    """
    shape = (len(data), data.size, data.size, data.channels)
    with named_errors(path), path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for rows in data.row_batches(CHUNK):
            file.write(to_bytes(data.images(rows)).permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
            tick()
