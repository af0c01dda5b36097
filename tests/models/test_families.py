"""Any classifier of timm's: what opens, what of it may be overridden, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.models.seven import SEVEN, WITHOUT_ATTENTION, opened
from vitrap.errors import UserError
from vitrap.models.arguments import overridable
from vitrap.models.classifier import Architecture, open_model, read_model, save_model
from vitrap.models.dropout import dropout_noise
from vitrap.models.families import FAMILIES, OTHER, family_of, listed, plain_names
from vitrap.models.observe import attention_outputs, block_outputs, token_layout, transformer


def refused(name: str, size: int = 32, **overrides: Any) -> str:
    with torch.random.fork_rng(devices=[]), pytest.raises(UserError) as caught:
        open_model(Architecture(name, size, 5, overrides))
    assert "\n" not in str(caught.value), "more than one line"
    return str(caught.value)


@pytest.mark.parametrize("kind", SEVEN)
@torch.no_grad()
def test_every_family_is_a_classifier_of_images_and_comes_back_from_its_file(kind: str, tmp_path: Path) -> None:
    model, images = opened(kind), torch.rand(2, 3, 32, 32)
    logits = model(images)
    assert logits.shape == (2, 5)
    mean, std = (torch.tensor(model.body.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(logits, model.body((images - mean) / std))
    save_model(model, tmp_path / "m.safetensors")
    again = read_model(tmp_path / "m.safetensors")
    assert again.architecture == model.architecture
    assert torch.equal(again(images), logits)


@pytest.mark.parametrize("kind", SEVEN)
def test_what_is_opened_is_what_timm_builds(kind: str) -> None:
    name, overrides = SEVEN[kind]
    sized = {} if kind in ("resnet", "convnext") else {"img_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        wanted = timm.create_model(name, num_classes=5, **sized, **overrides).state_dict()
        torch.manual_seed(3)
        found = open_model(Architecture(name, 32, 5, overrides)).body.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", WITHOUT_ATTENTION)
def test_what_needs_token_attention_refuses_the_others_by_name(kind: str) -> None:
    model, (name, _) = opened(kind), SEVEN[kind]
    for look in (
        transformer,
        token_layout,
        lambda m: block_outputs(m, (0,)),
        lambda m: attention_outputs(m, (0,)),
        lambda m: dropout_noise(m, "stream", 1, torch.Generator()),
    ):
        with pytest.raises(UserError) as caught:
            look(model)
        assert str(caught.value) == (
            f"model {name} ({type(model.body).__name__}) has no plain token attention to look at;"
            " take one of the families vit, deit, beit or eva"
        )


def test_a_name_that_is_no_classifier_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: nn.Identity())
    assert refused("resnet18") == (
        "model 'resnet18' is no classifier (Identity has no head for classes); choose another model.name"
    )


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:model", "resnet_18", ""])
def test_names_that_timm_does_not_have(name: str) -> None:
    assert refused(name).startswith(f"unknown model {name!r}")


@pytest.mark.parametrize("kind", SEVEN)
@pytest.mark.parametrize(
    "key",
    [
        *("num_classes", "in_chans", "device", "dtype", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"),
        *("cache_dir", "features_only", "out_indices", "pretrained_strict", "scriptable", "cfg", "self"),
    ],
)
def test_nothing_of_timms_factory_may_be_overridden(kind: str, key: str) -> None:
    assert refused(SEVEN[kind][0], **{key: 1}).startswith(f"unknown key 'model.{key}'")


def test_a_near_miss_is_hinted_at() -> None:
    assert "unknown key 'model.chanels'; did you mean 'model.channels'?" in refused("resnet18", chanels=[1])
    assert "unknown key 'model.windowsize'; did you mean 'model.window_size'?" in refused(
        "swin_tiny_patch4_window7_224", windowsize=4
    )
    assert refused("resnet18", img_size=32).startswith("unknown key 'model.img_size'"), "a ResNet takes no size"


@pytest.mark.parametrize("family", ["vision_transformer", "beit", "eva", "swin_transformer", "xcit", "resnet"])
def test_arguments_are_those_of_the_network(family: str) -> None:
    found = overridable(timm.list_models(module=family)[0])
    assert {"drop_path_rate", "global_pool"} <= found
    assert ("img_size" in found) == (family != "resnet")


@pytest.mark.parametrize(
    ("name", "size", "patch"),
    [("cait_xxs24_224", 24, 16), ("xcit_nano_12_p8_224", 20, 8), ("swin_s3_tiny_224", 30, 4)],
)
def test_patches_must_divide_the_image_in_every_family(name: str, size: int, patch: int) -> None:
    assert refused(name, size).startswith(f"patch_size = {patch} does not divide the image size {size}; choose")


def test_patches_of_a_family_that_is_not_in_the_table() -> None:
    assert family_of(timm.model_entrypoint("convit_tiny").__module__) is OTHER
    message = refused("convit_tiny", 40, depth=1, local_up_to_layer=1)
    assert message.startswith("patch_size = 16 does not divide the image size 40")


def test_the_table_is_timms_own_and_the_list_names_it() -> None:
    assert set(FAMILIES) <= {timm.model_entrypoint(name).__module__.split(".")[-1] for name in timm.list_models()}
    assert family_of("timm.models.eva").name == "eva"
    assert family_of("vovnet") is OTHER
    assert list(listed()) == [*(f.name for f in FAMILIES.values()), "NAME"]
    assert plain_names() == "vit, deit, beit or eva"
