"""Activation clustering against scikit-learn: PCA, ICA, k-means and silhouettes; the filter with a planted cluster."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, FastICA
from sklearn.metrics import silhouette_samples
from torch import Tensor, nn

from vitrap.contracts import Defence, ImageSet, Suspect
from vitrap.data.sources import World
from vitrap.defences import activation_clustering, get
from vitrap.defences.activation_clustering import ActivationClustering, is_suspicious, reduced, silhouettes, two_means
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier

Build = Callable[..., Classifier]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def two_groups(n: int = 60, apart: float = 6.0) -> tuple[Tensor, Tensor]:
    """Points of five dimensions, a third of them elsewhere; and which."""
    elsewhere = torch.arange(n) % 3 == 0
    return drawn(n, 5) + apart * elsewhere[:, None], elsewhere


# Step 1


@pytest.mark.parametrize(("n", "dim", "kept"), [(50, 20, 10), (6, 20, 5), (50, 4, 4)])
def test_the_principal_components_are_scikit_learn_s(n: int, dim: int, kept: int) -> None:
    values = drawn(n, dim) * torch.linspace(3, 1, dim) + 7
    found = reduced(values, 10, "pca", generator())
    wanted = PCA(kept).fit_transform(values.numpy())
    np.testing.assert_allclose(found.abs().numpy(), np.abs(wanted), rtol=1e-6, atol=1e-9)


def test_the_independent_components_are_scikit_learn_s() -> None:
    sources = np.random.default_rng(0).laplace(size=(2000, 4))
    mixed = torch.from_numpy(sources @ drawn(4, 4).numpy())
    found = reduced(mixed, 4, "ica", generator()).numpy()
    wanted = FastICA(4, whiten="unit-variance", random_state=0).fit_transform(mixed.numpy())
    alike = np.abs(np.corrcoef(found.T, wanted.T)[:4, 4:])
    assert alike.max(1).min() > 0.999
    assert sorted(alike.argmax(1)) == [0, 1, 2, 3]
    np.testing.assert_allclose(np.cov(found.T, bias=True), np.eye(4), atol=1e-9)


# Step 2


def within(points: Tensor, second: Tensor) -> float:
    return sum(((some - some.mean(0)) ** 2).sum().item() for some in (points[second], points[~second]))


@pytest.mark.parametrize("apart", [0.0, 1.0, 6.0])
def test_the_split_is_as_good_as_scikit_learn_s(apart: float) -> None:
    points, elsewhere = two_groups(apart=apart)
    second = two_means(points, 20, generator())
    assert within(points, second) <= KMeans(2, n_init=20, random_state=0).fit(points.numpy()).inertia_ * 1.001
    if apart > 5:
        assert torch.equal(second, elsewhere) or torch.equal(~second, elsewhere)


def test_equal_points_are_one_cluster() -> None:
    assert two_means(torch.ones(5, 3).double(), 4, generator()).tolist() == [False] * 5


# Step 3


@pytest.mark.parametrize("apart", [0.0, 6.0])
def test_silhouettes_are_scikit_learn_s(apart: float, monkeypatch: pytest.MonkeyPatch) -> None:
    points, elsewhere = two_groups(apart=apart)
    monkeypatch.setattr(activation_clustering, "ROWS", 7)
    found = silhouettes(points, elsewhere)
    np.testing.assert_allclose(found.numpy(), silhouette_samples(points.numpy(), elsewhere.numpy()), rtol=1e-5)


def test_silhouettes_by_hand() -> None:
    """Points at 0 and 1, and one alone at 10: (10 - 1) / 10, (9 - 1) / 9, and 0."""
    points = torch.tensor([[0.0], [1.0], [10.0]]).double()
    assert silhouettes(points, torch.tensor([False, False, True])).tolist() == pytest.approx([0.9, 8 / 9, 0])
    assert silhouettes(points, torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0, 0]


# Step 4


@pytest.mark.parametrize(
    ("analysis", "share", "silhouette", "wanted"),
    [
        ("smaller", 0.5, -0.2, True),
        ("relative-size", 0.34, 0.0, True),
        ("relative-size", 0.36, 0.9, False),
        ("silhouette", 0.34, 0.11, True),
        ("silhouette", 0.34, 0.09, False),
        ("silhouette", 0.36, 0.9, False),
    ],
)
def test_when_a_cluster_is_suspicious(analysis: Any, share: float, silhouette: float, wanted: bool) -> None:
    assert is_suspicious(ActivationClustering(analysis=analysis), share, silhouette) is wanted


# The whole filter, with features that are the pixels


def image_set(pixels: Tensor, labels: list[int], n_classes: int) -> ImageSet:
    n = len(labels)
    return ImageSet(pixels.to(torch.uint8), torch.tensor(labels), torch.arange(n), n_classes, 2)


def planted(n: int = 100, poisoned: int = 20) -> tuple[ImageSet, Tensor]:
    """Two classes of noise; the last images of the second have a bright corner."""
    pixels = torch.randint(40, 80, (2 * n, 1, 2, 2), generator=generator())
    pixels[2 * n - poisoned :, :, 1, 1] = 250
    return image_set(pixels, [0] * n + [1] * n, 2), torch.arange(2 * n) >= 2 * n - poisoned


def suspected(train: ImageSet | None, model: nn.Module | None = None, clean: ImageSet | None = None) -> Suspect:
    n_classes = 2 if train is None else train.n_classes
    with torch.random.fork_rng(devices=[]):
        pixels_model = nn.Sequential(nn.Flatten(), nn.Linear(4, n_classes)).eval()
    shown = clean or image_set(torch.zeros(1, 1, 2, 2), [0], n_classes)
    return Suspect(model or pixels_model, shown, n_classes, generator(), train)


@pytest.mark.parametrize("settings", [{}, {"reduce": "ica", "silhouette": 0.05}, {"dimensions": 2}])
def test_a_planted_cluster_is_flagged_and_nothing_else(settings: dict[str, Any]) -> None:
    train, poisoned = planted()
    # a class of even noise falls apart a little, along some pixel
    found = ActivationClustering(**{"silhouette": 0.4, **settings}).apply(suspected(train))
    assert torch.equal(found.flagged & (train.labels == 1), poisoned)
    if "reduce" not in settings:
        assert torch.equal(found.flagged, poisoned)
        assert found.score[poisoned].min() > found.score[~poisoned].max()
        assert found.report["flagged"] == 20
    assert found.layer == "1"
    assert found.score.dtype == torch.float32


def test_most_of_a_class_is_never_flagged_for_its_size() -> None:
    train, _ = planted(poisoned=45)
    assert not ActivationClustering().apply(suspected(train)).flagged.any()
    smaller = ActivationClustering(analysis="smaller").apply(suspected(train)).flagged
    assert 0 < smaller[:100].sum() <= 50
    assert smaller[100:].tolist() == [False] * 55 + [True] * 45


def test_a_class_of_one_image_is_never_flagged() -> None:
    pixels = torch.randint(0, 255, (21, 1, 2, 2), generator=generator())
    found = ActivationClustering(analysis="smaller").apply(suspected(image_set(pixels, [0] * 20 + [3], 6)))
    assert (found.score[20], found.flagged[20]) == (0, False)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_vit_is_read_at_its_head(tiny_vit: Build, digits_world: World, pool: str) -> None:
    model, train = tiny_vit(global_pool=pool), digits_world.train.take(torch.arange(120))
    found = ActivationClustering(analysis="smaller").apply(suspected(train, model, digits_world.clean))
    assert found.layer == "body.head"
    assert found.score.abs().max() <= 3
    assert found.score[found.flagged].min() >= found.score[~found.flagged].max()
    assert 0 < found.flagged.float().mean() < 0.5


def test_a_missing_training_set_is_refused() -> None:
    with pytest.raises(UserError, match="activation_clustering filters a training set, and train = None"):
        ActivationClustering().apply(suspected(None))


@pytest.mark.parametrize("settings", [{"dimensions": 0}, {"size": 1.1}, {"silhouette": -2.0}, {"starts": 0}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))} = "):
        ActivationClustering(**settings)


def test_it_is_found_by_its_name() -> None:
    assert get("activation_clustering") is ActivationClustering
    assert isinstance(ActivationClustering(), Defence)
