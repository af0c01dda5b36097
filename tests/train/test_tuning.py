"""The floor of repairs: what it trains and leaves alone, and steps of repairs to come against loops written out."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Batch, Criterion, DefaultCompute, ImageSet, Objective, Suspect
from vitrap.errors import UserError
from vitrap.train.arithmetic import Arithmetic, uncompiled
from vitrap.train.loop import Epoch, Learner, Streams, Terms, cross_entropy
from vitrap.train.recipe import Recipe
from vitrap.train.tuning import Tuning, streams_of, tune

N, CLASSES, SIZE = 22, 3, 8
CPU = torch.device("cpu")
RECIPE = Recipe(2, 8, "sgd", lr=0.05, weight_decay=0.0, clip=0.0)
Descend = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def streams() -> Streams:
    return Streams(generator(), generator(1), generator(2), generator(3))


@pytest.fixture
def clean() -> ImageSet:
    labels = torch.arange(N) % CLASSES
    noise = torch.randint(40, (N, 3, SIZE, SIZE), generator=generator(7))
    return ImageSet.of((noise + 90 * labels[:, None, None, None]).to(torch.uint8), labels, CLASSES)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(16, CLASSES)).eval()


def suspect(clean: ImageSet, **other: Any) -> Suspect:
    return replace(Suspect(network(), clean, CLASSES, generator()), **other)


def tuned(clean: ImageSet, **settings: Any) -> Tensor:
    return weights(tune(suspect(clean), Tuning("toy", RECIPE, streams(), **settings)).model)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([w.detach().flatten() for w in model.parameters()])


def test_in_training_mode_batch_norm_follows_and_dropout_drops(clean: ImageSet) -> None:
    """As a loop of its own would train; torch's own random state stays as it was."""
    state = torch.get_rng_state()
    asked = Tuning("toy", RECIPE, streams(), training=True)
    found, again = (tune(suspect(clean), replace(asked, streams=streams())).model for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.training
    still = tune(suspect(clean), replace(asked, streams=streams(), training=False)).model
    moved = {name: buffer for name, buffer in found.named_buffers() if "running_mean" in name}
    assert moved
    for name, buffer in moved.items():
        assert not torch.equal(buffer, network().state_dict()[name])
        assert torch.equal(still.state_dict()[name], network().state_dict()[name])
    assert torch.equal(weights(found), weights(again))
    assert not torch.equal(weights(found), weights(still))


def by_hand(clean: ImageSet, descend: Descend, lr: Callable[[int], float]) -> tuple[Tensor, list[float]]:
    """A loop of its own in plain PyTorch: the weights, and the mean loss of each epoch."""
    model, order, curve = network(), generator(), []
    optimiser = torch.optim.SGD(model.parameters(), 1.0, 0.9)
    for epoch in range(2):
        total = 0.0
        for step, rows in enumerate(torch.randperm(N, generator=order).split(8)):
            optimiser.param_groups[0]["lr"] = lr(3 * epoch + step)
            total += descend(model, optimiser, clean.images(rows), clean.labels[rows]).item() * len(rows)
        curve.append(total / N)
    return weights(model), curve


def cosine(step: int) -> float:
    """RECIPE's rate: a tenth of six steps of warm-up, then half a cosine."""
    done = step / 6
    return 0.05 * (1e-3 / 0.101 if step == 0 else 0.5 * (1 + float(torch.tensor(torch.pi * (done - 0.1) / 0.9).cos())))


def plainly(model: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    loss = functional.cross_entropy(model(images), labels)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss


# The floor


def test_it_is_a_plain_loop_in_evaluation_mode(clean: ImageSet) -> None:
    """Dropout is off, and batch norm goes by the statistics that it has."""
    found = tune(suspect(clean), Tuning("toy", RECIPE, streams()))
    wanted, curve = by_hand(clean, plainly, cosine)
    torch.testing.assert_close(weights(found.model), wanted, rtol=1e-4, atol=1e-6)
    assert found.curves == {"cross_entropy": pytest.approx(curve, rel=1e-4)}
    assert found.last() == {"cross_entropy": pytest.approx(curve[-1], rel=1e-4)}
    assert all(torch.equal(a, b) for a, b in zip(found.model.buffers(), network().buffers(), strict=True))


@pytest.mark.parametrize("asking", [True, False])
def test_the_suspect_stays_and_the_copy_is_ready(clean: ImageSet, asking: bool) -> None:
    model = network().requires_grad_(asking)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        found = tune(suspect(clean, model=model), Tuning("toy", RECIPE, streams())).model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(w.requires_grad is asking and w.grad is None for w in model.parameters())
    assert not torch.equal(weights(found), weights(model))
    assert not any(w.requires_grad or w.grad is not None for w in found.parameters())
    assert not any(module.training for module in found.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_weights_that_are_named_learn(clean: ImageSet) -> None:
    model = tune(suspect(clean), Tuning("toy", RECIPE, streams(), weights=lambda model: model[-1].parameters())).model
    pairs = zip(model.named_parameters(), network().parameters(), strict=True)
    assert {name for (name, after), before in pairs if not torch.equal(after, before)} == {"6.weight", "6.bias"}


def test_a_model_that_the_repair_has_changed_is_trained_in_place_on_other_images(clean: ImageSet) -> None:
    changed, few = network(), clean.take(torch.arange(5))
    nn.init.constant_(changed[0].weight, 0.1)
    found = tune(suspect(clean), Tuning("toy", RECIPE, streams(), model=changed, images=few))
    assert found.model is changed
    other = tune(suspect(few, model=_even()), Tuning("toy", RECIPE, streams())).model
    assert torch.equal(weights(changed), weights(other))


def _even() -> nn.Module:
    model = network()
    nn.init.constant_(model[0].weight, 0.1)
    return model


def test_an_objective_of_its_own(clean: ImageSet) -> None:
    """A teacher: the distance of the logits to another model's, as NAD compares attention."""
    teacher = network().requires_grad_(False)

    def terms(model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Tensor]:
        logits = model(batch.images)
        distance = (logits - teacher(batch.images)).square().mean()
        return {"cross_entropy": criterion(logits, batch.labels), "distance": distance}

    def step(model: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
        logits = model(images)
        loss = functional.cross_entropy(logits, labels) + 5 * (logits - teacher(images)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss

    wanted, _ = by_hand(clean, step, cosine)
    found = tune(suspect(clean), Tuning("toy", RECIPE, streams(), Objective(terms, {"distance": 5.0})))
    torch.testing.assert_close(weights(found.model), wanted, rtol=1e-4, atol=1e-6)
    assert found.curves.keys() == {"cross_entropy", "distance"}


# Steps that a repair replaces


def test_a_sharpness_aware_step(clean: ImageSet) -> None:
    """SAM: the gradient is taken where the loss is highest nearby, and the weights go down it from where they were."""
    rho = 0.1

    def sharp(learner: Learner, batch: Batch) -> Terms:
        terms = learner.terms(batch)
        learner.backward(terms)
        with torch.no_grad():
            slopes = [w.grad for w in learner.weights if w.grad is not None]
            length = torch.stack([slope.norm() for slope in slopes]).norm()
            ways = [rho * slope / length for slope in slopes]
            for weight, way in zip(learner.weights, ways, strict=True):
                weight.add_(way)
        learner.backward(learner.terms(batch))
        with torch.no_grad():
            for weight, way in zip(learner.weights, ways, strict=True):
                weight.sub_(way)
        learner.step()
        return terms

    def step(model: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
        start = copy.deepcopy(model.state_dict())
        loss = functional.cross_entropy(model(images), labels)
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        length = torch.cat([slope.flatten() for slope in slopes]).norm()
        with torch.no_grad():
            for weight, slope in zip(model.parameters(), slopes, strict=True):
                weight += rho * slope / length
        slopes = torch.autograd.grad(functional.cross_entropy(model(images), labels), list(model.parameters()))
        model.load_state_dict(start)
        for weight, slope in zip(model.parameters(), slopes, strict=True):
            weight.grad = slope
        optimiser.step()
        return loss

    wanted, curve = by_hand(clean, step, cosine)
    found = tune(suspect(clean), Tuning("toy", RECIPE, streams(), step=sharp))
    torch.testing.assert_close(weights(found.model), wanted, rtol=1e-4, atol=1e-6)
    assert found.curves["cross_entropy"] == pytest.approx(curve, rel=1e-4)
    assert not torch.allclose(weights(found.model), tuned(clean), rtol=1e-3)


def test_an_adversarial_step(clean: ImageSet) -> None:
    """The images are moved up the loss by the sign of its gradient, then the weights go down it."""
    size = 8 / 255

    def adversarial(learner: Learner, batch: Batch) -> Terms:
        images = batch.images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(learner.terms(replace(batch, images=images))["cross_entropy"], images)
        terms = learner.terms(replace(batch, images=(batch.images + size * slope.sign()).clamp(0, 1)))
        learner.descend(terms)
        return terms

    def step(model: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
        moved = images.clone().requires_grad_()
        functional.cross_entropy(model(moved), labels).backward()
        assert moved.grad is not None
        return plainly(model, optimiser, (images + size * moved.grad.sign()).clamp(0, 1), labels)

    wanted, curve = by_hand(clean, step, cosine)
    found = tune(suspect(clean), Tuning("toy", RECIPE, streams(), step=adversarial))
    torch.testing.assert_close(weights(found.model), wanted, rtol=1e-4, atol=1e-6)
    assert found.curves["cross_entropy"] == pytest.approx(curve, rel=1e-4)
    assert not torch.allclose(weights(found.model), tuned(clean), rtol=1e-3)


def test_a_step_that_keeps_pruned_channels_at_zero(clean: ImageSet) -> None:
    def pruned(learner: Learner, batch: Batch) -> Terms:
        terms = learner.terms(batch)
        learner.descend(terms)
        with torch.no_grad():
            learner.weights[0][:2].zero_()
        return terms

    model = tune(suspect(clean), Tuning("toy", RECIPE, streams(), step=pruned)).model
    assert isinstance(model, nn.Sequential)
    assert not model[0].weight[:2].any()
    assert model[0].weight[2:].any()


# The learning rate between epochs


def test_a_control_decides_each_epochs_rate(clean: ImageSet) -> None:
    asked: list[tuple[bool, float, float]] = []

    def control(model: nn.Module, epoch: Epoch, lr: float) -> float:
        asked.append((model.training, epoch.means()["cross_entropy"], lr))
        return lr * 0.3

    found = tune(suspect(clean), Tuning("toy", RECIPE, streams(), control=control))
    wanted, curve = by_hand(clean, plainly, lambda step: 0.05 if step < 3 else 0.05 * 0.3)
    torch.testing.assert_close(weights(found.model), wanted, rtol=1e-4, atol=1e-6)
    assert asked == [
        (False, pytest.approx(curve[0], rel=1e-4), 0.05),
        (False, pytest.approx(curve[1], rel=1e-4), 0.05 * 0.3),
    ]


# How it computes, what is random, and refusals


def test_it_computes_as_the_suspect_does_and_is_never_compiled(clean: ImageSet) -> None:
    assert uncompiled(Arithmetic("bf16", "fused", compiled=True), CPU) == Arithmetic("bf16", "fused")
    assert uncompiled(DefaultCompute("bf16"), CPU) == Arithmetic("bf16", "eager")
    assert uncompiled(DefaultCompute(), CPU) == Arithmetic("fp32", "fused")
    seen: list[bool] = []

    def terms(model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Tensor]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return cross_entropy(model, batch, criterion)

    for compute in (Arithmetic("bf16", compiled=True), DefaultCompute()):
        tune(suspect(clean, compute=compute), Tuning("toy", RECIPE, streams(), Objective(terms)))
    assert seen == [True] * 6 + [False] * 6


def test_the_streams_come_from_the_defenders_own() -> None:
    """The first three seeds are those that repairs have always drawn."""
    found = streams_of(generator(5), CPU)
    seeds = [g.initial_seed() for g in (found.order, found.augmentation, found.projection, found.preparation)]
    assert seeds[:3] == torch.randint(2**62, (3,), generator=generator(5)).tolist()
    assert len(set(seeds)) == 4


def test_a_divergence_names_the_defence_and_its_rate(clean: ImageSet) -> None:
    with pytest.raises(UserError, match=r"^toy diverged \(cross_entropy is (nan|inf)\); lower its lr = 1e\+30$"):
        tune(suspect(clean), Tuning("toy", replace(RECIPE, lr=1e30, epochs=5), streams()))


def test_one_image_left_over_stays_a_batch_of_its_own_in_evaluation_mode(clean: ImageSet) -> None:
    sizes: list[int] = []

    def terms(model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Tensor]:
        sizes.append(len(batch.labels))
        return cross_entropy(model, batch, criterion)

    tune(suspect(clean.take(torch.arange(9))), Tuning("toy", RECIPE, streams(), Objective(terms)))
    assert sizes == [8, 1] * 2
