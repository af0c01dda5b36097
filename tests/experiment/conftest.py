"""Tiny runs, made once a session and shared by tests that only look at them."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import vitrap.experiment.code as code
import vitrap.experiment.retraining as retraining
import vitrap.experiment.stages as stages
from vitrap.experiment.record import Record
from vitrap.experiment.run import run, run_folder
from vitrap.experiment.spec import Spec, load_spec

TINY = (
    "data.limit=100",
    "attack.poison_rate=0.1",
    "model.name=vit_tiny_patch16_224",
    "model.patch_size=8",
    "model.embed_dim=16",
    "model.depth=1",
    "model.num_heads=2",
    "recipe.epochs=1",
)


def tiny(*overrides: str) -> Spec:
    """The embedded default, made small."""
    return load_spec(None, [*TINY, *overrides])


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Lets a file of the package look edited to the keys."""

    def edit(file: str) -> None:
        read = code._read

        def read_edited(path: Path) -> code.Source:
            return replace(read(path), digest="edited") if path == code.PACKAGE / file else read(path)

        monkeypatch.setattr(code, "_read", read_edited)
        code.code_digest.cache_clear()

    yield edit
    code.code_digest.cache_clear()


class Trainings:
    """Counts trainings, as `train` is called, and does them."""

    def __init__(self) -> None:
        self.n, self.train = 0, stages.train

    def __call__(self, *args, **kwargs):
        self.n += 1
        return self.train(*args, **kwargs)

    def since(self) -> int:
        """How many since it was last asked."""
        n, self.n = self.n, 0
        return n


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    counter = Trainings()
    for module in (stages, retraining):
        monkeypatch.setattr(module, "train", counter)
    return counter


class Runs:
    """AGEB, then BadNets, in one folder; and how many trainings each took."""

    def __init__(self, out: Path, count: Trainings) -> None:
        self.out = out
        self.specs = {name: tiny(f"attack.name={name}", f"name={name}") for name in ("ageb", "badnets")}
        self.records: dict[str, Record] = {}
        self.trainings: dict[str, int] = {}
        for name, spec in self.specs.items():
            self.records[name] = run(spec, out, device="cpu")
            self.trainings[name] = count.since()

    def folder(self, name: str) -> Path:
        return run_folder(self.specs[name], self.out)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """To look at only."""
    with pytest.MonkeyPatch.context() as patch:
        counter = Trainings()
        patch.setattr(stages, "train", counter)
        return Runs(tmp_path_factory.mktemp("runs"), counter)


@pytest.fixture
def copied(runs: Runs, tmp_path: Path) -> Path:
    """A copy of the folder of `runs`, to change."""
    return Path(shutil.copytree(runs.out, tmp_path / "runs"))
