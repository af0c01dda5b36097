"""Weights that are NaN, infinite or all zero are refused at every door, before anything is trained or written."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.experiment.conftest import TINY, Runs, tiny
from vitrap.attacks.ageb import Ageb, Erosion
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.experiment.export import poison
from vitrap.experiment.opened_run import open_run
from vitrap.experiment.plan import make_plan
from vitrap.experiment.predict import predict
from vitrap.experiment.run import run
from vitrap.experiment.trigger_file import read_trigger, save_trigger
from vitrap.models.classifier import Architecture, Classifier, open_model, read_model
from vitrap.train.arithmetic import Arithmetic

ARCHITECTURE = Architecture(
    "vit_tiny_patch16_224", 16, 10, {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
)
AGEB = Ageb()
FAULTS: dict[str, tuple[str, float, str]] = {
    "NaN in the head": (r"head\.weight", math.nan, r"head\.weight holds NaN"),
    "NaN in the position embeddings": (r"pos_embed", math.nan, r"pos_embed holds NaN"),
    "infinite": (r"blocks\.0\.norm1\.bias", math.inf, r"blocks\.0\.norm1\.bias holds infinite numbers"),
    "all zero": ("", 0.0, "holds zeros alone, as do all weight matrices"),
}


def spoilt(case: str) -> tuple[Classifier, str]:
    """A tiny ViT with a fault, and how a message names it."""
    name, value, message = FAULTS[case]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_model(ARCHITECTURE)
    for key, tensor in model.body.state_dict().items():
        if key == name.replace("\\", "") or not name:
            tensor.view(-1)[: 1 if name else None] = value
    return model, message


def a_file(folder: Path, model: Classifier) -> str:
    save_file(model.body.state_dict(), folder / "x.safetensors")
    return str(folder / "x.safetensors")


def planned(key: str, *more: str) -> Callable[[Path, Classifier], Any]:
    surrogate = [o.replace("model.", "surrogate.") for o in TINY if o.startswith("model.")]
    return lambda folder, model: make_plan(tiny(*surrogate, *more, f"{key}={a_file(folder, model)}"), "cpu")


def kept_model(folder: Path, model: Classifier) -> None:
    save_file(model.body.state_dict(), folder / "m", {"architecture": json.dumps(asdict(ARCHITECTURE))})
    read_model(folder / "m")


def kept_trigger(folder: Path, model: Classifier) -> None:
    save_trigger(Erosion(model, AGEB), AGEB, folder / "t")
    read_trigger(folder / "t", AGEB)


def own_network(folder: Path, model: Classifier) -> None:
    save_trigger(Erosion(nn.Linear(1, 1), AGEB), AGEB, folder / "t")
    read_trigger(folder / "t", AGEB, {"surrogate": model})


DOORS: dict[str, Callable[[Path, Classifier], Any]] = {
    "model.checkpoint": planned("model.checkpoint", "attack.name=badnets"),
    "model.weights": planned("model.weights", "attack.name=badnets"),
    "surrogate.checkpoint": planned("surrogate.checkpoint"),
    "surrogate.weights": planned("surrogate.weights"),
    "run(model=)": lambda folder, model: run(tiny("attack.name=badnets"), folder / "runs", device="cpu", model=model),
    "a model file": kept_model,
    "a trigger file": kept_trigger,
    "networks=": own_network,
}


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.parametrize("door", DOORS)
def test_no_door_lets_them_in(door: str, case: str, tmp_path: Path) -> None:
    model, message = spoilt(case)
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$") as refusal:
        DOORS[door](tmp_path, model)
    assert "recipe.lr" not in str(refusal.value)
    assert not (tmp_path / "runs").exists()


def test_whole_numbers_are_no_weights_of_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({k: (100 * t).to(torch.int8) for k, t in open_model(ARCHITECTURE).body.state_dict().items()}, file)
    with pytest.raises(UserError, match="of whole numbers"):
        open_model(ARCHITECTURE, checkpoint=str(file))


def test_a_double_that_no_float_can_hold_is_infinite(tmp_path: Path) -> None:
    weights = {k: t.double() for k, t in open_model(ARCHITECTURE).body.state_dict().items()}
    weights["head.bias"][0] = 1e300
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors' cannot be used: head\.bias holds infinite numbers"):
        open_model(ARCHITECTURE, checkpoint=str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("part", ["checkpoint", "weights"])
def test_a_head_of_zeros_may_be_where_training_starts_but_no_surrogate(part: str, tmp_path: Path) -> None:
    """As pretrained ViTs are fine-tuned; a surrogate from a checkpoint is used as it is."""
    model = open_model(ARCHITECTURE)
    nn.init.zeros_(model.body.head.weight)
    assert planned(f"model.{part}", "attack.name=badnets")(tmp_path, model)
    assert planned("surrogate.weights")(tmp_path, model)
    with pytest.raises(
        UserError, match=r"^surrogate answers alike to all images, with zeros alone in body.head.weight"
    ):
        planned("surrogate.checkpoint")(tmp_path, model)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("model", [lambda images: images, "vit_tiny_patch16_224", nn.Flatten])
def test_what_is_no_network_is_refused(model: Any, runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^model is of type .*; give one of type Module$"):
        run(tiny("attack.name=badnets"), tmp_path / "runs", device="cpu", model=model)
    with pytest.raises(UserError, match="^model is of type .*; give one of type Module$"):
        open_run(runs.folder("badnets"), model=model)


def test_a_run_whose_model_was_spoilt_is_not_opened(runs: Runs, copied: Path) -> None:
    file = copied / runs.folder("badnets").name / "model.safetensors"
    weights = load_file(file)
    weights["norm.weight"][0] = math.nan
    file.unlink()  # it may share its content with the stage's
    save_file(weights, file, {"architecture": json.dumps(asdict(ARCHITECTURE))})
    with pytest.raises(UserError, match="is damaged"):
        open_run(file.parent)
    (file.parent / "SHA256SUMS").unlink()  # an older run has none
    with pytest.raises(UserError, match=r"model\.safetensors' cannot be used: norm\.weight holds NaN"):
        open_run(file.parent)


def test_a_surrogate_that_is_too_sure_is_refused_before_it_makes_a_trigger(tmp_path: Path) -> None:
    """Its softmax is exactly one-hot, so its loss has no gradient, and no pixel would be selected."""
    model = open_model(ARCHITECTURE)
    with torch.no_grad():
        model.body.head.weight.mul_(1e9)
    surrogate = [o.replace("model.", "surrogate.") for o in TINY if o.startswith("model.")]
    spec = tiny(*surrogate, f"surrogate.checkpoint={a_file(tmp_path, model)}")
    with pytest.raises(UserError, match=r"^\[surrogate\] has an attention gradient of 0 everywhere"):
        poison(spec, tmp_path / "set", tmp_path / "runs", device="cpu")
    assert not (tmp_path / "set").exists()
    assert list((tmp_path / "runs" / "stages").glob("*-*")) == []


def test_logits_without_a_greatest_one_classify_nothing(digits_world: World) -> None:
    class Overflowing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.arange(10.0) * images.mean((1, 2, 3))[:, None] * 1e30 * 1e30

    with pytest.raises(UserError, match="logits are NaN or infinite; lower the lr that it was trained with"):
        predict(Overflowing(), digits_world.clean, Arithmetic())
