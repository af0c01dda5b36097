"""SPECTRE against numpy, scipy and scikit-learn: whitening, the widest form, quantum entropy; then with a poison."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.covariance import EmpiricalCovariance, MinCovDet
from sklearn.decomposition import PCA
from torch import Tensor, nn

from vitrap.contracts import Defence, ImageSet, Suspect
from vitrap.data.sources import World
from vitrap.defences import get
from vitrap.defences.spectre import (
    Spectre,
    best_filter,
    candidates,
    covariance,
    inverse_root,
    likely_clean,
    principal_components,
    quantum_scores,
    whitened,
    widest_form,
)
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.train.arithmetic import Arithmetic

Build = Callable[..., Classifier]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_outliers(n: int = 300, outliers: int = 20, dim: int = 6) -> tuple[Tensor, Tensor]:
    """Points of unequal spread, of which the last lie 30 standard deviations out along the narrowest axis."""
    spread = torch.linspace(3, 0.2, dim, dtype=torch.float64)
    points = drawn(n, dim) * spread
    points[n - outliers :, -1] += 30 * spread[-1]
    return points - points.mean(0), torch.arange(n) >= n - outliers


# The steps


@pytest.mark.parametrize(("n", "dim", "most"), [(40, 10, 4), (8, 30, 4), (40, 3, 20)])
def test_the_principal_components_are_scikit_learn_s(n: int, dim: int, most: int) -> None:
    values = drawn(n, dim) * torch.linspace(3, 1, dim) + 7
    wanted = PCA(min(most, dim)).fit_transform(values.numpy())
    np.testing.assert_allclose(principal_components(values, most).abs().numpy(), np.abs(wanted), rtol=1e-6, atol=1e-9)


def test_covariances_are_scikit_learn_s() -> None:
    points = drawn(30, 4) + 5
    np.testing.assert_allclose(covariance(points).numpy(), EmpiricalCovariance().fit(points.numpy()).covariance_)


def test_the_inverse_root_is_scipy_s_and_leaves_out_what_is_not_there() -> None:
    matrix = covariance(drawn(30, 5))
    np.testing.assert_allclose(inverse_root(matrix).numpy(), np.linalg.inv(scipy.linalg.sqrtm(matrix.numpy())))
    flat = torch.diag(torch.tensor([4.0, 0.0]).double())
    assert inverse_root(flat).tolist() == [[0.5, 0], [0, 0]]
    assert inverse_root(torch.zeros(2, 2).double()).tolist() == [[0, 0], [0, 0]]


def test_whitening_makes_the_covariance_of_the_clean_the_identity() -> None:
    points, outlier = with_outliers()
    np.testing.assert_allclose(covariance(whitened(points, ~outlier)[~outlier]).numpy(), np.eye(6), atol=1e-9)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_the_widest_form_is_numpy_s_eigenvector(dim: int) -> None:
    white = drawn(200, dim) * (1 + drawn(200, 1).abs())
    variance, form = widest_form(white)
    x = white.numpy()
    products = np.einsum("ni,nj->nij", x, x).reshape(len(x), -1)
    values, vectors = np.linalg.eigh(np.cov(products, rowvar=False, bias=True).reshape(dim**2, dim**2))
    assert variance.item() == pytest.approx(values[-1], rel=1e-3)
    assert abs(form.flatten().numpy() @ vectors[:, -1]) == pytest.approx(1, abs=1e-2)


def test_the_covariance_of_the_likely_clean_is_as_good_as_scikit_learn_s_robust_one() -> None:
    points, outlier = with_outliers()
    kept = likely_clean(points, 20 / 300, 0.1, 40)
    assert not kept[outlier].any()
    assert kept.sum() >= 260
    truth, plain = covariance(points[~outlier]), covariance(points)
    robust = torch.from_numpy(MinCovDet(random_state=0).fit(points.numpy()).covariance_)
    error = (covariance(points[kept]) - truth).norm()
    assert error <= (robust - truth).norm()
    assert error < (plain - truth).norm() / 3


def test_no_more_are_dropped_than_the_budget_and_none_of_a_gaussian() -> None:
    points, _ = with_outliers()
    assert likely_clean(points, 20 / 300, 0.1, 7).sum() == 293
    assert likely_clean(points, 20 / 300, 0.1, 0).all()
    assert likely_clean(drawn(300, 6), 0.1, 0.1, 60).all()


@pytest.mark.parametrize("alpha", [0.0, 1.0, 4.0])
def test_quantum_scores_are_those_of_scipy_s_matrix_exponential(alpha: float) -> None:
    points, outlier = with_outliers()
    white = whitened(points, ~outlier)
    x = white.numpy()
    s = np.cov(x, rowvar=False, bias=True)
    m = scipy.linalg.expm(alpha * (s - np.eye(6)) / (np.linalg.norm(s, 2) - 1))
    wanted = np.einsum("ni,ij,nj->n", x, m / np.trace(m), x)
    np.testing.assert_allclose(quantum_scores(white, alpha).numpy(), wanted, rtol=1e-6)
    if alpha > 1:  # what others' ports do: the exponential of each element is another matrix
        each = np.exp(alpha * (s - np.eye(6)) / (np.linalg.norm(s, 2) - 1))
        assert np.abs(each / np.trace(each) - m / np.trace(m)).max() > 0.03


def test_where_the_clean_explain_all_every_direction_weighs_the_same() -> None:
    white = whitened(drawn(50, 4), torch.ones(50, dtype=torch.bool))
    np.testing.assert_allclose(quantum_scores(white, 4.0).numpy(), white.square().mean(1).numpy(), rtol=1e-4)


def test_one_component_is_a_spectral_signature() -> None:
    values = drawn(40, 5)
    components = principal_components(values, 1)
    _, flagged, _ = best_filter(Spectre(), components)
    centred = values - values.mean(0)
    signature = (centred @ torch.linalg.svd(centred).Vh[0]).square()
    assert torch.equal(flagged, torch.zeros(40, dtype=torch.bool).index_fill(0, signature.topk(6).indices, True))


@pytest.mark.parametrize("most", [1, 2, 30, 100])
def test_candidates_are_squares_up_to_the_most(most: int) -> None:
    found = candidates(most)
    assert found == sorted({round(float(x) ** 2) for x in np.linspace(1, most**0.5, 10)})
    assert found[-1] == most


def test_outliers_that_spectral_signatures_overlook_are_flagged() -> None:
    points, outlier = with_outliers()
    scores, flagged, _ = best_filter(Spectre(epsilon=20 / 300, factor=1.0), principal_components(points, 100))
    assert torch.equal(flagged, outlier)
    assert scores[outlier].min() > scores[~outlier].max()
    signature = principal_components(points, 1)[:, 0].square()
    assert (signature[outlier] > signature[~outlier].median()).double().mean() < 0.7


# The whole filter, with features that are the pixels


def image_set(pixels: Tensor, labels: list[int], n_classes: int) -> ImageSet:
    n = len(labels)
    return ImageSet(pixels.to(torch.uint8), torch.tensor(labels), torch.arange(n), n_classes, 2)


def suspected(train: ImageSet | None, model: nn.Module | None = None, clean: ImageSet | None = None) -> Suspect:
    n_classes = 6 if train is None else train.n_classes
    with torch.random.fork_rng(devices=[]):
        pixels_model = nn.Sequential(nn.Flatten(), nn.Linear(4, n_classes)).eval()
    shown = clean or image_set(torch.zeros(1, 1, 2, 2), [0], n_classes)
    return Suspect(model or pixels_model, shown, n_classes, torch.Generator().manual_seed(0), train)


def planted() -> tuple[ImageSet, Tensor]:
    """Two classes of noise, wide in one pixel; some images of the second have another pixel a little brighter."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(60, 70, (300, 1, 2, 2), generator=generator)
    pixels[:, :, 0, 0] = torch.randint(0, 255, (300, 1), generator=generator)
    pixels[285:, :, 1, 1] += 40
    order = torch.randperm(300, generator=generator)
    labels = torch.tensor([0] * 150 + [1] * 150)[order]
    return image_set(pixels[order], labels.tolist(), 2), order >= 285


def test_a_planted_poison_is_what_is_flagged_in_its_class() -> None:
    train, poisoned = planted()
    found = Spectre(epsilon=0.1, factor=1.0).apply(suspected(train))
    assert torch.equal(found.flagged & (train.labels == 1), poisoned)
    assert found.score[poisoned].min() > found.score[~poisoned].max()
    assert int(found.flagged.sum()) == 30
    assert found.report["class with the greatest score"] == 1
    assert found.report["greatest score of a class"] > 1.5 * found.report["median score of a class"]
    assert found.layer == "1"
    assert found.score.dtype == torch.float32
    assert torch.equal(Spectre(epsilon=0.1, factor=1.0, classes="highest").apply(suspected(train)).flagged, poisoned)


def test_how_many_are_flagged() -> None:
    labels = [0] * 10 + [1] * 30 + [4]
    train = image_set(torch.randint(0, 255, (41, 1, 2, 2), generator=torch.Generator().manual_seed(0)), labels, 6)
    found = Spectre().apply(suspected(train))
    assert [int(found.flagged[train.labels == label].sum()) for label in (0, 1, 4)] == [2, 5, 0]
    assert found.score[40] == 0


def test_equal_images_and_few_images_have_scores() -> None:
    for labels in ([0] * 10, [0] * 2 + [1] * 3):
        train = image_set(torch.full((len(labels), 1, 2, 2), 9), labels, 6)
        assert Spectre(epsilon=0.33).apply(suspected(train)).score.isfinite().all()


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_vit_is_read_at_its_head_and_stays_as_it_was(tiny_vit: Build, digits_world: World, pool: str) -> None:
    model, train = tiny_vit(global_pool=pool), digits_world.train.take(torch.arange(120))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    suspect = replace(suspected(train, model, digits_world.clean), compute=Arithmetic("bf16"))
    drawn_before = suspect.generator.get_state()
    found = Spectre().apply(suspect)
    assert found.layer == "body.head"
    assert found.score.isfinite().all()
    assert torch.equal(suspect.generator.get_state(), drawn_before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_missing_training_set_is_refused() -> None:
    with pytest.raises(UserError, match="spectre filters a training set, and train = None"):
        Spectre().apply(suspected(None))


@pytest.mark.parametrize("settings", [{"epsilon": 0.0}, {"epsilon": 0.4}, {"tau": 1.0}, {"factor": 0.0}, {"drop": 3.0}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))} = "):
        Spectre(**settings)


def test_it_is_found_by_its_name() -> None:
    assert get("spectre") is Spectre
    assert isinstance(Spectre(), Defence)
