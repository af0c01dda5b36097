"""What a plan refuses of the data's classes, before anything is computed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.experiment.conftest import TINY
from vitrap.data.cache import Arrays, write_folder
from vitrap.data.sources import hold_out, open_data
from vitrap.errors import UserError
from vitrap.experiment.plan import make_plan
from vitrap.experiment.spec import load_spec

LABELS = np.arange(90) % 3
HELD = hold_out(90, None, 0.2, torch.Generator().manual_seed(0))[0][0]
"""An image that is held out."""
ALL_TO_ALL = "attack.goal=all-to-all"
FROM_1_TO_0 = ("attack.goal=source-to-target", "attack.source=1", "attack.target=0")


def held_out_class(label: int) -> np.ndarray:
    """Labels of which one class is held out as a whole, since it has a single image."""
    labels = np.where(label == LABELS, (LABELS + 1) % 3, LABELS)
    labels[HELD] = label
    return labels


def plan(folder: Path, train: np.ndarray, test: np.ndarray, names: int, *overrides: str) -> None:
    images = np.zeros((90, 16, 16, 3), np.uint8)
    classes = tuple(f"class {i}" for i in range(names))
    write_folder(folder, Arrays(images, train, images, test, classes=classes))
    data = (f'data.name="npy:{folder}"', "data.limit=60", "data.holdout=0.2", "attack.name=badnets")
    make_plan(load_spec(None, [*TINY, *data, *overrides]), "cpu")


@pytest.mark.parametrize(
    ("train", "test", "names", "overrides", "message"),
    [
        (LABELS, LABELS * 0, 0, (), "no image that .* is measured on counts for the goal .* another attack.target"),
        (LABELS, LABELS * 0 + 2, 0, FROM_1_TO_0, "no image that .* is measured on counts .* or attack.source"),
        (LABELS, LABELS, 4, ("attack.target=3",), "no training image of class 3, the attack's target; choose another"),
        (LABELS, LABELS, 4, (ALL_TO_ALL,), "no training image of class 3, the attack's target"),
        (held_out_class(2), LABELS % 2, 0, ("attack.target=2",), "class 2, the attack's target; .* data.holdout = 0.2"),
        (held_out_class(2), LABELS, 0, (), "class 2, which it is measured on; .* lower data.holdout = 0.2"),
        (held_out_class(1), LABELS, 0, FROM_1_TO_0, "class 1, which it is measured on"),
    ],
)
def test_classes_that_the_attack_cannot_be_measured_on(
    tmp_path: Path, train: np.ndarray, test: np.ndarray, names: int, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(tmp_path / "data", train, test, names, *overrides)


@pytest.mark.parametrize("overrides", [(), ("attack.target=2",), (ALL_TO_ALL,), FROM_1_TO_0])
def test_classes_that_have_images_are_taken(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    plan(tmp_path / "data", LABELS, LABELS, 0, *overrides)


def test_a_class_without_any_image_is_taken_where_nothing_wants_it(tmp_path: Path) -> None:
    plan(tmp_path / "data", LABELS, LABELS, 4)
    plan(tmp_path / "data", held_out_class(2), LABELS % 2, 0)


# ---- data from outside


@pytest.mark.parametrize("part", ["test", "choose", "clean", "threshold"])
@pytest.mark.parametrize(
    "change", [{"size": 8}, {"n_classes": 11}, {"pixels": "grey"}], ids=["size", "classes", "grey"]
)
def test_parts_of_a_world_are_alike(part: str, change: dict[str, Any]) -> None:
    world = open_data("digits")
    images = getattr(world, part)
    changed = {"pixels": images.pixels[:, :1]} if "pixels" in change else change
    other = replace(world, **{part: replace(images, **changed)})
    with pytest.raises(UserError, match=rf"world.{part} has .*, and world.train .*; make them alike"):
        make_plan(load_spec(None, TINY), "cpu", world=other)
