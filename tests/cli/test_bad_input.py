"""Every mistake of a user's: one line that names thing, value and remedy, exit code 2, and nothing written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.cli.conftest import TINY, Said, vitrap
from vitrap.data.cache import Arrays, write_folder
from vitrap.models.classifier import Architecture, open_model, save_model


def refused(said: Said, *parts: str) -> None:
    """One line on stderr with all `parts`, exit code 2, nothing on stdout."""
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("vitrap: ")
    for part in parts:
        assert part in said.err
    assert said.code == 2
    assert said.out == ""


@pytest.fixture
def bad(call, tmp_path: Path) -> Callable[..., None]:
    """A tiny run that is refused, with these words in its line, and writes nothing."""

    def bad(words: list[object], *parts: str) -> None:
        out = tmp_path / "out"
        refused(call("run", *words, "--out", out, "--device", "cpu"), *parts)
        assert not out.exists()

    return bad


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("attack.name=agbe", ["unknown attack 'agbe'", "did you mean 'ageb'?"]),
        ("model.name=vit_tiny_patch16_225", ["unknown model 'vit_tiny_patch16_225'", "did you mean 'vit_"]),
        ("data.name=digts", ["unknown data set 'digts'", "did you mean 'digits'?"]),
        ("attack.alhpa=0.1", ["unknown key 'attack.alhpa'", "did you mean 'attack.alpha'?"]),
        ("recipe.lrr=0.1", ["unknown key 'recipe.lrr'", "did you mean 'recipe.lr'?"]),
        ("atack.alpha=0.1", ["unknown key 'atack'", "did you mean 'attack'?"]),
        ("model.dept=2", ["unknown key 'model.dept'", "did you mean 'model.depth'"]),
        ("attack.alpha=much", ["attack.alpha = 'much'", "valid number"]),
        ("attack.target=0.5", ["attack.target = 0.5", "valid integer"]),
        ("model.depth=two", ["depth = 'two'"]),
        ("attack.poison_rate=0", ["attack.poison_rate = 0.0", "(0, 1)"]),
        ("attack.poison_rate=1", ["attack.poison_rate = 1.0", "(0, 1)"]),
        ("attack.poison_rate=-1", ["attack.poison_rate = -1.0", "(0, 1)"]),
        ("attack.poison_rate=nan", ["attack.poison_rate = nan", "finite"]),
        ("attack.target=10", ["attack.target = 10", "digits", "0 to 9"]),
        ("attack.target=-1", ["attack.target = -1", ">= 0"]),
        ("attack.size=4", ["attack.size = 4", "odd"]),
        ("attack.name=megatron attack.opacity=1.5", ["attack.opacity = 1.5", "[0, 1]"]),
        ("attack.name=megatron attack.faint=-0.1", ["attack.faint = -0.1", "[0, 1]"]),
        ("attack.name=megatron attack.cell=17", ["cell = 17 is larger than the trigger, size = 16", "lower it"]),
        ("attack.name=megatron attack.top=220", ["attack.top = 220", "within images of 16 px", "move or shrink it"]),
        ("attack.name=megatron attack.margin=12", ["attack.margin = 12", "within images of 16 px"]),
        ("attack.name=megatron attack.picture=no.png", ["picture = 'no.png' is no file; give one, or noise or white"]),
        (
            'attack.name=megatron attack.setting="clean-label" attack.poison_rate=1.5',
            ["attack.poison_rate = 1.5", "(0, 1]"],
        ),
        ("attack.name=megatron model.name=xcit_nano_12_p16_224", ["no plain token attention", "take one of"]),
        ("attack.size=0", ["attack.size = 0", "odd"]),
        ("attack.size=-3", ["attack.size = -3", "in [1, 255]"]),
        ("model.patch_size=5", ["patch_size = 5", "image size 16", "divisor"]),
        ("model.patch_size=0", ["patch_size = 0", "divisor"]),
        ("model.num_heads=3", ["num_heads = 3"]),
        ("surrogate.patch_size=7", ["patch_size = 7", "divisor"]),
        ("model.name=swin_tiny_patch4_window7_224", ["unknown key 'model.depth'", "did you mean 'model.depths'"]),
        ("surrogate.name=cait_xxs24_224", ["cait_xxs24_224", "4 x 4 at 16 px", "raise data.size"]),
        ("surrogate.name=resnet18 attack.route=pixel", ["resnet18", "no plain token attention", "vit, deit"]),
        ("attack.name=badnets test_surrogate.depth=2", ["badnets", "no surrogate at test time", "[test_surrogate]"]),
        ("attack.name=badnets attack.source=2", ["source = 2", "all-to-one", "leave it out"]),
        ("attack.name=badnets attack.goal=source-to-target", ["source = None", "other than the target"]),
        ("attack.name=badnets attack.goal=all-to-all attack.target=4", ["target = 4", "all-to-all", "leave it out"]),
        ("attack.name=badnets attack.goal=all-to-nobody", ["goal = 'all-to-nobody'", "all-to-one"]),
        ("attack.name=badnets attack.goal=source-to-target attack.source=11", ["attack.source = 11", "0 to 9"]),
        ("data.limit=3", ["data.limit = 3", "at least 10"]),
        ("data.size=0", ["data.size = 0", "in [1, 4096]"]),
        ("data.holdout=0.9999", ["data.holdout = 0.9999"]),
        ("name=a/b", ["name = 'a/b'", "letters"]),
        ("seed", ["override 'seed'", "key=value"]),
    ],
)
def test_a_wrong_value(bad, override: str, parts: list[str]) -> None:
    bad([*TINY, *override.split()], *parts)


# ---- specs


def test_a_spec_that_is_not_there(bad, tmp_path: Path) -> None:
    bad([tmp_path / "gone.toml"], "gone.toml", "No such file", "give the path of a TOML file")


def test_a_spec_that_is_not_toml(bad, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[data\nname = 3")
    bad([tmp_path / "bad.toml"], "bad.toml", "is not TOML", "line 1")


# ---- data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small data set in the cache format, of three classes."""
    rng, labels = np.random.default_rng(0), np.arange(90) % 3
    images = rng.integers(0, 256, (90, 16, 16, 3), dtype=np.uint8)
    return write_folder(tmp_path / "data", Arrays(images, labels, images[:30], labels[:30]))


def rewritten(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        array = np.load(folder / name)
        np.save(folder / name, change(array))

    return damage


def cut(folder: Path) -> None:
    path = folder / "train_images.npy"
    path.write_bytes(path.read_bytes()[:5000])


DAMAGES = {
    "gone": (shutil.rmtree, ["no folder"]),
    "missing": (lambda f: (f / "test_labels.npy").unlink(), ["test_labels.npy is missing"]),
    "truncated": (cut, ["train_images.npy", "truncated"]),
    "empty file": (lambda f: (f / "train_labels.npy").write_bytes(b""), ["train_labels.npy", "truncated"]),
    "float pixels": (rewritten("train_images.npy", lambda a: a / 255), ["train_images.npy", "float64", "uint8"]),
    "float labels": (rewritten("test_labels.npy", lambda a: a / 1.0), ["test_labels.npy", "float64", "integers"]),
    "channels first": (rewritten("train_images.npy", lambda a: a.transpose(0, 3, 1, 2)), ["shape", "n h w 3"]),
    "labels in a table": (rewritten("train_labels.npy", lambda a: a[:, None]), ["shape (90, 1)"]),
    "negative labels": (rewritten("train_labels.npy", lambda a: a - 1), ["train_labels.npy", "-1", "from 0"]),
    "too few labels": (rewritten("train_labels.npy", lambda a: a[:-1]), ["90 train images", "89 train labels"]),
    "another size": (rewritten("test_images.npy", lambda a: a[:, :8]), ["(16, 16)", "(8, 16)", "one size"]),
    "no images": (rewritten("test_images.npy", lambda a: a[:0]), ["test_images.npy", "empty"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_data_that_is_not_whole(bad, folder: Path, damage: str) -> None:
    harm, parts = DAMAGES[damage]
    harm(folder)
    bad([*TINY, f"data.name=npy:{folder}"], *parts, str(folder) if damage != "too few labels" else "store one")


def test_a_target_beyond_the_datas_classes(bad, folder: Path) -> None:
    bad([*TINY, f"data.name=npy:{folder}", "attack.target=3"], "attack.target = 3", "0 to 2")


def test_data_that_was_not_prepared(bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAP_DATA", str(tmp_path / "cache"))
    bad([*TINY, "data.name=gtsrb"], "'gtsrb'", "vitrap data prepare gtsrb")
    assert not (tmp_path / "cache").exists()


# ---- checkpoints


def whole(folder: Path, classes: int = 10, size: int = 16) -> Path:
    overrides = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    save_model(open_model(Architecture("vit_tiny_patch16_224", size, classes, overrides)), folder / "x.safetensors")
    return folder / "x.safetensors"


def pickled(folder: Path) -> Path:
    torch.save({"head.weight": torch.zeros(1)}, folder / "x.pth")
    return folder / "x.pth"


def half(folder: Path) -> Path:
    path = whole(folder)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def foreign(folder: Path) -> Path:
    save_file({"encoder.weight": torch.zeros(3)}, folder / "x.safetensors")
    return folder / "x.safetensors"


CHECKPOINTS = {
    "gone": (lambda folder: folder / "gone.safetensors", ["gone.safetensors", "is not there"]),
    "a folder": (lambda folder: folder, ["is not there"]),
    "a pickle": (pickled, ["x.pth", "pickled checkpoints are never opened", "save_file"]),
    "truncated": (half, ["x.safetensors", "no whole safetensors file"]),
    "of other shapes": (lambda f: whole(f, classes=7), ["head.weight (7, 16) for (10, 16)", "[model]"]),
    "of another model": (foreign, ["does not fit", "missing (cls_token", "1 unknown (encoder.weight)"]),
}


@pytest.mark.parametrize("table", ["model", "surrogate"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit(bad, tmp_path: Path, kind: str, table: str) -> None:
    make, parts = CHECKPOINTS[kind]
    path = make(tmp_path)
    model = [word.replace("model.", "surrogate.") for word in TINY if word.startswith("model.")]
    bad([*TINY, *model, f"{table}.checkpoint={path}"], "checkpoint", *parts)


# ---- machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(call, tmp_path: Path) -> None:
    said = call("run", *TINY, "--device", "cuda", "--out", tmp_path / "out")
    refused(said, "device 'cuda' is not there", "--device cpu")
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_none(call, tmp_path: Path) -> None:
    refused(call("run", *TINY, "--device", "gpu", "--out", tmp_path / "out"), "unknown device 'gpu'", "auto, cpu, cuda")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "runs"])
def test_an_output_folder_that_cannot_be_written(call, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / below
    refused(call("run", *TINY, "--device", "cpu", "--out", out), str(out), "cannot be written", "--out")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("words", [["run", *TINY], ["sweep", "x.toml"], ["poison", "-o", "x"], ["defend", "x"]])
def test_an_amount_of_memory_that_is_none(call, words: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VITRAP_MEMORY", "1GB")  # and back afterwards: the option sets it
    said = call(*words, "--memory", "lots", *(["--defence", "strip"] if words[0] == "defend" else []))
    refused(said, "memory limit 'lots' is no amount of memory", "4GB")


def test_a_memory_limit_of_the_environment_that_is_none(call, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VITRAP_MEMORY", "4XB")
    refused(call("run", *TINY, "--out", tmp_path / "out"), "memory limit '4XB'", "--memory")
    assert not (tmp_path / "out").exists()


# ---- other commands


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["list", "atacks"], ["unknown list 'atacks'", "'attacks'"]),
        (["explain", "agebb"], ["unknown attack or defence 'agebb'", "did you mean 'ageb'?"]),
        (["explain", "stripp"], ["unknown attack or defence 'stripp'", "did you mean 'strip'?"]),
        (["data", "prepare", "digits"], ["'digits' is embedded"]),
        (["data", "prepare", "cifr10"], ["unknown data set 'cifr10'", "'cifar10'"]),
        (["data", "prepare", "cifar10", "--from", "gone"], ["gone", "--from"]),
    ],
)
def test_other_commands(call, words: list[str], parts: list[str], tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAP_DATA", str(tmp_path / "cache"))
    refused(call(*words), *parts)
    assert not (tmp_path / "cache").exists()


# ---- defences


@pytest.fixture
def defended(call, tiny_run, tmp_path: Path) -> Callable[..., None]:
    """`vitrap defend` on a copy of a tiny run, refused; the record is as it was."""
    made = f"ageb-digits-{json.loads(tiny_run[0].stdout)['hash']}"
    run = Path(shutil.copytree(tiny_run[1], tmp_path / "runs")) / made / "record.json"

    def refuse(words: list[object], *parts: str, folder: Path | None = None) -> None:
        content = run.read_bytes()
        refused(call("defend", folder or run.parent, *words, "--device", "cpu"), *parts)
        assert run.read_bytes() == content
        assert sorted(os.listdir(run.parent)) == sorted(os.listdir(tiny_run[1] / made))

    refuse.run = run.parent  # type: ignore[attr-defined]
    return refuse


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--defence", "strop"], ["unknown defence 'strop'", "did you mean 'strip'?"]),
        (["--defence", "strip", "overlay=3"], ["unknown key 'defence.overlay'", "did you mean 'defence.overlays'?"]),
        (["--defence", "strip", "overlays=0"], ["defence.overlays = 0", "in [1, 1000]"]),
        (["--defence", "strip", "overlays=many"], ["defence.overlays = 'many'", "valid integer"]),
        (["--defence", "strip", "overlays"], ["override 'overlays'", "key=value"]),
        (["--defence", "fine_tune", "optimizer=adam"], ["defence.optimizer = 'adam'"]),
        (["--defence", "fine_tune", "lr=nan"], ["lr = nan", "finite"]),
        (["--defence", "strip", "name=psbd"], ["defence.name is given already, as 'strip'"]),
    ],
)
def test_a_wrong_defence(defended, words: list[str], parts: list[str]) -> None:
    defended(words, *parts)


def test_a_run_that_is_not_one(defended, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "gone"):
        defended(["--defence", "strip"], name, "holds no record.json", "finished run", folder=tmp_path / name)


def test_a_run_without_its_model(call, defended) -> None:
    (defended.run / "model.safetensors").unlink()
    content = (defended.run / "record.json").read_bytes()
    said = call("defend", defended.run, "--defence", "max_softmax", "--device", "cpu")
    refused(said, "model.safetensors", "is missing")
    assert (defended.run / "record.json").read_bytes() == content


def test_a_poisoned_set_has_a_folder_of_its_own(call, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    words = ["poison", *TINY, "--out", tmp_path / "out", "--device", "cpu"]
    refused(call(*words, "-o", tmp_path / "mine"), "mine", "not an empty folder", "another with -o")
    refused(call(*words, "-o", tmp_path / "new", "attack.name=agbe"), "unknown attack")
    refused(call(*words, "-o", tmp_path / "mine" / "file" / "new"), "cannot be written", "another with -o")
    assert sorted(os.listdir(tmp_path)) == ["mine"]


# ---- in a process of its own


@pytest.mark.parametrize("override", ["data.limt=3", "attack.name=agbe"])
def test_the_same_from_a_shell(tmp_path: Path, override: str) -> None:
    done = vitrap("run", *TINY, override, "--out", tmp_path / "out")
    refused(Said(done.returncode, done.stdout, done.stderr), "unknown", "did you mean")
    assert not (tmp_path / "out").exists()
