"""A trigger that is optimised is a stage: kept, read back as it was, and made once."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import vitrap.attacks.megatron as megatron
from tests.experiment.conftest import tiny
from vitrap.errors import UserError
from vitrap.experiment.opened_run import open_run
from vitrap.experiment.run import run, run_folder
from vitrap.experiment.spec import Spec


def spec(*overrides: str) -> Spec:
    clean = ("attack.name=megatron", 'attack.setting="clean-label"', "attack.steps=2", "attack.faint=0.4")
    return tiny(*clean, "attack.poison_rate=0.5", *overrides)


def shapes(out: Path) -> list[Path]:
    return sorted((out / "stages").glob("trigger-*"))


def test_a_run_goes_on_with_the_trigger_that_its_victim_was_trained_with(tmp_path: Path) -> None:
    """The trigger is not optimised again after a kill, which on other threads could end elsewhere."""
    asked = spec()
    first = run(asked, tmp_path, device="cpu")
    (stage,) = shapes(tmp_path)
    (run_folder(asked, tmp_path) / "record.json").unlink()

    def never(*args: object) -> None:
        raise AssertionError("optimised again")

    with patch.object(torch.optim, "Adam", never):
        again = run(asked, tmp_path, device="cpu")
    assert again.victim == first.victim
    assert again.attack == first.attack
    assert again.seconds["fit"] == first.seconds["fit"] == json.loads((stage / "facts.json").read_text())["seconds"]
    assert {"last latent loss", "last diffusion loss", "victim", "clean_model"} <= set(first.attack)
    kept = open_run(run_folder(asked, tmp_path)).trigger
    assert isinstance(kept, megatron.Masked)
    assert 0 <= kept.pattern.min() < kept.pattern.max() <= 1


def test_another_victim_shares_it_and_another_setting_does_not(tmp_path: Path) -> None:
    run(spec("surrogate.depth=1", "surrogate.embed_dim=16", "surrogate.num_heads=2"), tmp_path, device="cpu")
    more = ("surrogate.depth=1", "surrogate.embed_dim=16", "surrogate.num_heads=2", "model.embed_dim=24")
    run(spec(*more), tmp_path, device="cpu")
    assert len(shapes(tmp_path)) == 1
    run(spec(*more, "attack.steps=3"), tmp_path, device="cpu")
    assert len(shapes(tmp_path)) == 2


def test_force_all_makes_it_anew_and_force_leaves_it_to_other_victims(tmp_path: Path) -> None:
    asked = spec()
    run(asked, tmp_path, device="cpu")
    (before,) = shapes(tmp_path)
    inode = before.stat().st_ino
    run(asked, tmp_path, device="cpu", redo="victim")
    assert shapes(tmp_path) == [before]
    assert before.stat().st_ino == inode
    run(asked, tmp_path, device="cpu", redo="all")
    assert shapes(tmp_path) == [before]
    assert before.stat().st_ino != inode


def test_a_picture_counts_by_its_content(tmp_path: Path) -> None:
    from PIL import Image

    path, out = tmp_path / "trigger.png", tmp_path / "runs"
    asked = tiny("attack.name=megatron", f'attack.picture="{path}"')
    Image.new("RGB", (4, 4), (255, 0, 0)).save(path)
    red = run(asked, out, device="cpu")
    assert run(asked, out, device="cpu") == red
    Image.new("RGB", (4, 4), (0, 255, 0)).save(path)
    green = run(asked, out, device="cpu")
    assert green.stages["victim"] != red.stages["victim"]
    path.unlink()
    with pytest.raises(UserError, match="trigger.png' is no file; give one"):
        run(asked, out, device="cpu")


def test_a_training_attack_leaves_its_terms_and_what_it_found(tmp_path: Path) -> None:
    record = run(tiny("attack.name=megatron", "recipe.flip=true"), tmp_path, device="cpu")
    assert set(record.curves["victim"]) == {"cross_entropy", "latent", "diffusion", "cda", "asr"}
    assert set(record.curves["twin"]) == {"cross_entropy", "cda"}
    assert record.attack["victim"]["tokens"] == 4
    assert record.attack["n_examined"] > 0
    learned = run(tiny("attack.name=megatron", "attack.combine=learned"), tmp_path, device="cpu")
    for name in ("latent", "diffusion"):
        (weight,) = learned.curves["victim"][f"weight of {name}"]
        assert weight != 1, "it was not learned"
