"""MM-BD: the statistic against margins worked out by hand and another climber, the p-value against scipy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from vitrap.contracts import Defence, ImageSet, Judged, Suspect
from vitrap.data.sources import World
from vitrap.defences import get, mm_bd
from vitrap.defences.mm_bd import MmBd, ascend, fit_gamma, margin, null_statistics, p_value
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.train.arithmetic import Arithmetic

Build = Callable[..., Classifier]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# The margin


def test_margins_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.5], [1.0, 4.0, 2.5], [-3.0, -5.0, -4.0]])
    assert margin(logits, torch.tensor([1, 2, 0])).tolist() == [1.5, -1.5, 1.0]


# The p-value


@pytest.mark.parametrize("n", [2, 9, 42, 999])
@pytest.mark.parametrize(("shape", "scale"), [(0.5, 3.0), (4.0, 0.2), (60.0, 0.15)])
def test_the_gamma_distribution_is_scipy_s(n: int, shape: float, scale: float) -> None:
    values = scipy.stats.gamma.rvs(shape, scale=scale, size=n, random_state=np.random.default_rng(0))
    wanted = scipy.stats.gamma.fit(values, floc=0)
    found = [x.item() for x in fit_gamma(torch.from_numpy(values))]
    assert found == pytest.approx([wanted[0], wanted[2]], rel=1e-5)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.2, 2.0, 5.0])
@pytest.mark.parametrize("n", [3, 42])
def test_the_p_value_is_scipy_s_far_into_the_tail(n: int, factor: float) -> None:
    others = scipy.stats.gamma.rvs(60, scale=0.15, size=n, random_state=np.random.default_rng(1))
    largest = factor * np.max(others)
    shape, _, scale = scipy.stats.gamma.fit(others, floc=0)
    beyond = scipy.stats.gamma.sf(largest, shape, scale=scale)
    p = p_value(torch.tensor(largest).double(), torch.from_numpy(others)).item()
    with np.errstate(divide="ignore"):  # the logarithm of 0 where all of the distribution is beyond
        assert p == pytest.approx(-np.expm1(n * np.log1p(-beyond)), rel=1e-3)
    assert p == pytest.approx(1 - (1 - beyond) ** n, abs=1e-6)


def test_a_tiny_p_value_is_not_rounded_to_0() -> None:
    others = torch.from_numpy(scipy.stats.gamma.rvs(60, scale=0.15, size=42, random_state=np.random.default_rng(1)))
    assert 0 < p_value(3 * others.max(), others) < 1e-16


def test_the_p_value_of_nearly_equal_statistics_is_a_number() -> None:
    others = torch.full((10,), 3.0).double()
    assert p_value(torch.tensor(3.0).double(), others).item() > 0.9
    assert p_value(torch.tensor(4.0).double(), others).item() < 1e-6


def test_clean_statistics_are_below_the_level_more_often_than_it_says() -> None:
    """The largest of 43 draws from a gamma distribution. The fit leaves it out, and so finds too narrow a one."""
    draws = scipy.stats.gamma.rvs(60, scale=0.15, size=(300, 43), random_state=np.random.default_rng(2))
    rows = torch.from_numpy(draws)
    found = [p_value(row.max(), null_statistics(row, int(row.argmax()))).item() for row in rows]
    assert 0.05 < np.mean(np.array(found) < 0.05) < 0.2


def test_classes_that_no_image_reaches_are_left_out_of_the_null() -> None:
    statistics = torch.tensor([1.0, -2.0, 5.0, 0.0, 2.0]).double()
    assert null_statistics(statistics, 2).tolist() == [1.0, 2.0]
    assert p_value(statistics[2], null_statistics(statistics[:4], 2)) == 1


# The climb


class Blocks(nn.Module):
    """The logit of class k is a weight times the sum of its own 4 pixels: the greatest margin is 4 weights."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : 4 * len(self.weights)].unflatten(1, (-1, 4)).sum(2) * self.weights


def suspected(model: nn.Module, n_classes: int, clean: ImageSet | None = None, seed: int = 0) -> Suspect:
    blank = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    lone = ImageSet(blank, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), n_classes, 4)
    return Suspect(model, clean or lone, n_classes, torch.Generator().manual_seed(seed))


def judged(weights: list[float], **settings: Any) -> Judged:
    quick = {"starts": 3, "steps": 80, "lr": 0.5, **settings}
    return MmBd(**quick).apply(suspected(Blocks(weights).eval(), len(weights)))


CLEAN = [0.9, 1.0, 1.05, 1.1, 1.0, 0.95, 1.02, 0.97]


def test_the_statistic_is_the_greatest_margin_of_any_image() -> None:
    found = judged(CLEAN)
    statistics = 4 * np.array(CLEAN)
    shape, _, scale = scipy.stats.gamma.fit(np.delete(statistics, 3), floc=0)
    wanted = 1 - scipy.stats.gamma.cdf(4.4, shape, scale=scale) ** 7
    assert found.report["largest margin"] == pytest.approx(4.4)
    assert found.report["second largest margin"] == pytest.approx(4.2)
    assert found.report["median margin"] == pytest.approx(np.sort(statistics)[3])
    assert found.report["p-value"] == pytest.approx(wanted, rel=1e-4)
    assert found.score == pytest.approx(1 - wanted, rel=1e-4)
    assert (found.threshold, found.suspected, found.layer) == (0.95, (3,), "")
    assert found.score < found.threshold
    assert found.by_class is not None
    torch.testing.assert_close(found.by_class, torch.tensor(statistics, dtype=torch.float32))


def test_a_class_with_an_unusual_margin_is_detected() -> None:
    found = judged([2.0 if k == 5 else weight for k, weight in enumerate(CLEAN)])
    assert found.suspected == (5,)
    assert found.score > found.threshold
    assert found.report["p-value"] < 1e-6


def test_an_unreachable_class_is_reported() -> None:
    with_none = judged([*CLEAN, -1.0])
    assert with_none.report["classes in the null"] == 7
    assert with_none.report["p-value"] == pytest.approx(judged(CLEAN).report["p-value"])


def climb(model: nn.Module, image: Tensor, label: int, settings: MmBd, stop: int) -> float:
    """One image by itself, with torch's optimiser, for so many passes; the margin at the last."""
    x, found = image[None].clone().requires_grad_(), 0.0
    optimiser = torch.optim.SGD([x], lr=settings.lr, momentum=settings.momentum)
    for _ in range(stop):
        logits = model(x)[0]
        rivals = torch.cat([logits[:label], logits[label + 1 :]])
        loss = rivals.max() - logits[label]
        found = -loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    return found


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_all_images_climb_as_each_would_by_itself(tiny_vit: Build, momentum: float) -> None:
    model, images = tiny_vit(n_classes=4), drawn(4, 2, 3, 16, 16)
    settings = MmBd(starts=2, steps=6, momentum=momentum, tolerance=0.0)
    found = ascend(model, images, torch.arange(4), settings)
    wanted = [[climb(model, image, label, settings, 6) for image in images[label]] for label in range(4)]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=1e-4)
    assert (found > ascend(model, images, torch.arange(4), MmBd(starts=2, steps=1))).all()


def test_a_class_stops_when_its_sum_hardly_changes(tiny_vit: Build) -> None:
    """Where each class should stop is read off the climbs of every length, without the rule."""
    model, images = tiny_vit(n_classes=4), drawn(4, 2, 3, 16, 16, seed=1)
    paths = torch.stack(
        [ascend(model, images, torch.arange(4), MmBd(starts=2, steps=s, tolerance=0.0)) for s in range(1, 13)]
    )
    total = paths.sum(2)
    change = (total[1:] - total[:-1]).abs() / total[:-1].abs()
    tolerance = float(change.sort(0).values[1].median())  # so that some classes stop early and at other steps
    ends = [next((s + 1 for s in range(11) if change[s, c] < tolerance), 11) for c in range(4)]
    assert len(set(ends)) > 1
    found = ascend(model, images, torch.arange(4), MmBd(starts=2, steps=12, tolerance=tolerance))
    torch.testing.assert_close(found, torch.stack([paths[ends[c], c] for c in range(4)]), atol=1e-4, rtol=1e-4)


def test_in_bf16_no_class_stops_by_a_tolerance_below_its_rounding(tiny_vit: Build) -> None:
    model, images, passes = tiny_vit(n_classes=4), drawn(4, 2, 3, 16, 16), []
    head: Any = model.body.head
    nn.init.zeros_(head.weight)  # no image changes a margin, so that the rule holds from the second pass on
    model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    for bf16, tolerance, wanted in [(False, 1e-5, 2), (True, 1e-5, 5), (True, 0.1, 2)]:
        passes.clear()
        with torch.autocast("cpu", torch.bfloat16, bf16):
            ascend(model, images, torch.arange(4), MmBd(starts=2, steps=5, tolerance=tolerance))
        assert passes == [8] * wanted


def test_images_stay_within_the_range() -> None:
    seen: list[Tensor] = []

    class Watched(Blocks):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.detach())
            return super().forward(images)

    MmBd(starts=2, steps=4, lr=5.0).apply(suspected(Watched(CLEAN).eval(), 8))
    assert len(seen) > 2
    assert min(x.min() for x in seen) == 0
    assert max(x.max() for x in seen) == 1


# The whole judgement


def quick(model: nn.Module, clean: ImageSet, seed: int = 0, **settings: Any) -> Judged:
    small = {"starts": 3, "steps": 5, **settings}
    return MmBd(**small).apply(suspected(model, 10, clean, seed))


def said(found: Judged) -> tuple[Any, ...]:
    by_class = None if found.by_class is None else found.by_class.tolist()
    return found.score, found.threshold, found.suspected, by_class, found.layer, dict(found.report)


def test_the_clean_set_tells_nothing_but_the_size(tiny_vit: Build, digits_world: World) -> None:
    model, clean = tiny_vit(), digits_world.clean
    whole = quick(model, clean)
    assert said(whole) == said(quick(model, clean.take(torch.arange(1))))
    assert said(whole) == said(quick(model, clean.take((clean.labels != 3).nonzero().squeeze(1))))
    assert 0 <= whole.score <= 1


def test_how_many_climb_together_does_not_matter(
    tiny_vit: Build, digits_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = quick(tiny_vit(), digits_world.clean)
    assert len(mm_bd.class_groups(10, 3 * 16**2)) == 1
    monkeypatch.setattr(mm_bd, "PIXELS_AT_ONCE", 7 * 16**2)
    assert [len(some) for some in mm_bd.class_groups(10, 3 * 16**2)] == [2] * 5
    apart = quick(tiny_vit(), digits_world.clean)
    assert apart.report == pytest.approx(together.report, rel=1e-3)


def test_the_start_is_drawn_from_the_defender_s_stream_alone(tiny_vit: Build, digits_world: World) -> None:
    before = torch.get_rng_state()
    first, again, other = (quick(tiny_vit(), digits_world.clean, seed) for seed in (0, 0, 1))
    assert said(first) == said(again)
    assert first.report["median margin"] != other.report["median margin"]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "setting", [{"starts": 6}, {"steps": 8}, {"lr": 0.1}, {"momentum": 0.9}, {"tolerance": 10.0}, {"level": 0.2}]
)
def test_every_setting_has_an_effect(tiny_vit: Build, digits_world: World, setting: dict[str, Any]) -> None:
    plain, changed = (quick(tiny_vit(), digits_world.clean, **s) for s in ({}, setting))
    assert said(plain) != said(changed)
    assert changed.threshold == (0.8 if "level" in setting else 0.95)


def test_the_model_stays_as_it_was(tiny_vit: Build, digits_world: World) -> None:
    model = tiny_vit()
    next(model.parameters()).requires_grad_(False)
    asking = [w.requires_grad for w in model.parameters()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        quietly = quick(model, digits_world.clean)
    assert said(quietly) == said(quick(model, digits_world.clean))
    assert [w.requires_grad for w in model.parameters()] == asking
    assert all(w.grad is None for w in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bf16_changes_little(tiny_vit: Build, digits_world: World) -> None:
    exact = quick(tiny_vit(), digits_world.clean)
    suspect = replace(suspected(tiny_vit(), 10, digits_world.clean), compute=Arithmetic("bf16"))
    found = MmBd(starts=3, steps=5).apply(suspect)
    assert found.score != exact.score
    assert found.report["median margin"] == pytest.approx(exact.report["median margin"], rel=0.1)


@pytest.mark.parametrize("n_classes", [1, 2])
def test_too_few_classes_are_refused(n_classes: int) -> None:
    with pytest.raises(UserError, match=f"with at least 2 others, and n_classes = {n_classes}"):
        MmBd(starts=1, steps=1).apply(suspected(Blocks([1.0] * n_classes).eval(), n_classes))


@pytest.mark.parametrize(
    "settings", [{"starts": 0}, {"steps": 0}, {"lr": 0.0}, {"momentum": 1.1}, {"tolerance": -1.0}, {"level": 1.0}]
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))} = "):
        MmBd(**settings)


def test_a_climb_to_where_the_model_gives_no_number_is_no_verdict() -> None:
    """Its logits are finite for black and white images, and for no others."""

    class Narrow(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            grey = (images * (1 - images)).sum((1, 2, 3))
            return torch.arange(4.0) * (1 + grey * 1e30 * 1e30)[:, None]

    with pytest.raises(UserError, match="mm_bd climbed to images whose logits are NaN or infinite; lower its lr"):
        MmBd(starts=2, steps=2).apply(suspected(Narrow().eval(), 4))


def test_it_is_found_by_its_name() -> None:
    assert get("mm_bd") is MmBd
    assert isinstance(MmBd(), Defence)
    assert (MmBd.kind, MmBd.needs_train, MmBd.needs_attention) == ("judgement", False, False)
