"""Spectral signatures against numpy's SVD, class by class, and with a poison planted where all can be counted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from vitrap.contracts import Defence, ImageSet, Suspect
from vitrap.data.sources import World
from vitrap.defences import get, spectral
from vitrap.defences.spectral import Spectral, flag_count, highest, outlier_scores, ranks
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.train.arithmetic import Arithmetic

Build = Callable[..., Classifier]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numpy_scores(features: Tensor) -> np.ndarray:
    """By the eigenvectors of numpy's covariance, so that neither SVD nor centring is the defence's own."""
    x = features.double().numpy()
    _, vectors = np.linalg.eigh(np.cov(x, rowvar=False))
    return ((x - x.mean(0)) @ vectors[:, -1]) ** 2


# The score


@pytest.mark.parametrize(("n", "dim"), [(40, 5), (5, 40), (2, 8), (300, 192)])
def test_scores_are_squared_projections_on_the_first_singular_vector(n: int, dim: int) -> None:
    features = drawn(n, dim) * torch.linspace(3, 1, dim) + 7
    scores = outlier_scores(features)
    x = features.double().numpy()
    _, _, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(scores.numpy(), ((x - x.mean(0)) @ v[0]) ** 2, rtol=1e-8, atol=1e-12)
    if n > 2:
        np.testing.assert_allclose(scores.numpy(), numpy_scores(features), rtol=1e-6, atol=1e-9)
    assert scores.dtype == torch.float64


def test_scores_by_hand() -> None:
    """Four points on a line of direction (3, 4) / 5 at -3, -1, 1 and 3, and the mean anywhere."""
    along = torch.tensor([-3.0, -1.0, 1.0, 3.0])
    features = torch.tensor([10.0, -2.0]) + along[:, None] * torch.tensor([0.6, 0.8])
    assert outlier_scores(features).tolist() == pytest.approx([9, 1, 1, 9], rel=1e-5)


def test_the_sign_of_the_vector_does_not_matter() -> None:
    features = drawn(20, 6)
    torch.testing.assert_close(outlier_scores(features), outlier_scores(-features))


def test_equal_features_have_score_0() -> None:
    assert outlier_scores(torch.full((5, 3), 0.1)).tolist() == pytest.approx([0] * 5, abs=1e-20)


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0, 2.0, 0.0], [1.0, 1.0], [5.0, 4.0, 3.0]])
def test_ranks_are_scipy_s_over_the_others(values: list[float]) -> None:
    wanted = (scipy.stats.rankdata(values) - 1) / (len(values) - 1)
    assert ranks(torch.tensor(values).double()).tolist() == pytest.approx(wanted.tolist())


def test_none_and_all_can_be_highest() -> None:
    scores = drawn(4).double()
    assert highest(scores, 0).tolist() == [False] * 4
    assert highest(scores, 4).tolist() == [True] * 4


# The whole filter, with features that are the pixels


def pixels_model(n_classes: int) -> nn.Module:
    """Its head reads the pixels: 2 x 2, grey."""
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(nn.Flatten(), nn.Linear(4, n_classes)).eval()


def image_set(pixels: Tensor, labels: list[int], n_classes: int) -> ImageSet:
    n = len(labels)
    return ImageSet(pixels.to(torch.uint8), torch.tensor(labels), torch.arange(n), n_classes, 2)


def suspected(train: ImageSet | None, model: nn.Module | None = None, clean: ImageSet | None = None) -> Suspect:
    n_classes = 6 if train is None else train.n_classes
    shown = clean or image_set(torch.zeros(1, 1, 2, 2), [0], n_classes)
    return Suspect(model or pixels_model(n_classes), shown, n_classes, torch.Generator().manual_seed(0), train)


def planted(clean: int = 90, poisoned: int = 10) -> tuple[ImageSet, Tensor]:
    """Two classes of noise; the second also has images with a bright corner. In a mixed order."""
    n = 100 + clean + poisoned
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(40, 80, (n, 1, 2, 2), generator=generator)
    pixels[100 + clean :, :, 1, 1] = 250
    order = torch.randperm(n, generator=generator)
    labels = torch.tensor([0] * 100 + [1] * (clean + poisoned))[order]
    return image_set(pixels[order], labels.tolist(), 2), order >= 100 + clean


def test_a_planted_poison_is_what_is_flagged_in_its_class() -> None:
    train, poisoned = planted()
    found = Spectral(epsilon=0.1, factor=1.0).apply(suspected(train))
    assert torch.equal(found.flagged & (train.labels == 1), poisoned)
    assert int((found.flagged & (train.labels == 0)).sum()) == 10
    assert found.score[poisoned].min() > found.score[~poisoned].max()
    assert found.report == {"flagged": 20, "share flagged": 0.1}
    assert found.layer == "1"
    assert found.score.dtype == torch.float32


def test_where_the_poisoned_are_most_of_the_class_the_clean_are_flagged() -> None:
    train, poisoned = planted(10, 90)
    found = Spectral().apply(suspected(train))
    of_class = train.labels == 1
    assert found.score[of_class & ~poisoned].min() > found.score[poisoned].max()
    assert found.flagged[of_class & ~poisoned].all()


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, [1, 4, 0]),  # 15 % of 10, 30 and 4
        ({"epsilon": 0.2}, [3, 9, 1]),
        ({"factor": 1.0}, [1, 3, 0]),
        ({"epsilon": 0.9}, [10, 30, 4]),  # no more than there are
        ({"epsilon": 0.1, "share_of": "set"}, [5, 6, 2]),  # 15 % of 44, but half of each class
        ({"epsilon": 0.05, "share_of": "set"}, [3, 3, 2]),
        ({"epsilon": 0.29, "factor": 1.0}, [2, 8, 1]),
    ],
)
def test_how_many_of_each_class_are_flagged(settings: dict[str, Any], counts: list[int]) -> None:
    labels = [0] * 10 + [1] * 30 + [4] * 4
    train = image_set(torch.randint(0, 255, (44, 1, 2, 2), generator=torch.Generator().manual_seed(0)), labels, 6)
    found = Spectral(**settings).apply(suspected(train))
    assert [int(found.flagged[train.labels == label].sum()) for label in (0, 1, 4)] == counts
    for label in (0, 1, 4):
        rows = train.labels == label
        if 0 < found.flagged[rows].sum() < rows.sum():
            assert found.score[rows & found.flagged].min() >= found.score[rows & ~found.flagged].max()


def test_a_share_that_is_a_whole_number_but_for_rounding_is_that_number() -> None:
    assert 0.29 * 100 < 29
    assert flag_count(Spectral(epsilon=0.29, factor=1.0), 100, 100) == 29


def test_a_class_of_one_image_is_never_flagged() -> None:
    labels = [0] * 20 + [3]
    train = image_set(torch.randint(0, 255, (21, 1, 2, 2), generator=torch.Generator().manual_seed(0)), labels, 6)
    for settings in (Spectral(epsilon=0.9), Spectral(epsilon=0.9, share_of="set"), Spectral(score="rank")):
        found = settings.apply(suspected(train))
        assert found.score[20] == 0
        assert not found.flagged[20]


def test_of_a_lone_image_nothing_can_be_said() -> None:
    lone = Spectral().apply(suspected(image_set(torch.zeros(1, 1, 2, 2), [5], 6)))
    assert (lone.score.tolist(), lone.flagged.tolist()) == ([0.0], [False])


def test_a_rank_orders_each_class_as_the_projection_does_on_one_scale() -> None:
    train, poisoned = planted()
    plain, ranked = Spectral().apply(suspected(train)), Spectral(score="rank").apply(suspected(train))
    assert torch.equal(plain.flagged, ranked.flagged)
    for label in (0, 1):
        rows = train.labels == label
        assert torch.equal(plain.score[rows].argsort(), ranked.score[rows].argsort())
        assert ranked.score[rows].min() == 0
        assert ranked.score[rows].max() == 1
    assert plain.score[train.labels == 0].max() < plain.score[poisoned].min()
    assert ranked.score[train.labels == 0].max() > ranked.score[poisoned].min()


# With a ViT


@pytest.mark.parametrize("pool", ["token", "avg"])
@torch.no_grad()
def test_a_vit_is_read_at_its_head(
    tiny_vit: Build, digits_world: World, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, train = tiny_vit(global_pool=pool), digits_world.train.take(torch.arange(120))
    found = Spectral().apply(suspected(train, model, digits_world.clean))
    body: Any = model.body
    tokens = body.forward_features((train.images(torch.arange(120)) - model.mean) / model.std)
    seen = tokens[:, 0] if pool == "token" else body.fc_norm(tokens[:, 1:].mean(1))
    for label in range(10):
        rows = train.labels == label
        np.testing.assert_allclose(found.score[rows].numpy(), numpy_scores(seen[rows]), rtol=1e-3, atol=1e-5)
        assert found.flagged[rows].sum() == int(0.15 * int(rows.sum()))
    assert found.layer == "body.head"
    monkeypatch.setattr(spectral, "BATCH", 7)
    batched = Spectral().apply(suspected(train, model, digits_world.clean))
    torch.testing.assert_close(batched.score, found.score, atol=1e-5, rtol=1e-3)
    assert torch.equal(batched.flagged, found.flagged)


def test_a_vit_stays_as_it_was_and_nothing_is_drawn(tiny_vit: Build, digits_world: World) -> None:
    model, train = tiny_vit(), digits_world.train.take(torch.arange(60))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    suspect = replace(suspected(train, model, digits_world.clean.take(torch.arange(1))), compute=Arithmetic("bf16"))
    drawn_before = suspect.generator.get_state()
    found = Spectral().apply(suspect)
    assert found.score.dtype == torch.float32
    assert torch.equal(suspect.generator.get_state(), drawn_before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(w.requires_grad and w.grad is None for w in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    exact = Spectral().apply(suspected(train, model, digits_world.clean))
    assert not torch.equal(found.score, exact.score)
    torch.testing.assert_close(found.score, exact.score, atol=0.3, rtol=0.3)


# Refusals


def test_a_missing_training_set_is_refused() -> None:
    with pytest.raises(UserError, match="spectral filters a training set, and train = None"):
        Spectral().apply(suspected(None))


@pytest.mark.parametrize(
    "settings", [{"epsilon": 0.0}, {"epsilon": 1.0}, {"factor": 0.0}, {"share_of": "batch"}, {"score": "sum"}]
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises((UserError, TypeError), match=f"{next(iter(settings))}"):
        Spectral(**settings)


def test_it_is_found_by_its_name() -> None:
    assert get("spectral") is Spectral
    assert isinstance(Spectral(), Defence)
    assert (Spectral.kind, Spectral.needs_train, Spectral.needs_attention) == ("filter", True, False)
