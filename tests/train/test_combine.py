"""Combining loss terms: against sums and derivatives worked out by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from vitrap.contracts import Combine, Objective
from vitrap.train.combine import Combination
from vitrap.train.loop import cross_entropy


def combination(weight: nn.Parameter, combine: Combine, **weights: float) -> Combination:
    return Combination(Objective(cross_entropy, weights, combine), [weight], torch.Generator().manual_seed(0))


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(2))


def line(weight: Tensor, *slope: float) -> Tensor:
    """A loss of value 2 with this gradient."""
    return 2 + weight @ torch.tensor(slope, dtype=torch.float32)


def test_fixed_weights_add_up() -> None:
    w = parameter()
    combination(w, "fixed", extra=0.5).backward({"own": line(w, 1, 2), "extra": line(w, 4, -2)})
    assert w.grad is not None
    assert w.grad.tolist() == [3, 1]


def test_learned_weights_start_at_the_fixed_ones_and_have_a_slope_of_their_own() -> None:
    """d/ds of exp(-s) w L + s at s = 0 is 1 - w L."""
    w = parameter()
    own = combination(w, "learned", extra=0.5, absent=3.0)
    own.backward({"own": line(w, 1, 2), "extra": line(w, 4, -2)})
    assert w.grad is not None
    assert w.grad.tolist() == [3, 1]
    extra, absent = own.scales
    assert extra.grad is not None
    assert extra.grad.item() == 1 - 0.5 * 2
    assert absent.grad is None
    assert own.learned() == {"weight of extra": 1, "weight of absent": 1}


def test_a_learned_weight_settles_at_one_over_its_loss() -> None:
    """exp(-s) L + s is least at s = ln L, where the weight is 1 / L: it neither grows without end nor changes sign."""
    w = parameter()
    own = combination(w, "learned", extra=1.0)
    optimiser = torch.optim.SGD(own.scales, lr=0.5)
    for _ in range(200):
        optimiser.zero_grad()
        own.backward({"extra": line(w, 0, 0) * 4})
        optimiser.step()
    assert own.learned()["weight of extra"] == pytest.approx(1 / 8, rel=1e-4)
    assert own.scales[0].item() == pytest.approx(math.log(8), rel=1e-4)


def test_projected_gradients_lose_their_conflict() -> None:
    """(1, 0) and (-1, 1): each loses its part against the other, (1/2, 1/2) and (0, 1)."""
    w = parameter()
    combination(w, "projected", extra=2.0).backward({"own": line(w, 1, 0), "extra": line(w, -0.5, 0.5)})
    assert w.grad is not None
    assert torch.allclose(w.grad, torch.tensor([0.5, 1.5]))


def test_projected_gradients_that_agree_add_up_and_one_alone_stays() -> None:
    w = parameter()
    combination(w, "projected").backward({"own": line(w, 1, 0), "extra": line(w, 1, 1)})
    assert w.grad is not None
    assert w.grad.tolist() == [2, 1]
    w.grad = None
    combination(w, "projected").backward({"own": line(w, 1, 3)})
    assert w.grad is not None
    assert w.grad.tolist() == [1, 3]


def test_the_order_in_which_three_gradients_meet_is_drawn() -> None:
    """The gradients of tests/tensors/test_projection.py, whose sum depends on the order."""
    found = set()
    for seed in range(8):
        w = parameter()
        own = Combination(Objective(cross_entropy, combine="projected"), [w], torch.Generator().manual_seed(seed))
        own.backward({"a": line(w, 1, 0), "b": line(w, -1, 1), "c": line(w, 0, -1)})
        assert w.grad is not None
        found.add(tuple(w.grad.tolist()))
    assert len(found) > 1


def test_frozen_and_unused_parameters_are_passed_over() -> None:
    w, frozen, unused = parameter(), nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(4))
    own = Combination(
        Objective(cross_entropy, combine="projected"), [frozen, w, unused], torch.Generator().manual_seed(0)
    )
    own.backward({"own": line(w, 1, 0), "extra": line(w, 1, 1)})
    assert frozen.grad is None
    assert unused.grad is not None
    assert unused.grad.tolist() == [0, 0, 0, 0]
