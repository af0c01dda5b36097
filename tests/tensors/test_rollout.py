"""Attention rollout by hand and against numpy, and its gradient against finite differences."""

import numpy as np
import torch

from vitrap.tensors.rollout import rollout, weighted_heads


def attention(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


def test_two_layers_by_hand() -> None:
    """(A + I) / 2 is [[.75, .25], [0, 1]] and [[.5, .5], [.5, .5]]; the second layer stands left."""
    one, two = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    assert rollout([one, two])[0].tolist() == [[0.375, 0.625], [0.375, 0.625]]


def test_against_numpy() -> None:
    layers = [attention(seed, 3, 5, 5) for seed in range(4)]
    wanted = np.stack([np.eye(5)] * 3)
    for layer in layers:
        mixed = layer.numpy() + np.eye(5)
        wanted = mixed / mixed.sum(-1, keepdims=True) @ wanted
    assert np.allclose(rollout(layers).numpy(), wanted)


def test_rows_sum_to_one_and_the_residual_leaves_a_floor() -> None:
    found = rollout([attention(seed, 2, 6, 6) for seed in range(3)])
    assert torch.allclose(found.sum(-1), torch.ones(2, 6, dtype=torch.float64))
    assert (found.diagonal(dim1=1, dim2=2) >= 2**-3).all()


def test_heads_weighted_by_gradient_by_hand() -> None:
    """Two heads, entry by entry: means of products, negative ones to 0, then the lowest half to 0."""
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    slope = torch.tensor([[[[1.0, -1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]]])
    assert weighted_heads(maps, slope, 0.0)[0].tolist() == [[1.0, 0.0], [1.5, 3.0]]
    assert weighted_heads(maps, slope, 0.5)[0].tolist() == [[0.0, 0.0], [1.5, 3.0]]


def test_gradients_against_finite_differences() -> None:
    first, second = attention(0, 2, 2, 4, 4), attention(1, 2, 2, 4, 4)
    slope = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def through(x: torch.Tensor) -> torch.Tensor:
        return rollout([weighted_heads(x, slope, 0.25), second.mean(1)])

    assert torch.autograd.gradcheck(through, first.requires_grad_())
