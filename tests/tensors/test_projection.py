"""PCGrad against conflicts worked out by hand and a plain-list version of the paper's algorithm."""

import pytest
import torch

from vitrap.tensors.projection import project_conflicts


def test_two_that_conflict_by_hand() -> None:
    """(2, 0) . (-1, 1) = -2: (2, 0) + 2/2 (-1, 1) = (1, 1), and (-1, 1) + 2/4 (2, 0) = (0, 1)."""
    found = project_conflicts(torch.tensor([[2.0, 0.0], [-1.0, 1.0]]))
    assert found.tolist() == [1, 2]


def test_the_order_counts_where_three_conflict() -> None:
    """By hand: a = (1, 0) meets b = (-1, 1), giving (1/2, 1/2), then c = (0, -1), giving (1/2, 0); or c first, which
    a is square to, then b, giving (1/2, 1/2)."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]])
    # b = (-1, 1) meets a: (0, 1), then c: (0, 0); c = (0, -1) meets a: stays, then b: (-1/2, -1/2)
    one = project_conflicts(rows, torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2]]))
    two = project_conflicts(rows, torch.tensor([[0, 2, 1], [0, 1, 2], [0, 1, 2]]))
    assert one.tolist() == [0, -0.5]
    assert two.tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_sum_where_all_agree(seed: int) -> None:
    rows = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(project_conflicts(rows), rows.sum(0))


@pytest.mark.parametrize("seed", range(5))
def test_against_plain_lists(seed: int) -> None:
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = [0.0] * 5
    for i in range(4):
        g = rows[i].tolist()
        for j in range(4):
            other = rows[j].tolist()
            product = sum(x * y for x, y in zip(g, other, strict=True))
            if j != i and product < 0:
                g = [x - product / sum(y * y for y in other) * y for x, y in zip(g, other, strict=True)]
        wanted = [x + y for x, y in zip(wanted, g, strict=True)]
    assert torch.allclose(project_conflicts(rows), torch.tensor(wanted, dtype=torch.float64))


def test_a_gradient_of_zero_conflicts_with_none() -> None:
    assert project_conflicts(torch.tensor([[0.0, 0.0], [1.0, -2.0]])).tolist() == [1, -2]
