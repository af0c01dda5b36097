"""Where a run's networks start from, what of it the record says, and what decides their stages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitrap.data.sources import World, open_data
from vitrap.errors import UserError
from vitrap.experiment.network import Network, network_of, try_out
from vitrap.experiment.plan import make_plan
from vitrap.experiment.record import OwnNetwork
from vitrap.experiment.run import run
from vitrap.experiment.spec import ModelTable, load_spec
from vitrap.models.classifier import Architecture, open_model

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
ARCHITECTURE = Architecture("vit_tiny_patch16_224", 16, 10, TINY)


def trained(**overrides: Any) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        return open_model(Architecture("vit_tiny_patch16_224", 16, 7, {**TINY, **overrides})).body.state_dict()


@pytest.fixture
def file(tmp_path: Path) -> str:
    save_file({f"module.{key}": tensor for key, tensor in trained().items()}, tmp_path / "x.safetensors")
    return str(tmp_path / "x.safetensors")


def test_weights_are_where_training_starts_and_the_record_says_what_was_adapted(file: str) -> None:
    network = Network(ARCHITECTURE, weights=file)
    said = "head replaced (7 -> 10 classes); prefix 'module.' taken off"
    assert network.adapted == said
    assert network.for_record().weights == said
    built: Any = network.build(0)
    assert torch.equal(built.body.blocks[1].mlp.fc1.weight, trained()["blocks.1.mlp.fc1.weight"])
    other: Any = network.build(1)
    assert torch.equal(built.body.norm.weight, other.body.norm.weight)
    assert not torch.equal(built.body.head.weight, other.body.head.weight), "a fresh head is the seed's"
    again: Any = network.build(0)
    assert torch.equal(built.body.head.weight, again.body.head.weight)


def test_a_linear_probe_trains_its_head_alone(file: str) -> None:
    probe, whole = Network(ARCHITECTURE, weights=file, linear_probe=True), Network(ARCHITECTURE, weights=file)
    built = probe.build(0)
    assert [name for name, weight in built.named_parameters() if weight.requires_grad] == [
        "body.head.weight",
        "body.head.bias",
    ]
    assert probe.for_record() == replace(whole.for_record(), linear_probe=True)
    assert probe.depends == {**whole.depends, "linear_probe": True}
    spec = load_spec(None, [f"surrogate.weights={file}", *(f"surrogate.{k}={v}" for k, v in TINY.items())])
    assert spec.surrogate
    world = open_data("digits")
    assert not network_of(spec.surrogate, world).linear_probe
    assert network_of(replace(spec.surrogate, linear_probe=True), world).linear_probe


def test_a_run_with_a_linear_probe_as_surrogate(file: str, tmp_path: Path) -> None:
    """Its backbone stays as it was; its head, and the victim, learn."""
    tiny = [f"{table}.{k}={v}" for table in ("model", "surrogate") for k, v in TINY.items()]
    names = [f"{table}.name=vit_tiny_patch16_224" for table in ("model", "surrogate")]
    probe = [f"surrogate.weights={file}", "surrogate.linear_probe=true", f"model.weights={file}"]
    spec = load_spec(None, [*names, *tiny, *probe, "data.limit=100", "recipe.epochs=1", "recipe.layer_decay=0.7"])
    record = run(spec, tmp_path, device="cpu")
    assert record.models["surrogate"].linear_probe is True
    surrogate, twin = sorted(tmp_path.glob("stages/clean-*/model.safetensors"), key=changed_layers)
    assert changed_layers(surrogate) == 0
    assert changed_layers(twin) > 3


def test_a_linear_probe_keeps_the_statistics_of_batch_norm(tmp_path: Path) -> None:
    tiny = {"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 8]}
    with torch.random.fork_rng(devices=[]):
        start = open_model(Architecture("resnet18", 16, 7, tiny)).body.state_dict()
    file = tmp_path / "resnet.safetensors"
    save_file(start, file)
    settings = [f"{table}.{k}={v}" for table in ("model",) for k, v in {"name": "resnet18", **tiny}.items()]
    probe = [f"model.weights={file}", "model.linear_probe=true", "attack.name=badnets"]
    run(load_spec(None, [*settings, *probe, "data.limit=100", "recipe.epochs=1"]), tmp_path / "runs", device="cpu")
    for stage in ("clean", "victim"):
        (model,) = (tmp_path / "runs").glob(f"stages/{stage}-*/model.safetensors")
        after = load_file(model)
        assert [k for k in after if not k.startswith("fc.") and not torch.equal(after[k], start[k])] == []


def test_a_network_from_outside_is_no_linear_probe() -> None:
    with pytest.raises(UserError, match=r"^model\.linear_probe = true says nothing of a network given from outside; "):
        network_of(ModelTable(weights="x", linear_probe=True), open_data("digits"), nn.Identity())


def changed_layers(file: Path) -> int:
    """How many of a stage's weights are other ones than training started from; heads aside."""
    start = trained()
    return sum(not torch.equal(start[key], weight) for key, weight in load_file(file).items() if "head" not in key)


def test_without_such_a_file_the_record_has_null() -> None:
    network = Network(ARCHITECTURE)
    assert (network.adapted, network.for_record().weights) == (None, None)
    assert Network(ARCHITECTURE, module=nn.Identity()).for_record() == OwnNetwork("Identity")


def test_the_files_content_decides_not_its_name(file: str, tmp_path: Path) -> None:
    depends = Network(ARCHITECTURE, weights=file).depends
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(Path(file).read_bytes())
    assert Network(ARCHITECTURE, weights=str(moved)).depends == depends
    save_file(trained(), moved)
    assert Network(ARCHITECTURE, weights=str(moved)).depends != depends
    assert Network(ARCHITECTURE, checkpoint=file).depends != depends, "one is adapted, the other taken as it is"
    assert Network(ARCHITECTURE).depends != depends


def test_a_spec_names_any_classifier_and_its_start(digits_world: World, file: str) -> None:
    named = network_of(ModelTable(name="vit_tiny_patch16_224", weights=file, overrides=TINY), digits_world)
    assert named == Network(ARCHITECTURE, weights=file)
    overrides = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    model = try_out(network_of(ModelTable(name="resnet18", overrides=overrides), digits_world), digits_world)
    assert type(model.body).__name__ == "ResNet"
    small = network_of(ModelTable(), digits_world).architecture
    assert small.overrides == {"patch_size": 4, "depth": 3, "embed_dim": 64, "num_heads": 4}


def test_a_file_that_does_not_fit_is_refused_when_the_network_is_tried(digits_world: World, tmp_path: Path) -> None:
    save_file(trained(depth=1), tmp_path / "x.safetensors")
    network = Network(ARCHITECTURE, weights=str(tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match="does not fit model 'vit_tiny_patch16_224': 12 missing"):
        try_out(network, digits_world)


def test_batches_of_one_image_are_refused_where_batch_norm_could_not_take_them() -> None:
    few = ["data.size=32", "data.limit=50", "attack.name=badnets", "recipe.precision=fp32", "recipe.batch_size=1"]
    tiny = ["model.name=resnet18", "model.layers=[1, 1, 1, 1]", "model.channels=[8, 8, 8, 8]"]
    with pytest.raises(UserError, match="recipe.batch_size = 1 is too small for a network with batch norm"):
        make_plan(load_spec(None, [*few, *tiny]), "cpu")
    make_plan(load_spec(None, few), "cpu")
