"""What many tests share: one thread, tiny vision transformers, the embedded digits."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.forks import Forks
from vitrap.data.sources import World, open_data
from vitrap.models.classifier import Architecture, Classifier, open_model

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}

settings.register_profile("unhurried", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests are small, and pytest's workers fill the cores already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_cores() -> Iterator[None]:
    """What a test starts sees two cores, so that each of two workers has one thread.

    Where all cores are busy, the threads of one process wait for each other most of the time.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    ours, first = sorted(before), os.getpid() % len(before)
    os.sched_setaffinity(0, {ours[first], ours[first - 1]})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types are not checked at run time, as for users: what they get wrong must be refused by the package itself."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """A process that forks calls of `vitrap`."""
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def tiny_vit() -> Callable[..., Classifier]:
    """Builds a tiny ViT whose weights are far from their start, so that its attention is not flat."""

    def build(
        name: str = "vit_tiny_patch16_224", *, size: int = 16, n_classes: int = 10, seed: int = 0, **overrides: Any
    ) -> Classifier:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = open_model(Architecture(name, size, n_classes, {**TINY, **overrides}))
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.3)
        return model

    return build


@pytest.fixture(scope="session")
def digits_world() -> World:
    """The embedded digits: RGB at 16 px."""
    return open_data("digits")
