"""A training that was interrupted comes to the same end, bit for bit, whatever was random or remembered about it."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitrap import resuming
from vitrap.contracts import Batch, Criterion, ExtraModule, ImageSet, Objective
from vitrap.errors import UserError
from vitrap.models.classifier import Architecture, open_model
from vitrap.resuming import Checkpointer, Position, TrainingState, state_seconds
from vitrap.train.loop import Curves, Streams, cross_entropy, train
from vitrap.train.recipe import Recipe

N, CLASSES, SIZE = 50, 3, 8
TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
RECIPE = Recipe(3, 16, lr=1e-2, label_smoothing=0.1)
STEPS = 12


class Killed(BaseException):
    """Stands for a SIGKILL: nothing is done on the way out that would bring the training further."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def data() -> ImageSet:
    """Classes told by brightness, a third of the images poisoned; the last of four batches is a small one."""
    labels = torch.arange(N) % CLASSES
    noise = torch.randint(40, (N, 3, SIZE, SIZE), generator=generator(7))
    pixels = (noise + 90 * labels[:, None, None, None]).to(torch.uint8)
    clean = ImageSet(pixels, labels, torch.arange(N), CLASSES, SIZE)
    rows = torch.arange(0, N, 3)
    return clean.stamp(rows, 255 - clean.pixels[rows], torch.full((len(rows),), 2))


class Brush(nn.Module):
    """A trigger generator that drops out, and counts the batches it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Parameter(torch.full((1, 3, 1, 1), 0.4001))
        self.dropout = nn.Dropout(0.3)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        return (self.norm(self.dropout(images)) * 0.1 + 0.5 * self.colour).clamp(0, 1)


def plain(attacker: torch.Generator) -> Objective | None:
    return None


def drawing(attacker: torch.Generator) -> Objective:
    """A second term of poisoned images alone, weighed by what the attacker's own stream draws."""

    def terms(model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Tensor]:
        logits = model(batch.images)
        found = {"cross_entropy": criterion(logits, batch.labels)}
        if len(batch.poison_at) > 4:  # some batches go without
            found["extra"] = logits[batch.poison_at].square().mean() * torch.rand((), generator=attacker)
        return found

    return Objective(terms, {"extra": 0.5})


def projected(attacker: torch.Generator) -> Objective:
    return replace(drawing(attacker), combine="projected")


def learned(attacker: torch.Generator) -> Objective:
    return replace(drawing(attacker), combine="learned")


def along(attacker: torch.Generator) -> Objective:
    """Some images of each batch, drawn anew, are painted by a module that learns along."""
    brush = Brush()

    def prepare(batch: Batch, chances: torch.Generator) -> Batch:
        order = torch.randperm(len(batch.labels), generator=chances)
        rows, rest = order[:2], order[2:]
        images = batch.images.index_copy(0, rows, brush(batch.images[rows]))
        return replace(batch, images=images, labels=batch.labels.index_fill(0, rows, 2), poison_at=rows, rest_at=rest)

    return Objective(cross_entropy, prepare=prepare, along={"brush": ExtraModule(brush, 0.05)})


def trained(
    data: ImageSet,
    objective: Callable[[torch.Generator], Objective | None],
    recipe: Recipe,
    path: Path | None = None,
    dies_at: int = 0,
) -> tuple[dict[str, Tensor], Curves, int]:
    """Weights, curves and number of ticks; or `Killed` after so many steps, the state kept after each."""
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == dies_at + 1:
            raise Killed

    def watch(model: nn.Module) -> Mapping[str, float]:
        return {"cda": (model(data.images(torch.arange(N))).argmax(1) == data.labels).float().mean().item()}

    attacker = generator(11)
    streams = Streams(generator(1), generator(2), generator(3), generator(4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        aim = objective(attacker)
        overrides = {**TINY, "drop_path_rate": 0.4, "proj_drop_rate": 0.2}
        model = open_model(Architecture("vit_tiny_patch16_224", SIZE, CLASSES, overrides))
        checkpointer = Checkpointer(path, {"attack": attacker}, {"role": "test"}) if path else None
        ticking = tick if dies_at else lambda: None
        curves = train(model, data, recipe, streams, aim, ticking, watch, checkpointer=checkpointer)
    weights = dict(model.state_dict())
    for name, one in aim.along.items() if aim else ():
        weights |= {f"{name}.{key}": tensor for key, tensor in one.module.state_dict().items()}
    return weights, curves, ticks


@pytest.fixture(autouse=True)
def after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state after each step."""
    monkeypatch.setenv("VITRAP_STATE_SECONDS", "0.000001")
    monkeypatch.setattr(resuming, "SHARE", 1e6)


@pytest.mark.parametrize("dies_at", [1, 3, 4, 6, 11])  # within an epoch, at its end, in the last one
@pytest.mark.parametrize("objective", [plain, drawing, projected, learned, along], ids=lambda f: f.__name__)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_comes_to_the_same_end(data: ImageSet, tmp_path: Path, objective, optimizer, dies_at: int) -> None:
    recipe = replace(RECIPE, optimizer=optimizer, crop=1, flip=True, jitter=0.3, layer_decay=0.7, head_lr=2e-2)
    weights, curves, _ = trained(data, objective, recipe)
    with pytest.raises(Killed):
        trained(data, objective, recipe, tmp_path / "state.safetensors", dies_at)
    again, more, _ = trained(data, objective, recipe, tmp_path / "state.safetensors")
    assert more == curves
    assert again.keys() == weights.keys()
    assert [key for key in weights if not torch.equal(weights[key], again[key])] == []


def test_killed_again_and_again_it_comes_to_the_same_end(data: ImageSet, tmp_path: Path) -> None:
    weights, curves, _ = trained(data, along, RECIPE)
    for dies_at in (2, 5, 8):
        with pytest.raises(Killed):
            trained(data, along, RECIPE, tmp_path / "state.safetensors", dies_at)
    again, more, _ = trained(data, along, RECIPE, tmp_path / "state.safetensors")
    assert more == curves
    assert all(torch.equal(weights[key], again[key]) for key in weights)


class Conv(nn.Module):
    """A network with batch norm, and with something to remember that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(8 * 36, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images))

    def get_extra_state(self) -> dict[str, str]:
        return {"made by": "somebody"}

    def set_extra_state(self, state: dict[str, str]) -> None:
        pass


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_kind_of_network_comes_to_the_same_end(
    data: ImageSet, tmp_path: Path, precision, order: torch.memory_format, optimizer
) -> None:
    def ended(path: Path | None, dies_at: int = 0) -> dict[str, Tensor]:
        ticks = iter(range(1000))

        def tick() -> None:
            if next(ticks) == dies_at > 0:
                raise Killed

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model = Conv().to(memory_format=order)
            recipe = replace(RECIPE, optimizer=optimizer, precision=precision)
            streams = Streams(generator(1), generator(2), generator(3), generator(4))
            train(model, data, recipe, streams, tick=tick, checkpointer=Checkpointer(path) if path else None)
        return {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}

    weights = ended(None)
    with pytest.raises(Killed):
        ended(tmp_path / "state.safetensors", 6)
    assert (tmp_path / "state.safetensors").exists()
    again = ended(tmp_path / "state.safetensors")
    assert [key for key in weights if not torch.equal(weights[key], again[key])] == []


def test_a_bar_counts_what_was_done_before(data: ImageSet, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        trained(data, plain, RECIPE, path, 6)
    assert trained(data, plain, RECIPE, path, STEPS)[2] == STEPS


def test_the_file_says_what_its_weights_carry_and_how_long_it_took(data: ImageSet, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        trained(data, plain, RECIPE, path, 6)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["role"] == "test"
    facts = json.loads(about["state"])
    assert (facts["epoch"], facts["steps"]) == (1, 2)
    assert facts["seconds"] > 0
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()])
def test_a_disk_that_is_full_stops_no_training(data: ImageSet, tmp_path: Path, monkeypatch, error) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(resuming, "write_tensor_file", full)
    assert trained(data, plain, RECIPE, tmp_path / "state.safetensors")[1] == trained(data, plain, RECIPE)[1]
    assert list(tmp_path.iterdir()) == []


def test_states_are_kept_now_and_then_and_take_a_small_share_of_the_time(tmp_path: Path, monkeypatch) -> None:
    now, written = [0.0], []
    monkeypatch.setattr(resuming.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(resuming, "SHARE", 0.02)
    monkeypatch.delenv("VITRAP_STATE_SECONDS")

    def write(*_: Any) -> None:
        written.append(now[0])
        now[0] += 8  # seconds: a large state

    monkeypatch.setattr(Checkpointer, "_write", write)
    checkpointer = Checkpointer(tmp_path / "state.safetensors")
    state = TrainingState({}, torch.optim.SGD([nn.Parameter(torch.zeros(1))]), {}, torch.device("cpu"), {})
    while now[0] < 1500:
        now[0] += 1
        checkpointer(state, Position())
    assert written == [180, 588, 996, 1404]  # after 180 s; then 8 s are 2 % of 400 s


def kept(data: ImageSet, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts of a state after six steps."""
    with pytest.raises(Killed):
        trained(data, plain, RECIPE, path, 6)
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["state"])


def renamed(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    tensors["model/body.other"] = tensors.pop("model/body.pos_embed")


def reshaped(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    tensors["model/body.pos_embed"] = torch.zeros(3)


def misremembered(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    tensors["optimiser/0/exp_avg"] = torch.zeros(3)


def overcounted(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    tensors["optimiser/999/exp_avg"] = torch.zeros(3)


def forgotten(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    del facts["seconds"]


@pytest.mark.parametrize("change", [renamed, reshaped, misremembered, overcounted, forgotten], ids=lambda f: f.__name__)
def test_a_state_of_another_training_is_none(data: ImageSet, tmp_path: Path, change) -> None:
    path = tmp_path / "state.safetensors"
    tensors, facts = kept(data, path)
    change(tensors, facts)
    save_file(tensors, path, {"state": json.dumps(facts)})
    weights, curves, _ = trained(data, plain, RECIPE)
    again, more, _ = trained(data, plain, RECIPE, path)
    assert more == curves
    assert all(torch.equal(weights[key], again[key]) for key in weights)


@pytest.mark.parametrize(("said", "seconds"), [("", 180), ("5.5", 5.5), (" 60 ", 60), ("0", math.inf)])
def test_how_often_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, said: str, seconds: float) -> None:
    monkeypatch.setenv("VITRAP_STATE_SECONDS", said)
    assert state_seconds() == seconds


@pytest.mark.parametrize("said", ["3min", "-1", "nan"])
def test_what_is_no_number_of_seconds_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("VITRAP_STATE_SECONDS", said)
    with pytest.raises(UserError, match=f"^VITRAP_STATE_SECONDS = '{said}' is no number of seconds; set it to 180"):
        state_seconds()


@pytest.mark.parametrize("content", [None, b"", b"no safetensors file", "cut"])
def test_without_a_whole_file_it_begins_at_the_start(data: ImageSet, tmp_path: Path, content: Any) -> None:
    path = tmp_path / "state.safetensors"
    if content == "cut":
        with pytest.raises(Killed):
            trained(data, plain, RECIPE, path, 6)
        path.write_bytes(path.read_bytes()[:-100])
    elif content is not None:
        path.write_bytes(content)
    weights, curves, _ = trained(data, plain, RECIPE)
    again, more, _ = trained(data, plain, RECIPE, path)
    assert more == curves
    assert all(torch.equal(weights[key], again[key]) for key in weights)
