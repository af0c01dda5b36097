"""Jitter as the recipe asks for it."""

from dataclasses import replace

import pytest
import torch

from vitrap.contracts import ImageSet
from vitrap.data.augment import random_crop, random_flip, random_jitter
from vitrap.errors import UserError
from vitrap.train.loop import augment
from vitrap.train.recipe import RECIPES, Recipe


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_strength_out_of_range_is_named(value: float) -> None:
    with pytest.raises(UserError) as refusal:
        Recipe(jitter=value)
    assert str(refusal.value) == f"jitter = {value!r} is out of range: it must be in [0, 1]"


def test_no_recipe_jitters_unasked() -> None:
    assert {recipe.jitter for recipe in (Recipe(), *RECIPES.values())} == {0}


def test_jitter_comes_after_crop_and_flip_and_leaves_the_rest_alone() -> None:
    pixels = torch.randint(256, (20, 3, 8, 8), generator=generator()).to(torch.uint8)
    batch = ImageSet.of(pixels, torch.arange(20) % 4).batch(torch.arange(20))
    recipe, chances = replace(Recipe(), crop=2, flip=True, jitter=0.5), generator()
    expected = random_jitter(random_flip(random_crop(batch.images, 2, chances), chances), 0.5, chances)
    changed = augment(batch, recipe, generator())
    assert torch.equal(changed.images, expected)
    assert changed.labels is batch.labels
    assert changed.poison_at is batch.poison_at
