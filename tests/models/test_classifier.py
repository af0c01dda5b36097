"""Opening, keeping and refusing vision transformers."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils.logging
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from vitrap.errors import UserError
from vitrap.models import classifier
from vitrap.models.classifier import Architecture, Classifier, load_weights, open_model, read_model, save_model

NAME = "vit_tiny_patch16_224"
SMALL = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
Build = Callable[..., Classifier]


def opened(name: str = NAME, size: int = 16, n_classes: int = 5, **overrides: Any) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        return open_model(Architecture(name, size, n_classes, {**SMALL, **overrides}))


def drawn(size: int = 16) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def refused(*args: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(*args, **settings)
    assert "\n" not in str(caught.value), "more than one line"
    return str(caught.value)


def test_overrides_reach_the_network() -> None:
    model = opened(size=24, n_classes=7, patch_size=8, embed_dim=24, depth=3, num_heads=3)
    assert model.body.patch_embed.grid_size == (3, 3)
    assert len(model.body.blocks) == 3
    assert model.body.embed_dim == 24
    assert model.body.blocks[0].attn.num_heads == 3
    assert model(drawn(24)).shape == (2, 7)


def test_an_opened_model_is_a_function_of_its_images() -> None:
    model = opened(drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(drawn()), model(drawn()))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 16, 16, 3), (2, 4, 16, 16)])
def test_images_of_another_shape_are_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError) as refused:
        opened()(torch.zeros(shape))
    came = " x ".join(map(str, shape))
    wanted = f"images have shape {came}; expected b x 3 x 16 x 16; resize them, or add a batch axis with images[None]"
    assert str(refused.value) == wanted


def test_what_fails_on_images_of_the_right_shape_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened()
    monkeypatch.setattr(model.body, "forward", lambda images: images.new_zeros(2) @ images.new_zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        model(drawn())


@pytest.mark.parametrize("name", [NAME, "deit3_small_patch16_224", "eva02_tiny_patch14_224"])
@torch.no_grad()
def test_normalisation_is_inside(name: str) -> None:
    model, images = opened(name), drawn()
    mean, std = (torch.tensor(model.body.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(model(images), model.body((images - mean) / std))
    assert not torch.allclose(model(images), model.body(images))


def test_fresh_weights_come_from_torchs_random_state() -> None:
    def first(seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return open_model(Architecture(NAME, 16, 5, SMALL)).body.blocks[0].attn.qkv.weight

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


# Refusals


def test_an_unknown_name_has_a_nearest() -> None:
    message = refused("vit_tny_patch16_224")
    assert message.startswith("unknown model 'vit_tny_patch16_224'; did you mean 'vit_tiny_patch16_224'?")
    assert len(message) < 400, "timm's whole catalogue is no help"


@pytest.mark.parametrize("patch", [5, 3, 32, 0, -4, 4.0, "4", True])
def test_a_patch_must_divide_the_image(patch: Any) -> None:
    message = refused(patch_size=patch)
    assert message.startswith(f"patch_size = {patch!r} does not divide the image size 16; choose a divisor")


def test_the_patch_in_a_name_must_divide_the_image_too() -> None:
    with pytest.raises(UserError, match="patch_size = 14 does not divide the image size 32"):
        open_model(Architecture("eva02_tiny_patch14_224", 32, 5))
    with pytest.raises(UserError, match="patch_size = 16 does not divide the image size 24"):
        open_model(Architecture(NAME, 24, 5, {"depth": 1}))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"embed_dim": 25}, "dim should be divisible by num_heads"),
        ({"num_heads": 0}, "modulo by zero"),
        ({"depth": "deep"}, "depth = 'deep'"),
        ({"global_pool": "all"}, "global_pool = 'all'"),
        ({"class_token": False}, "Token pooling needs the class token"),
        ({"norm_layer": "none_such"}, "none_such"),
    ],
)
def test_an_override_that_does_not_fit(overrides: dict[str, Any], reason: str) -> None:
    message = refused(**overrides)
    assert message.startswith(f"model {NAME!r} does not take patch_size = 4")
    assert reason in message


@pytest.mark.parametrize("key", ["colour", "dept", "num_classes", "in_chans", "checkpoint_path", "features_only"])
def test_an_override_that_is_no_argument_of_the_network(key: str) -> None:
    assert refused(**{key: 1}).startswith(f"unknown key 'model.{key}'")


def test_an_image_size_is_that_of_the_data() -> None:
    assert "model.img_size = 24 is not the images' size 16; set data.size" in refused(img_size=24)
    assert opened(img_size=16)(torch.rand(1, 3, 16, 16)).shape == (1, 5)


# Keeping


@pytest.mark.parametrize(
    ("name", "overrides"),
    [(NAME, {"reg_tokens": 2}), ("deit_tiny_distilled_patch16_224", {}), ("beit_base_patch16_224", {})],
)
@torch.no_grad()
def test_a_saved_model_comes_back_bit_by_bit(
    tiny_vit: Build, tmp_path: Path, name: str, overrides: dict[str, Any]
) -> None:
    model, path = tiny_vit(name, **overrides), tmp_path / "model.safetensors"
    save_model(model, path, note="carries nothing")
    state = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        again = read_model(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.architecture == model.architecture
    assert not any(module.training for module in again.modules())
    wanted, found = model.body.state_dict(), again.body.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert torch.equal(again(drawn()), model(drawn()))
    with safe_open(path, "pt") as file:
        assert file.metadata()["note"] == "carries nothing"


def test_the_file_has_timms_own_names(tiny_vit: Build, tmp_path: Path) -> None:
    save_model(tiny_vit(), tmp_path / "m.safetensors")
    plain = timm.create_model(NAME, num_classes=10, img_size=16, **SMALL)
    plain.load_state_dict(load_file(tmp_path / "m.safetensors"))


@torch.no_grad()
def test_a_checkpoint_fills_the_model(tiny_vit: Build, tmp_path: Path) -> None:
    model, path = tiny_vit(), tmp_path / "m.safetensors"
    save_model(model, path)
    with torch.random.fork_rng(devices=[]):
        again = open_model(model.architecture, checkpoint=str(path))
    assert torch.equal(again(drawn()), model(drawn()))


# What is wrong with a file


def why_not(path: Path, read: Callable[[Path], Any] | None = None) -> str:
    """The refusal of a checkpoint; the model that was to take it stays as it was."""
    body = opened().body
    before = {k: v.clone() for k, v in body.state_dict().items()}
    with pytest.raises(UserError) as caught:
        read(path) if read else load_weights(body, path)
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


class Trap:
    """Unpickled, it would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("read", [None, read_model])
def test_a_pickle_is_never_opened(tmp_path: Path, read: Callable[[Path], Any] | None) -> None:
    path, mark = tmp_path / "weights.pt", tmp_path / "mark"
    torch.save({"weights": opened().body.state_dict(), "trap": Trap(mark)}, path)
    assert "is no whole safetensors file" in why_not(path, read)
    assert not mark.exists(), "the pickle ran"
    if read is None:
        assert "pickled checkpoints are never opened: convert them with safetensors" in why_not(path)


@pytest.mark.parametrize("read", [None, read_model])
@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file(tmp_path: Path, kept: int, read: Callable[[Path], Any] | None) -> None:
    path = tmp_path / "m.safetensors"
    save_model(opened(), path)
    path.write_bytes(path.read_bytes()[:kept])
    assert "is no whole safetensors file" in why_not(path, read)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "is not there; give the path of a safetensors file" in why_not(tmp_path / "none.safetensors")
    assert "is not there" in why_not(tmp_path)
    assert "safetensors file" in why_not(tmp_path / "none.safetensors", read_model)


def test_a_foreign_file_says_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    weights = opened().body.state_dict()
    del weights["norm.bias"]
    weights["teacher.weight"] = torch.zeros(2)
    weights["head.weight"] = torch.zeros(9, 16)
    save_file(weights, path)
    message = why_not(path)
    for fault in ("1 missing (norm.bias)", "1 unknown (teacher.weight)", "head.weight (9, 16) for (5, 16)"):
        assert fault in message
    assert "..." not in message
    assert "[model] must describe the network" in message


def test_a_wholly_foreign_file_is_not_listed_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({f"layer{n}": torch.zeros(1) for n in range(50)}, path)
    message = why_not(path)
    assert f"{len(opened().body.state_dict())} missing (" in message
    assert "50 unknown (layer0, layer1, layer10, layer11, ...)" in message
    assert len(message) < 600


@pytest.mark.parametrize("prefix", ["module.", "model.", "body.", "module.body."])
def test_a_prefix_that_is_the_whole_fault_is_named(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "wrapped.safetensors"
    save_file({prefix + key: t for key, t in opened().body.state_dict().items()}, path)
    message = why_not(path)
    assert f"has {prefix!r} before all names and fits but for that; give it as model.weights" in message


def test_a_prefix_that_is_not_the_whole_fault_is_not_named(tmp_path: Path) -> None:
    path = tmp_path / "wrapped.safetensors"
    save_file({f"module.{key}": t for key, t in opened(depth=1).body.state_dict().items()}, path)
    assert "[model] must describe the network" in why_not(path)


def test_a_file_that_does_not_say_how_to_build_its_model(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file(opened().body.state_dict(), path)
    assert "does not say how to build its model; name the network in [model]" in why_not(path, read_model)


# Pretrained weights


def answered(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> None:
    """What the hub's client returns or raises; no network is used."""

    def download(repository: str, file: str, **rest: Any) -> str:
        assert file == "model.safetensors", "only safetensors may be asked for"
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(classifier, "hf_hub_download", download)


def opened_pretrained(**overrides: Any) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        return open_model(Architecture(NAME, 16, 5, {**SMALL, **overrides}), pretrained=True)


def kept_by_hash(model: Classifier, folder: Path) -> Path:
    """The weights as the hub's client keeps them: a link to a file that is named by its SHA-256."""
    content, path = save(model.body.state_dict()), folder / "model.safetensors"
    blob = folder / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    path.symlink_to(blob)
    return path


def test_pretrained_weights_fill_all_but_the_head(
    tiny_vit: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_vit(n_classes=1000)
    answered(monkeypatch, kept_by_hash(source, tmp_path))
    found, wanted = opened_pretrained().body.state_dict(), source.body.state_dict()
    assert all(torch.equal(found[k], wanted[k]) for k in wanted if not k.startswith("head."))
    assert found["head.weight"].shape == (5, 16)


@pytest.mark.parametrize("error", [OSError("no route to host\nat all"), RuntimeError("closed"), ValueError("offline")])
def test_pretrained_weights_that_cannot_be_fetched(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    answered(monkeypatch, error)
    with pytest.raises(UserError) as caught:
        opened_pretrained()
    assert str(caught.value) == (
        f"pretrained weights of {NAME!r} cannot be fetched from the hub ({type(error).__name__}); connect to the"
        " network once (they then stay in the hub's cache, which HF_HOME moves), or leave out model.pretrained"
    )


def test_pretrained_weights_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the hub's client itself has it: offline, with nothing in its cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    before = huggingface_hub.utils.logging.get_verbosity()
    with pytest.raises(UserError, match=f"pretrained weights of '{NAME}' cannot be fetched .*; connect to the network"):
        opened_pretrained()
    assert huggingface_hub.utils.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", ""), "more than the one line"


def test_damaged_pretrained_weights(tiny_vit: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kept_by_hash(tiny_vit(n_classes=1000), tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    answered(monkeypatch, path)
    with pytest.raises(UserError, match=f"pretrained weights of '{NAME}' in .* are damaged; delete the file") as caught:
        opened_pretrained()
    assert str(path) in str(caught.value)


def test_a_name_without_pretrained_weights() -> None:
    with pytest.raises(UserError, match="'vit_small_patch16_36x1_224' has no pretrained weights on the hub"):
        open_model(Architecture("vit_small_patch16_36x1_224", 16, 5, SMALL), pretrained=True)
