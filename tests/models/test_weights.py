"""Starting from a file: what timm's own loading makes of it is the oracle, and what does not fit is refused."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models.seven import SEVEN, opened
from vitrap.errors import UserError
from vitrap.models.classifier import Architecture, Classifier, open_model
from vitrap.models.weights import shared_prefix

each = pytest.mark.parametrize("kind", SEVEN)


def tensors(kind: str, *, size: int = 32, n_classes: int = 7) -> dict[str, Tensor]:
    """A trained network's, as it were."""
    return {key: t.clone() for key, t in opened(kind, size=size, n_classes=n_classes).body.state_dict().items()}


def written(path: Path, found: dict[str, Tensor], prefix: str = "") -> str:
    save_file({prefix + key: t.contiguous() for key, t in found.items()}, path)
    return str(path)


def started(kind: str, file: str, *, size: int = 32, n_classes: int = 5, seed: int = 1, **overrides: Any) -> Classifier:
    name, small = SEVEN[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_model(Architecture(name, size, n_classes, {**small, **overrides}), weights=file)


def by_timm(
    kind: str, file: str, *, size: int = 32, n_classes: int = 5, seed: int = 1, **cfg: Any
) -> dict[str, Tensor]:
    name, small = SEVEN[kind]
    sized = {} if kind in ("resnet", "convnext") else {"img_size": size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={"file": file, **cfg},
            num_classes=n_classes,
            **sized,
            **small,
        )
    return body.state_dict()


def same(found: Classifier, wanted: dict[str, Tensor]) -> None:
    own = found.body.state_dict()
    assert list(own) == list(wanted)
    assert [key for key in wanted if not torch.equal(own[key], wanted[key])] == []


def refused(kind: str, file: str | Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        started(kind, str(file), **settings)
    assert "\n" not in str(caught.value), "more than one line"
    assert str(file) in str(caught.value)
    return str(caught.value)


@each
def test_the_head_is_replaced_where_the_classes_differ(kind: str, tmp_path: Path) -> None:
    trained = tensors(kind)
    file = written(tmp_path / "x.safetensors", trained)
    found = started(kind, file)
    assert found.adapted == "head replaced (7 -> 5 classes)"
    same(found, by_timm(kind, file))
    head = found.body.pretrained_cfg["classifier"]
    kept = [key for key in trained if not key.startswith(head)]
    assert all(torch.equal(found.body.state_dict()[key], trained[key]) for key in kept)
    assert "state_dict" not in found.body.pretrained_cfg
    assert not found.training


@each
def test_the_head_is_kept_where_the_classes_agree(kind: str, tmp_path: Path) -> None:
    trained = tensors(kind, n_classes=5)
    file = written(tmp_path / "x.safetensors", trained)
    found = started(kind, file)
    assert found.adapted == "taken as they are"
    same(found, trained)
    same(found, by_timm(kind, file, num_classes=5))


@each
def test_a_file_without_a_head(kind: str, tmp_path: Path) -> None:
    head = opened(kind).body.pretrained_cfg["classifier"]
    file = written(tmp_path / "x.safetensors", {k: t for k, t in tensors(kind).items() if not k.startswith(head)})
    found = started(kind, file)
    assert found.adapted == "head fresh: the file has none"
    same(found, by_timm(kind, file))


@pytest.mark.parametrize(
    ("kind", "said"),
    [("deit", "position embeddings 8x8 -> 12x12"), ("vit, registers", "position embeddings 8x8 -> 12x12")],
)
def test_position_embeddings_are_resampled(kind: str, said: str, tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", tensors(kind))
    found = started(kind, file, size=48)
    assert found.adapted == f"head replaced (7 -> 5 classes); {said}"
    same(found, by_timm(kind, file, size=48))


def test_a_patch_embedding_is_resampled_too(tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", tensors("deit"))
    found = started("deit", file, patch_size=8)
    assert "patch embedding 4x4 px -> 8x8 px" in found.adapted
    assert "position embeddings 8x8 -> 4x4" in found.adapted


@pytest.mark.parametrize("prefix", ["module.", "model.", "body.", "module.body.", "_orig_mod.module.", "model.body."])
def test_prefixes_are_taken_off(prefix: str, tmp_path: Path) -> None:
    trained = tensors("resnet", n_classes=5)
    found = started("resnet", written(tmp_path / "x.safetensors", trained, prefix))
    assert found.adapted == f"prefix {prefix!r} taken off"
    same(found, trained)


def test_a_prefix_is_one_of_all_names_and_not_of_the_networks_own() -> None:
    assert shared_prefix(["module.a", "b"], ["a", "b"]) == ""
    assert shared_prefix(["body.a", "body.b"], ["body.a", "body.b"]) == ""
    assert shared_prefix(["model.body.a"], ["body.a"]) == "model."
    assert shared_prefix([], []) == ""


@pytest.mark.parametrize(
    ("dtype", "said"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float64, "fp64")]
)
def test_other_precisions_are_brought_to_fp32(dtype: torch.dtype, said: str, tmp_path: Path) -> None:
    trained = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors("resnet", n_classes=5).items()}
    found = started("resnet", written(tmp_path / "x.safetensors", trained))
    assert found.adapted == f"{said} -> fp32"
    same(found, {k: t.float() if t.is_floating_point() else t for k, t in trained.items()})


def test_everything_at_once_is_said_in_one_line(tmp_path: Path) -> None:
    trained = {k: t.bfloat16() for k, t in tensors("deit").items()}
    found = started("deit", written(tmp_path / "x.safetensors", trained, "module."), size=16)
    assert found.adapted == (
        "head replaced (7 -> 5 classes); prefix 'module.' taken off; bf16 -> fp32; position embeddings 8x8 -> 4x4"
    )
    plain = written(tmp_path / "y.safetensors", {k: t.float() for k, t in trained.items()})
    same(found, by_timm("deit", plain, size=16))


def test_names_of_the_authors_own_code_are_timms_business(tmp_path: Path) -> None:
    """A ConvNeXt as its authors' code names it."""
    trained = tensors("convnext", n_classes=5)
    theirs = {"stem.0": "downsample_layers.0.0", "stem.1": "downsample_layers.0.1", "head.norm": "norm"}
    foreign = {}
    for key, tensor in trained.items():
        name = key
        for ours, their in theirs.items():
            name = name.replace(ours, their)
        for stage in range(1, 4):
            name = name.replace(f"stages.{stage}.downsample", f"downsample_layers.{stage}")
        name = name.replace(".blocks", "").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        foreign[name.replace("head.fc", "head")] = tensor
    found = started("convnext", written(tmp_path / "x.safetensors", foreign))
    assert "tensors under other names" in found.adapted
    same(found, trained)


# Refusals


@each
def test_a_missing_tensor_of_the_backbone_is_refused(kind: str, tmp_path: Path) -> None:
    trained = tensors(kind)
    head = opened(kind).body.pretrained_cfg["classifier"]
    gone = [key for key in trained if trained[key].ndim > 1 and not key.startswith(head)][-1]
    del trained[gone]
    file = written(tmp_path / "x.safetensors", trained)
    for n_classes in (5, 7):  # with the head replaced, and with the file's own
        message = refused(kind, file, n_classes=n_classes)
        assert f"does not fit model {SEVEN[kind][0]!r}: 1 missing ({gone})" in message
        assert "[model] must describe the network that the weights come from" in message


@pytest.mark.parametrize("n_classes", [5, 7])
def test_tensors_that_the_network_lacks_are_refused(n_classes: int, tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", {**tensors("deit"), "blocks.2.norm1.weight": torch.ones(16)})
    message = refused("deit", file, n_classes=n_classes)
    assert "1 unknown (blocks.2.norm1.weight)" in message


@pytest.mark.parametrize("n_classes", [5, 7])
def test_shapes_that_do_not_fit_are_refused(n_classes: int, tmp_path: Path) -> None:
    message = refused("resnet", written(tmp_path / "x.safetensors", tensors("resnet")), channels=[8, 12, 16, 24])
    assert "of another shape (layer4.0.conv1.weight (20, 16, 3, 3) for (24, 16, 3, 3)" in message
    assert message.count(" for (") <= 4


def test_a_number_in_place_of_a_head_counts_as_none(tmp_path: Path) -> None:
    """A tensor without a shape tells of no classes: the head is fresh, and the line says so."""
    kind = next(iter(SEVEN))
    found = tensors(kind, n_classes=5)
    name = next(name for name in found if name.endswith("fc.weight") or name == "head.weight")
    model = started(kind, written(tmp_path / "w.safetensors", {**found, name: torch.tensor(1.0)}))
    assert "head" in (model.adapted or "")


def test_whole_numbers_are_refused(tmp_path: Path) -> None:
    trained = tensors("resnet")
    assert trained["bn1.num_batches_tracked"].dtype == torch.int64
    trained["layer1.0.conv1.weight"] = trained["layer1.0.conv1.weight"].to(torch.int8)
    message = refused("resnet", written(tmp_path / "x.safetensors", trained))
    assert "holds tensors of int8 (layer1.0.conv1.weight), which are no weights to start from; give" in message


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "is not there; give the path of a safetensors file" in refused("resnet", tmp_path / "none.safetensors")
    torch.save(tensors("resnet"), tmp_path / "x.pt")
    assert "is no whole safetensors file" in refused("resnet", tmp_path / "x.pt")
    save_file({}, tmp_path / "empty.safetensors")
    assert "holds no tensors" in refused("resnet", tmp_path / "empty.safetensors")


def test_a_wholly_foreign_file_is_not_listed_to_its_end(tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", {f"layer{n}": torch.zeros(1) for n in range(50)})
    assert len(refused("deit", file)) < 900


def test_a_damaged_start_leaves_no_hook_behind(tmp_path: Path) -> None:
    from torch.nn.modules import module

    refused("resnet", written(tmp_path / "x.safetensors", {"a": torch.zeros(1)}))
    assert not module._global_module_registration_hooks
