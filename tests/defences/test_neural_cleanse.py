"""Neural Cleanse: patches by hand, gradients by class, the cost against a loop, the anomaly index against scipy."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Defence, ImageSet, Judged, Suspect
from vitrap.data.sources import World
from vitrap.defences import get, neural_cleanse
from vitrap.defences.neural_cleanse import NeuralCleanse, Patches, anomaly_index, descend, draw_patches, new_search
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.train.arithmetic import Arithmetic

Build = Callable[..., Classifier]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=generator(seed))


# The anomaly index


@pytest.mark.parametrize("n", [3, 10, 43])
def test_the_anomaly_index_is_scipy_s(n: int) -> None:
    norms = 10 + drawn(n).double()
    mad = scipy.stats.median_abs_deviation(norms.numpy(), scale="normal")
    wanted = (np.median(norms.numpy()) - norms.numpy()) / mad
    np.testing.assert_allclose(anomaly_index(norms).numpy(), wanted, rtol=1e-3)


def test_equal_norms_have_no_outlier() -> None:
    assert anomaly_index(torch.full((5,), 7.0).double()).tolist() == [0] * 5
    assert anomaly_index(torch.tensor([1.0, 7, 7, 7]).double())[0] > 1000


# The patch


def test_a_patch_by_hand() -> None:
    """A mask of 1/2, then one of 1: half of the pattern and all of it."""
    free = torch.tensor([0.0, 20.0]).view(2, 1, 1, 1)
    patches = Patches(free, torch.tensor([20.0, -20.0]).view(2, 1, 1, 1))
    found = patches.on(torch.tensor([0.0, 0.5]).view(2, 1, 1, 1), torch.tensor([0, 1]))
    assert found.flatten().tolist() == [0.5, 0.75, 0, 0]


def test_patches_start_as_even_noise(tiny_vit: Build, digits_world: World) -> None:
    patches = draw_patches(suspected(tiny_vit(), 10, digits_world.clean))
    mask = patches.mask(torch.arange(10)).detach()
    torch.testing.assert_close(mask[0, 0], drawn(10, 4, 16, 16)[0, 0])
    assert scipy.stats.kstest(mask.flatten().numpy(), "uniform").pvalue > 0.01


def test_the_gradient_of_a_class_is_that_of_its_own_loss(tiny_vit: Build, digits_world: World) -> None:
    model, images = tiny_vit(), digits_world.clean.images(torch.arange(5))
    patches = draw_patches(suspected(model, 10, digits_world.clean))
    cost, classes = drawn(10), torch.tensor([7, 2])
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    hits, sums = descend(model, weights, patches, images, classes, cost)
    for row, k in enumerate(classes.tolist()):
        free = [tensor[k].detach().clone().requires_grad_() for tensor in (patches.masks, patches.patterns)]
        mask, pattern = ((some.tanh() + 1) / 2 for some in free)
        logits = model((1 - mask) * images + mask * pattern)
        loss = functional.cross_entropy(logits, torch.full((5,), k)) + cost[k] * mask.sum()
        for found, wanted in zip((patches.masks, patches.patterns), torch.autograd.grad(loss, free), strict=True):
            assert found.grad is not None
            torch.testing.assert_close(found.grad[k], wanted, rtol=1e-4, atol=1e-6)
        assert hits[row] == (logits.argmax(1) == k).sum()
        torch.testing.assert_close(sums[row], mask.sum())
    assert patches.masks.grad is not None
    assert patches.masks.grad[[0, 1, 3]].abs().max() == 0
    assert all(weight.grad is None for weight in model.parameters())


# The cost and the end


@dataclass
class Plain:
    """The search of one class as the code's loop has it, with numbers and ifs."""

    settings: NeuralCleanse
    cost: float = 0.0
    best: float = float("inf")
    idle: int = 0
    ready: int = 0
    good: int = 0
    bad: int = 0
    raised: bool = False
    lowered: bool = False

    def after_epoch(self, reached: float, norm: float) -> bool:
        s, before = self.settings, self.best
        if reached >= s.success and norm < self.best:
            self.best = norm
        if self.best < float("inf"):
            self.idle = self.idle + 1 if self.best >= s.progress * before else 0
        ended = self.raised and self.lowered and self.idle >= s.stop
        if self.cost == 0 and reached >= s.success:
            self.ready += 1
            if self.ready >= s.patience:
                self.cost, self.good, self.bad, self.raised, self.lowered = s.cost, 0, 0, False, False
        else:
            self.ready = 0
        self.good, self.bad = (self.good + 1, 0) if reached >= s.success else (0, self.bad + 1)
        if self.good >= s.patience:
            self.cost, self.good, self.raised = self.cost * s.factor, 0, True
        elif self.bad >= s.patience:
            self.cost, self.bad, self.lowered = self.cost / s.factor**1.5, 0, True
        return ended


@pytest.mark.parametrize("settings", [{"patience": 1, "stop": 2}, {"patience": 2, "stop": 4}, {"patience": 3}])
def test_cost_and_end_of_each_class_are_those_of_a_loop(settings: dict[str, Any]) -> None:
    chosen = NeuralCleanse(**settings)
    search, plain = new_search(chosen, 6, torch.device("cpu")), [Plain(chosen) for _ in range(6)]
    ended = False
    for epoch in range(60):
        reached = (drawn(6, seed=epoch) + torch.arange(6) / 5).clamp(max=1)
        norm = 50 * 0.97**epoch * (1 + 0.1 * drawn(6, seed=100 + epoch))
        found = search.after_epoch(reached, norm)
        wanted = [one.after_epoch(reached[k].item(), norm[k].item()) for k, one in enumerate(plain)]
        assert found.tolist() == wanted
        ended = ended or any(wanted)
        for name in ("cost", "best", "idle", "ready", "good", "bad", "raised", "lowered"):
            assert getattr(search, name).tolist() == pytest.approx([getattr(one, name) for one in plain], rel=1e-5)
    assert ended or "stop" not in settings
    assert max(one.cost for one in plain) > chosen.cost > min(one.cost for one in plain)


# The whole judgement


class Rows(nn.Module):
    """The logit of class k is the brightness of row k of 8; class 2 is also what a white corner leads to."""

    def __init__(self, backdoor: float) -> None:
        super().__init__()
        self.backdoor = nn.Parameter(torch.tensor(backdoor))

    def forward(self, images: Tensor) -> Tensor:
        rows = 12 * images.mean((1, 3))[:, :6]
        fired = self.backdoor * images[:, :, -1, -1].mean(1) ** 4
        return torch.cat([rows[:, :2], rows[:, 2:3] + fired[:, None], rows[:, 3:]], 1)


def suspected(model: nn.Module, n_classes: int, clean: ImageSet, seed: int = 0) -> Suspect:
    return Suspect(model, clean, n_classes, generator(seed))


def rows_of_light() -> ImageSet:
    """Dark images, each with the row of its class bright."""
    labels = torch.arange(24) % 6
    pixels = torch.randint(0, 50, (24, 3, 8, 8), generator=generator())
    pixels[torch.arange(24), :, labels] += 150
    return ImageSet(pixels.to(torch.uint8), labels, torch.arange(24), 6, 8)


def quick(model: nn.Module, clean: ImageSet, seed: int = 0, **settings: Any) -> Judged:
    chosen = {"images": 12, "batch_size": 5, "epochs": 4, "patience": 1, **settings}
    return NeuralCleanse(**chosen).apply(suspected(model, clean.n_classes, clean, seed))


def said(found: Judged) -> Any:
    assert found.by_class is not None
    return found.score, found.suspected, found.by_class.tolist(), dict(found.report)


def test_a_class_that_one_pixel_leads_to_is_found() -> None:
    settings = {"epochs": 100, "patience": 3, "images": 24, "batch_size": 12}
    found = quick(Rows(30.0).eval(), rows_of_light(), **settings)
    assert found.suspected[0] == 2
    assert found.score > found.threshold == 2
    assert found.report["smallest norm"] < found.report["median norm"] / 2
    assert found.by_class is not None
    assert found.by_class.argmax() == 2
    clean = quick(Rows(0.0).eval(), rows_of_light(), **settings)
    assert clean.report["smallest norm"] > clean.report["median norm"] / 2
    assert clean.score < clean.threshold


def test_how_many_are_searched_at_once_does_not_matter(
    tiny_vit: Build, digits_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = quick(tiny_vit(), digits_world.clean)
    monkeypatch.setattr(neural_cleanse, "PIXELS_AT_ONCE", 11 * 16**2)
    assert quick(tiny_vit(), digits_world.clean).report == pytest.approx(together.report, rel=1e-2)


def test_classes_that_end_early_do_not_change_the_others(tiny_vit: Build, digits_world: World) -> None:
    found = quick(tiny_vit(), digits_world.clean, success=0.01, stop=1, epochs=8)
    assert np.isfinite(found.score)


def test_it_draws_from_the_defender_s_stream_alone(tiny_vit: Build, digits_world: World) -> None:
    before = torch.get_rng_state()
    first, again, other = (quick(tiny_vit(), digits_world.clean, seed) for seed in (0, 0, 1))
    assert said(first) == said(again) != said(other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_stays_as_it_was(tiny_vit: Build, digits_world: World) -> None:
    model = tiny_vit()
    next(model.parameters()).requires_grad_(False)
    asking, before = (
        [w.requires_grad for w in model.parameters()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    with torch.no_grad():
        quick(model, digits_world.clean)
    assert [w.requires_grad for w in model.parameters()] == asking
    assert all(w.grad is None for w in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bf16_changes_little(tiny_vit: Build, digits_world: World) -> None:
    exact = quick(tiny_vit(), digits_world.clean)
    suspect = replace(suspected(tiny_vit(), 10, digits_world.clean), compute=Arithmetic("bf16"))
    found = NeuralCleanse(images=12, batch_size=5, epochs=4, patience=1).apply(suspect)
    assert found.report["median norm"] == pytest.approx(exact.report["median norm"], rel=0.1)


@pytest.mark.parametrize("n_classes", [1, 2])
def test_too_few_classes_are_refused(n_classes: int) -> None:
    clean = replace(rows_of_light(), labels=torch.zeros(24, dtype=torch.int64), n_classes=n_classes)
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, n_classes)).eval()
    with pytest.raises(UserError, match=f"with at least 2 others, and n_classes = {n_classes}"):
        NeuralCleanse().apply(suspected(model, n_classes, clean))


@pytest.mark.parametrize(
    "settings", [{"images": 501}, {"epochs": 0}, {"lr": 0.0}, {"cost": 0.0}, {"factor": 1.0}, {"success": 0.0}]
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))} = "):
        NeuralCleanse(**settings)


def test_it_is_found_by_its_name() -> None:
    assert get("neural_cleanse") is NeuralCleanse
    assert isinstance(NeuralCleanse(), Defence)
