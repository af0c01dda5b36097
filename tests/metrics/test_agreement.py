"""Agreement of masks and maps, by hand and against scipy and scikit-learn."""

import torch
from scipy.stats import spearmanr
from sklearn.metrics import jaccard_score

from vitrap.metrics.agreement import overlap, rank_correlation


def test_overlap_by_hand_and_against_scikit_learn() -> None:
    ours = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]]]).bool()
    theirs = torch.tensor([[[1, 0], [1, 0]], [[0, 0], [0, 0]]]).bool()
    assert torch.allclose(overlap(ours, theirs), torch.tensor([1 / 3, 1.0]))
    one, other = (torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(i)) < 0.4 for i in (0, 1))
    wanted = [jaccard_score(a.flatten(), b.flatten()) for a, b in zip(one, other, strict=True)]
    assert torch.allclose(overlap(one, other), torch.tensor(wanted).float())


def test_masks_at_random_overlap_as_their_docstring_says() -> None:
    one, other = (torch.rand(50, 64, 64, generator=torch.Generator().manual_seed(i)) < 0.5 for i in (0, 1))
    assert abs(overlap(one, other).mean() - 1 / 3) < 0.01


def test_rank_correlation_against_scipy_with_ties() -> None:
    one, other = (torch.randint(0, 4, (3, 5, 5), generator=torch.Generator().manual_seed(i)).float() for i in (0, 1))
    wanted = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(one, other, strict=True)]
    assert torch.allclose(rank_correlation(one, other), torch.tensor(wanted).float(), atol=1e-6)
    assert torch.allclose(rank_correlation(one, one.exp()), torch.ones(3))
    assert torch.allclose(rank_correlation(one, -one), -torch.ones(3))
