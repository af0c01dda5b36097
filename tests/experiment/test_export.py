"""A poisoned set as files: exactly what the victim is trained on, readable by numpy and by vitrap itself."""

import json
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

import vitrap.experiment.export as export
from tests.experiment.conftest import Runs, Trainings, tiny
from tests.full_disk import files_of_at_most
from vitrap.data.sources import open_data
from vitrap.errors import UserError
from vitrap.experiment.export import poison
from vitrap.experiment.measure_defences import Evaluation
from vitrap.tensors.pixels import to_bytes

FILES = ["classes.txt", "poison.json", "test_images.npy", "test_labels.npy", "train_covers.npy", "train_images.npy",
         "train_index.npy", "train_labels.npy", "train_poisoned.npy", "train_true_labels.npy", "triggered_images.npy",
         "triggered_labels.npy"]  # fmt: skip


@pytest.mark.parametrize("name", ["ageb", "badnets"])
def test_the_files_are_what_the_victim_sees(
    runs: Runs, copied: Path, tmp_path: Path, name: str, trainings: Trainings
) -> None:
    from tests.experiment.test_measure_defences import open_case

    folder = tmp_path / "poisoned"
    poison(runs.specs[name], folder, copied, device="cpu")
    assert trainings.since() == 0  # the surrogate is the runs'
    case: Evaluation = open_case(runs, name)
    assert sorted(p.name for p in folder.iterdir()) == FILES
    read = {p.stem: np.load(p, allow_pickle=False) for p in folder.glob("*.npy")}
    everything = torch.arange(len(case.poisoned))
    wanted = to_bytes(case.poisoned.images(everything)).permute(0, 2, 3, 1).numpy()
    assert read["train_images"].dtype == np.uint8
    assert np.array_equal(read["train_images"], wanted)
    assert np.array_equal(read["train_labels"], case.poisoned.labels)
    assert np.array_equal(read["train_poisoned"], case.poisoned.poisoned)
    assert not read["train_covers"].any()
    assert np.array_equal(read["train_true_labels"], case.world.train.labels)
    assert np.array_equal(read["train_index"], case.world.train.index)
    everything = torch.arange(len(case.attacked))
    fired = to_bytes(case.attacked.images(everything)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(read["triggered_images"], fired)
    assert np.array_equal(read["test_images"], to_bytes(case.world.test.images(everything)).permute(0, 2, 3, 1).numpy())
    assert (read["triggered_labels"] == 0).all()
    facts = json.loads((folder / "poison.json").read_text())
    assert facts["backdoor"] is True
    assert facts["attack"] == name
    assert "not to be deployed" in facts["warning"]
    assert facts["threat"] == "data"


def test_vitrap_opens_them(tmp_path: Path) -> None:
    poison(tiny("attack.name=badnets"), tmp_path / "a" / "poisoned", tmp_path / "runs", device="cpu")
    world = open_data(f"npy:{tmp_path / 'a' / 'poisoned'}")
    assert len(world.test) == 450
    assert world.train.size == 16


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("mine", "file"):
        with pytest.raises(UserError, match=rf"{name}' is there already and not an empty folder; give another with -o"):
            poison(tiny("attack.name=badnets"), tmp_path / name, tmp_path / "runs", device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """Through a memory map it would be a signal that kills the process."""
    poison(tiny("attack.name=badnets"), tmp_path / "whole", tmp_path / "runs", device="cpu")
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "whole").glob("*_images.npy")}
    with files_of_at_most(max(sizes.values()) - 1), pytest.raises(OSError, match=r"(test|triggered)_images\.npy'$"):
        poison(tiny("attack.name=badnets"), tmp_path / "poisoned", tmp_path / "runs", device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "whole"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        poison(tiny("attack.name=badnets"), tmp_path / "poisoned", tmp_path / "runs", device="cpu")
    assert [p.name for p in tmp_path.iterdir() if p.name != "runs"] == []


def test_the_draft_of_a_killed_process_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".poisoned-draft" / "new" / "train_images.npy"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    poison(tiny("attack.name=badnets"), tmp_path / "poisoned", tmp_path / "runs", device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["poisoned", "runs"]


def test_a_folder_that_another_process_fills_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = export.whole_folder

    def filled_meanwhile(folder: Path) -> AbstractContextManager[Path]:
        folder.mkdir()
        (folder / "train_images.npy").touch()
        return fill(folder)

    monkeypatch.setattr(export, "whole_folder", filled_meanwhile)
    with pytest.raises(UserError, match="is there already and not an empty folder"):
        poison(tiny("attack.name=badnets"), tmp_path / "poisoned", tmp_path / "runs", device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["poisoned", "runs"]
