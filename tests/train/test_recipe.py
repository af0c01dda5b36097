"""The recipe: its defaults by data set, and what it refuses."""

from dataclasses import fields, replace

import pytest

from vitrap.errors import UserError
from vitrap.params import Param
from vitrap.train.recipe import RECIPES, Recipe, recipe_for


@pytest.mark.parametrize("name", RECIPES)
def test_a_data_set_has_its_recipe_and_its_parts_share_it(name: str) -> None:
    assert recipe_for(name) is RECIPES[name]
    assert recipe_for(f"{name}-part") is RECIPES[name]


def test_a_hundred_classes_are_not_ten() -> None:
    assert recipe_for("cifar100-12k") is RECIPES["cifar100"]


@pytest.mark.parametrize("name", ["npy:cifar10", "imagefolder:signs", "mine"])
def test_any_other_set_starts_from_the_plain_recipe(name: str) -> None:
    assert recipe_for(name) == Recipe()


@pytest.mark.parametrize("name", ["digits", "gtsrb"])
def test_digits_and_signs_are_never_mirrored(name: str) -> None:
    assert not RECIPES[name].flip


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("epochs", 0, ">= 1"),
        ("batch_size", 0, ">= 1"),
        ("lr", 0.0, "> 0"),
        ("lr", -1.0, "> 0"),
        ("weight_decay", -0.1, ">= 0"),
        ("warmup", 1.5, "in [0, 1]"),
        ("label_smoothing", -0.1, "in [0, 1]"),
        ("clip", -1.0, ">= 0"),
        ("crop", -1, "in [0, 256]"),
    ],
)
def test_a_value_out_of_range_is_named(key: str, value: object, allowed: str) -> None:
    with pytest.raises(UserError) as refusal:
        replace(Recipe(), **{key: value})
    assert str(refusal.value) == f"{key} = {value!r} is out of range: it must be {allowed}"


def test_every_field_says_what_it_is() -> None:
    for f in fields(Recipe):
        assert isinstance(f.metadata["param"], Param)
        assert f.metadata["param"].doc
