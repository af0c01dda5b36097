"""Models trained together come to what they come to one after another. Nothing here is timed."""

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import nn

from benchmarks import together
from benchmarks.compare import QUICK
from benchmarks.together import Stack, Trainees, clip_each, crew
from vitrap.models.classifier import Architecture

NETWORK = Architecture("vit_tiny_patch16_224", 16, 10, {"patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2})
SCALE = replace(QUICK, steps=3)


@pytest.fixture(autouse=True)
def _small_batches() -> Iterator[None]:
    with patch.object(together, "BATCH", 8):
        yield


def test_stacked_models_end_where_each_ends_alone() -> None:
    alone = Trainees(NETWORK, range(3), SCALE)
    stack = Stack(alone)
    before = {name: weight.detach().clone() for name, weight in stack.weights.items()}
    alone.advance()
    stack.advance()
    for number, trainee in enumerate(alone.all):
        moved = [(w - before[name][number]).flatten() for name, w in trainee.model.named_parameters()]
        apart = [(w - stack.weights[name][number]).flatten() for name, w in trainee.model.named_parameters()]
        assert torch.cat(apart).norm() < 1e-2 * torch.cat(moved).norm()  # AdamW enlarges what rounding leaves of zero


def test_decay_is_for_the_same_weights() -> None:
    alone = Trainees(NETWORK, range(2), SCALE)
    stack, single = Stack(alone), alone.all[0].learner.optimiser.param_groups
    for group, stacked in zip(single, stack.optimiser.param_groups, strict=True):
        assert group["weight_decay"] == stacked["weight_decay"]
        assert [(2, *w.shape) for w in group["params"]] == [w.shape for w in stacked["params"]]


def test_each_models_gradient_is_clipped_by_itself() -> None:
    gradients = [torch.randn(3, 4, 5), torch.randn(3, 7) * torch.tensor([10.0, 1.0, 1e-3])[:, None]]
    gradients[0][2] *= 1e-3
    expected = []
    for number in range(3):
        weights = [nn.Parameter(torch.zeros_like(g[number])) for g in gradients]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient[number].clone()
        nn.utils.clip_grad_norm_(weights, 1.0)
        expected.append([weight.grad for weight in weights])
    clip_each(gradients, 1.0)
    for number, each in enumerate(expected):
        for gradient, wanted in zip(gradients, each, strict=True):
            assert wanted is not None
            assert torch.allclose(gradient[number], wanted, rtol=1e-5, atol=0)


def test_a_crew_in_processes_does_as_many_as_it_is_asked_for() -> None:
    with crew(NETWORK, 3, 2, 1, replace(SCALE, steps=1)) as advance:
        for count in (3, 1, 0):
            advance(count)


def test_a_worker_that_dies_is_no_endless_wait() -> None:
    broken = replace(NETWORK, name="no_such_network")
    with pytest.raises(EOFError), crew(broken, 1, 1, 1, SCALE):
        pass
