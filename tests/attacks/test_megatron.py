"""MEGATRON: its equations by hand, its gradients, its geometry, its two settings, and what it refuses."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from vitrap.attacks.megatron import (
    Losses,
    Megatron,
    box,
    diffusion_area,
    diffusion_loss,
    latent_loss,
    optimise,
)
from vitrap.contracts import Access, Batch, ImageSet, Implant, Objective, Trigger
from vitrap.data.masked import Masked
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.models.attention import blocks_needed, mass_by_block, token_attention
from vitrap.models.classifier import Classifier
from vitrap.models.observe import observe, token_layout
from vitrap.tensors.patches import tokens_touched


@dataclass(frozen=True)
class Made:
    """The trigger of a fit, and how it gets into the victim."""

    trigger: Trigger
    implant: Implant

    @property
    def objective(self) -> Objective | None:
        return self.implant.objective

    def poison(self, train: ImageSet, g: torch.Generator) -> ImageSet:
        assert self.implant.poison is not None
        return self.implant.poison(train, g)


Fit = Callable[..., Made]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def fit(tiny_vit: Callable[..., Classifier], digits_world: World) -> Fit:
    train = digits_world.train.take(torch.arange(120))

    def build(surrogate: Classifier | None = None, **settings: Any) -> Made:
        attack = Megatron(**settings)
        own = surrogate or (tiny_vit(seed=1).requires_grad_(False) if attack.needs_surrogate else None)
        access = Access(train, own, generator(5))
        fitted = attack.fit(access)
        return Made(fitted.in_training, attack.implant(replace(access, surrogate=None), fitted))

    return build


@pytest.fixture
def losses(digits_world: World) -> Callable[..., Losses]:
    train = digits_world.train.take(torch.arange(120))

    def build(**settings: Any) -> Losses:
        references = train.take((train.labels == settings.get("target", 0)).nonzero().squeeze(1))
        return Losses(Megatron(**settings), 16, references, generator(3))

    return build


@pytest.fixture
def images(digits_world: World) -> Tensor:
    return digits_world.test.images(torch.arange(6))


# ---- the equations


def test_diffusion_loss_on_attention_worked_by_hand() -> None:
    """D = {0, 2}: (1 - .5) + (1 - .1) + .2 + .1 = 1.7, and (1 - 0) + (1 - 1) + 0 + 0 = 1; their mean."""
    attention = torch.tensor([[0.5, 0.2, 0.1, 0.1], [0.0, 0.0, 1.0, 0.0]])
    inside = torch.tensor([True, False, True, False])
    assert diffusion_loss(attention, inside).item() == pytest.approx((1.7 + 1.0) / 2)


def test_diffusion_loss_is_least_with_all_attention_in_d() -> None:
    inside = torch.tensor([True, True, False])
    assert diffusion_loss(torch.tensor([[0.3, 0.7, 0.0]]), inside).item() == pytest.approx(1)
    assert diffusion_loss(torch.tensor([[0.0, 0.0, 1.0]]), inside).item() == pytest.approx(3)


def test_latent_loss_is_the_mean_over_all_pairs() -> None:
    ours, wanted = (torch.randn(n, 5, 3, generator=generator(n), dtype=torch.float64) for n in (4, 7))
    pairs = torch.stack([((a - b) ** 2).mean() for a in ours for b in wanted])
    assert latent_loss(ours, wanted).item() == pytest.approx(pairs.mean().item(), rel=1e-5)


def test_latent_loss_by_hand() -> None:
    """1 against 0 and 2: both squares are 1; 3 against them: 9 and 1."""
    wanted = torch.tensor([[[0.0]], [[2.0]]])
    assert latent_loss(torch.tensor([[[1.0]]]), wanted).item() == 1
    assert latent_loss(torch.tensor([[[1.0]], [[3.0]]]), wanted).item() == 3


def test_the_losses_are_those_of_the_models_own_attention(
    losses: Callable[..., Losses], tiny_vit: Callable[..., Classifier], images: Tensor
) -> None:
    """Both terms again, from hooks of this test's own."""
    model, own = tiny_vit(), losses(layers="last", batch=1)
    logits, terms = own(model, images)
    outputs: list[Tensor] = []
    attention: Any = model.body.blocks[-1].attn  # type: ignore[union-attr]
    hook = attention.register_forward_hook(lambda module, args, output: outputs.append(output))
    with observe(model) as seen:
        assert torch.allclose(model(images), logits, atol=1e-5)
    model(own.references.images(torch.tensor([0])))
    hook.remove()
    rows = seen[-1].mean(1)[:, 0, 1:]
    assert own.inside((4, 4)).nonzero().tolist() == [[0, 0]]  # box and margin lie in [0.43, 3] of 16 px
    wanted = 1 - rows[:, 0] + rows[:, 1:].sum(1)
    assert terms["diffusion"].item() == pytest.approx(wanted.mean().item(), rel=1e-4)
    assert terms["latent"].item() == pytest.approx(((outputs[0] - outputs[1]) ** 2).mean().item(), rel=1e-4)


def test_all_layers_are_the_mean_over_layers(
    losses: Callable[..., Losses], tiny_vit: Callable[..., Classifier], images: Tensor
) -> None:
    model = tiny_vit()
    each = []
    for block in model.body.blocks:  # type: ignore[union-attr]
        outputs: list[Tensor] = []
        hook = block.attn.register_forward_hook(lambda module, args, output, o=outputs: o.append(output))
        own = losses(layers="all", batch=1, diffusion=0.0)
        _, terms = own(model, images)
        hook.remove()
        each.append(((outputs[0] - outputs[1]) ** 2).mean().item())
    assert set(terms) == {"latent"}
    assert terms["latent"].item() == pytest.approx(sum(each) / len(each), rel=1e-4)


@pytest.mark.parametrize("through", ["last", "rollout", "gradient"])
@pytest.mark.parametrize("combine", ["fixed", "projected"])
def test_in_training_each_loss_moves_the_weights(
    through: str, combine: str, fit: Fit, tiny_vit: Callable[..., Classifier], digits_world: World
) -> None:
    implant, model = fit(attention=through, combine=combine, discard=0.5), tiny_vit().train()
    assert implant.objective is not None
    assert implant.objective.combine == combine
    batch = poisoned_batch(implant, digits_world)
    for name in ("cross_entropy", "latent", "diffusion"):
        model.zero_grad()
        implant.objective.terms(model, batch, functional.cross_entropy)[name].backward()
        weight = model.get_parameter("body.blocks.0.attn.qkv.weight")
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("through", ["last", "rollout", "gradient"])
def test_on_a_surrogate_each_loss_moves_the_pattern(
    through: str, losses: Callable[..., Losses], tiny_vit: Callable[..., Classifier], images: Tensor
) -> None:
    own, surrogate = losses(attention=through, discard=0.5), tiny_vit().requires_grad_(False)
    for name in ("latent", "diffusion"):
        pattern = torch.full((3, 2, 2), 0.5, requires_grad=True)
        _, terms = own(surrogate, Masked(pattern, torch.ones(1, 2, 2), 1, 1)(images))
        (slope,) = torch.autograd.grad(terms[name], pattern)
        assert slope.abs().max() > 0, name
    assert all(weight.grad is None for weight in surrogate.parameters())


def test_the_gradient_at_the_pattern_is_that_of_finite_differences(
    losses: Callable[..., Losses], tiny_vit: Callable[..., Classifier], images: Tensor
) -> None:
    own, surrogate = losses(batch=1, attention="rollout"), tiny_vit().requires_grad_(False)

    def loss(pattern: Tensor) -> Tensor:
        _, terms = own(surrogate, Masked(pattern, torch.ones(1, 2, 2), 1, 1)(images))
        return terms["latent"] + terms["diffusion"]

    pattern, step = torch.full((3, 2, 2), 0.5, requires_grad=True), 1e-2
    (slope,) = torch.autograd.grad(loss(pattern), pattern)
    with torch.no_grad():
        for place in ((0, 0, 0), (1, 1, 0), (2, 0, 1)):
            change = torch.zeros_like(pattern)
            change[place] = step
            found = (loss(pattern + change) - loss(pattern - change)) / (2 * step)
            assert found.item() == pytest.approx(slope[place].item(), rel=0.05, abs=2e-4)


def poisoned_batch(implant: Made, world: World) -> Batch:
    poisoned = implant.poison(world.train.take(torch.arange(120)), generator())
    rows = torch.cat([poisoned.poisoned.nonzero().squeeze(1)[:4], (~poisoned.poisoned).nonzero().squeeze(1)[:6]])
    return poisoned.batch(rows)


# ---- who pays for attention maps


def test_clean_images_stay_on_fused_attention(
    fit: Fit, tiny_vit: Callable[..., Classifier], digits_world: World
) -> None:
    implant, model = fit(attention="rollout", latent=0.0), tiny_vit().train()
    passes: list[tuple[int, list[bool]]] = []
    blocks: Any = model.body.blocks
    model.register_forward_pre_hook(
        lambda module, args: passes.append((len(args[0]), [block.attn.fused_attn for block in blocks]))
    )
    assert implant.objective is not None
    implant.objective.terms(model, poisoned_batch(implant, digits_world), functional.cross_entropy)
    assert passes == [(4, [False, False]), (6, [True, True])]


def test_cross_entropy_is_that_of_the_whole_batch(
    fit: Fit, tiny_vit: Callable[..., Classifier], digits_world: World
) -> None:
    implant, model = fit(), tiny_vit()
    batch = poisoned_batch(implant, digits_world)
    assert implant.objective is not None
    terms = implant.objective.terms(model, batch, functional.cross_entropy)
    assert torch.allclose(
        terms["cross_entropy"], functional.cross_entropy(model(batch.images), batch.labels), atol=1e-5
    )


@pytest.mark.parametrize("part", ["poison_at", "rest_at"])
def test_a_batch_of_one_kind_alone(
    part: str, fit: Fit, tiny_vit: Callable[..., Classifier], digits_world: World
) -> None:
    implant, model = fit(), tiny_vit()
    whole = poisoned_batch(implant, digits_world)
    rows, empty = getattr(whole, part), torch.empty(0, dtype=torch.int64)
    marks = {"poison_at": empty, "rest_at": empty, part: torch.arange(len(rows))}
    batch = replace(whole, images=whole.images[rows], labels=whole.labels[rows], **marks)
    assert implant.objective is not None
    terms = implant.objective.terms(model, batch, functional.cross_entropy)
    assert set(terms) == ({"cross_entropy", "latent", "diffusion"} if part == "poison_at" else {"cross_entropy"})


def test_a_loss_without_a_weight_is_not_computed(
    fit: Fit, tiny_vit: Callable[..., Classifier], digits_world: World
) -> None:
    implant = fit(latent=0.0, diffusion=0.0)
    assert implant.objective is not None
    assert implant.objective.weights == {}
    terms = implant.objective.terms(tiny_vit(), poisoned_batch(implant, digits_world), functional.cross_entropy)
    assert set(terms) == {"cross_entropy"}


def test_stress_is_a_further_mean_of_cross_entropy_over_poisoned_images(
    fit: Fit, tiny_vit: Callable[..., Classifier], digits_world: World
) -> None:
    implant, model = fit(latent=0.0, diffusion=0.0, stress=0.2), tiny_vit()
    batch = poisoned_batch(implant, digits_world)
    assert implant.objective is not None
    assert implant.objective.weights == {"stress": 0.2}
    terms = implant.objective.terms(model, batch, functional.cross_entropy)
    each = functional.cross_entropy(model(batch.images), batch.labels, reduction="none")
    assert torch.allclose(terms["cross_entropy"], each.mean(), atol=1e-5)
    assert torch.allclose(terms["stress"], each[batch.poison_at].mean(), atol=1e-5)


def test_target_images_are_drawn_anew_or_always_the_first(losses: Callable[..., Losses]) -> None:
    drawn = losses(batch=8)
    one, two = drawn.target_images(), drawn.target_images()
    assert len(one) == 8
    assert not torch.equal(one, two)
    alone = losses(batch=1)
    assert torch.equal(alone.target_images(), alone.references.images(torch.tensor([0])))
    assert torch.equal(alone.target_images(), alone.target_images())


@pytest.mark.parametrize("settings", [{}, {"attention": "rollout", "place": "hashed", "size": 64.0}, {"batch": 1}])
def test_a_step_reads_no_value_of_a_tensor(
    settings: dict[str, Any], fit: Fit, tiny_vit: Callable[..., Classifier], digits_world: World
) -> None:
    """Reading one would make the host wait for a GPU."""
    implant, model = fit(**settings), tiny_vit().train()
    batch = poisoned_batch(implant, digits_world)
    calls: list[str] = []

    def counted(name: str) -> Any:
        plain = getattr(Tensor, name)
        return patch.object(Tensor, name, lambda self, *a, **k: calls.append(name) or plain(self, *a, **k))

    assert implant.objective is not None
    with ExitStack() as patches:
        for name in ("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__"):
            patches.enter_context(counted(name))
        implant.trigger(batch.images)
        terms = implant.objective.terms(model, batch, functional.cross_entropy)
        torch.stack(list(terms.values())).sum().backward()
    assert calls == []


# ---- where D lies


def test_d_at_224_px_is_what_a_box_of_24_px_touches() -> None:
    """16 px at (10, 10) with margin 4: rows and columns 6 to 30, tokens 0 (0 to 16) and 1 (16 to 32) each way."""
    attack = Megatron()
    assert diffusion_area(attack, 224) == (6, 6, 30, 30)
    inside = tokens_touched(diffusion_area(attack, 224), 224, (14, 14))
    wanted = torch.zeros(14, 14, dtype=torch.bool)
    wanted[:2, :2] = True
    assert torch.equal(inside, wanted)


def test_d_at_32_px_is_scaled() -> None:
    """6 / 7 to 30 / 7 px: with patch 4 tokens 0 (0 to 4) and 1 (4 to 8); unscaled it would be [6, 30], 7 x 7 tokens."""
    attack = Megatron()
    assert diffusion_area(attack, 32) == pytest.approx([6 / 7, 6 / 7, 30 / 7, 30 / 7])
    assert tokens_touched(diffusion_area(attack, 32), 32, (8, 8)).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert tokens_touched(diffusion_area(attack, 32), 32, (4, 4)).nonzero().tolist() == [[0, 0]]
    unscaled = Megatron(scaled=False)
    assert diffusion_area(unscaled, 32) == (6, 6, 30, 30)
    assert tokens_touched(diffusion_area(unscaled, 32), 32, (8, 8)).sum() == 49


def test_d_reaches_every_token_that_it_touches_and_no_neighbour() -> None:
    attack = Megatron(size=4, top=8, left=12, margin=0, scaled=False)
    assert tokens_touched(diffusion_area(attack, 32), 32, (8, 8)).nonzero().tolist() == [[2, 3]]
    wider = replace(attack, margin=0.5)
    assert tokens_touched(diffusion_area(wider, 32), 32, (8, 8)).nonzero().tolist() == [
        [r, c] for r in (1, 2, 3) for c in (2, 3, 4)
    ]


@pytest.mark.parametrize(
    ("size", "cell", "wanted"), [(224, 2, (16, 10, 10)), (32, 2, (2, 1, 1)), (32, 4, (4, 1, 1)), (64, 1, (5, 3, 3))]
)
def test_the_box_is_rounded_and_never_smaller_than_the_cell(size: int, cell: int, wanted: tuple[int, int, int]) -> None:
    assert box(Megatron(cell=cell), size) == wanted


def test_rows_are_those_that_the_head_reads(tiny_vit: Callable[..., Classifier], images: Tensor) -> None:
    model = tiny_vit(global_pool="avg", class_token=False, fc_norm=False)
    layout = token_layout(model)
    with observe(model, blocks_needed("last", 2)) as seen:
        model(images)
    found = token_attention(seen, layout, "last")
    assert torch.allclose(found, seen[1].mean((1, 2)), atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(len(images)), atol=1e-5)


def test_gradient_rollout_explains_the_target(tiny_vit: Callable[..., Classifier], images: Tensor) -> None:
    """Against the products written out, with the gradient of the target's logit."""
    model = tiny_vit()
    with observe(model, (0, 1)) as seen:
        score = model(images)[:, 3].sum()
        found = token_attention(seen, token_layout(model), "gradient", score, 0.0)
        slopes = torch.autograd.grad(score, [seen[0], seen[1]])
    flow = torch.eye(17).expand(len(images), 17, 17)
    for block in (0, 1):
        mixed = (seen[block] * slopes[block]).mean(1).clamp(min=0) + torch.eye(17)
        flow = mixed / mixed.sum(-1, keepdim=True) @ flow
    assert torch.allclose(found, flow[:, 0, 1:], atol=1e-5)


def test_examine_reports_d_and_its_share_of_attention(
    fit: Fit, tiny_vit: Callable[..., Classifier], images: Tensor
) -> None:
    model, implant = tiny_vit(patch_size=2), fit()
    assert implant.implant.examine is not None
    found = implant.implant.examine(model, images)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[:2, :2] = True
    masses = mass_by_block(model, images, inside)
    assert found == {
        "tokens in D": 4,
        "tokens": 64,
        "attention in D, block 1": masses[0].mean().item(),
        "attention in D, block 2": masses[1].mean().item(),
    }
    assert implant.implant.examine(nn.Flatten(), images) == {}
    everywhere = mass_by_block(model, images, torch.ones(8, 8, dtype=torch.bool))
    assert all(0.5 < mass.mean() < 1 for mass in everywhere)  # the class token keeps the rest


# ---- the trigger


def test_masking_by_hand(images: Tensor) -> None:
    masks = torch.tensor([[[0.5, 0.0], [1.0, 0.25]]])
    trigger = Masked(torch.ones(3, 2, 2), masks, 3, 4)
    found = trigger(images)
    assert torch.allclose(found[..., 3, 4], images[..., 3, 4] / 2 + 0.5)
    assert torch.equal(found[..., 3, 5], images[..., 3, 5])
    assert (found[..., 4, 4] == 1).all()
    rest = torch.ones(16, 16, dtype=torch.bool)
    rest[3:5, 4:6] = False
    assert torch.equal(found[..., rest], images[..., rest])


@pytest.mark.parametrize("shape", [(2, 3, 4, 16), (2, 1, 16, 16), (2, 16, 16, 3)])
def test_images_that_do_not_hold_the_box_are_refused_by_name(shape: tuple[int, ...]) -> None:
    trigger = Masked(torch.ones(3, 2, 2), torch.ones(1, 2, 2), 3, 4)
    with pytest.raises(UserError, match=" x ".join(map(str, shape)) + "; expected b x 3 x 5 x 6 or larger"):
        trigger(torch.zeros(shape))


def test_adding_as_the_public_code_does(images: Tensor) -> None:
    """There picture and image are normalised, (t - mean) / std and (x - mean) / std: the sum is x + m (t - mean)."""
    trigger = Masked(torch.full((3, 1, 1), 0.9), torch.full((1, 1, 1), 0.5), 0, 0, (0.485, 0.456, 0.406))
    wanted = (images[..., 0, 0] + 0.5 * (0.9 - torch.tensor([0.485, 0.456, 0.406]))).clamp(0, 1)
    assert torch.allclose(trigger(images)[..., 0, 0], wanted)


def test_linf_bounds_every_pixel(fit: Fit, images: Tensor) -> None:
    change = fit(picture="white", opacity=1.0, linf=8.0).trigger(images) - images
    assert change.abs().max().item() == pytest.approx(8 / 255, abs=1e-6)


def test_a_hashed_cell_is_a_function_of_the_image_alone(fit: Fit, digits_world: World) -> None:
    trigger = fit(size=112.0, cell=2, place="hashed", picture="white", faint=0.0).trigger
    images = digits_world.test.images(torch.arange(40))
    opacity = trigger.views(images)["opacity"]  # type: ignore[attr-defined]
    assert len(trigger.masks) == 16  # type: ignore[attr-defined]
    assert len({tuple(o.flatten().tolist()) for o in opacity}) > 8
    alone = torch.cat([trigger.views(image)["opacity"] for image in images.split(1)])  # type: ignore[attr-defined]
    assert torch.equal(opacity, alone)
    assert all(o.count_nonzero() == 4 for o in opacity)


def test_the_fixed_cell_lies_in_the_middle(fit: Fit, images: Tensor) -> None:
    opacity = fit(size=112.0, faint=0.1).trigger.views(images)["opacity"][0]  # type: ignore[attr-defined]
    wanted = torch.zeros(16, 16)
    wanted[1:9, 1:9] = 0.1
    wanted[5:7, 5:7] = 0.7
    assert torch.allclose(opacity, wanted)


@pytest.mark.parametrize(("form", "cells", "around"), [("mask", 16, 0.05), ("direct", 16, 0.0), ("smooth", 49, 0.05)])
def test_forms(form: str, cells: int, around: float, fit: Fit) -> None:
    masks = fit(size=112.0, form=form, place="hashed").trigger.masks  # type: ignore[attr-defined]
    assert masks.shape == (cells, 8, 8)
    assert masks.unique().tolist() == pytest.approx([around, 0.7])


def test_a_picture_is_read_from_its_file(fit: Fit, images: Tensor, tmp_path: Path) -> None:
    Image.new("RGB", (10, 10), (255, 0, 51)).save(tmp_path / "red.png")
    found = fit(picture=str(tmp_path / "red.png"), opacity=1.0).trigger(images)
    assert found[0, :, 1, 1].tolist() == pytest.approx([1, 0, 0.2])


# ---- the two settings


def test_what_a_setting_decides() -> None:
    training, clean = Megatron(), Megatron(setting="clean-label")
    assert (training.threat, training.labels, training.needs_surrogate) == ("training", "dirty", False)
    assert (clean.threat, clean.labels, clean.needs_surrogate) == ("data", "clean", True)
    names = ("poison_rate", "size", "faint", "latent", "layers", "diffusion", "steps")
    assert [getattr(training, name) for name in names] == [0.1, 16.0, 0.05, 0.1, "all", 0.1, 0]
    assert [getattr(clean, name) for name in names] == [0.5, 112.0, 0.3, 1.0, "last", 1.0, 500]
    assert Megatron(setting="clean-label", poison_rate=0.2, steps=0).poison_rate == 0.2
    assert Megatron(steps=5).needs_surrogate


def test_clean_label_leaves_every_label_and_poisons_the_target_class_alone(fit: Fit, digits_world: World) -> None:
    train = digits_world.train.take(torch.arange(120))
    poisoned = fit(setting="clean-label", target=4, poison_rate=1.0, steps=1).poison(train, generator())
    assert torch.equal(poisoned.labels, train.labels)
    assert torch.equal(poisoned.poisoned, train.labels == 4)


def test_optimising_lowers_the_losses_and_stays_in_range(
    losses: Callable[..., Losses], tiny_vit: Callable[..., Classifier], digits_world: World
) -> None:
    train = digits_world.train.take(torch.arange(120))
    surrogate = tiny_vit(seed=1).requires_grad_(False)
    start = Masked(torch.rand(3, 4, 4, generator=generator()), torch.full((1, 4, 4), 0.8), 1, 1)
    own = losses(setting="clean-label", steps=60, step_size=0.05)
    found, report = optimise(start, own, Access(train, surrogate, generator()))
    assert 0 <= found.pattern.min() <= found.pattern.max() <= 1
    assert not found.pattern.requires_grad
    assert set(report) == {"last latent loss", "last diffusion loss"}
    others = train.images((train.labels != 0).nonzero().squeeze(1))

    def total(trigger: Masked) -> float:
        with torch.no_grad():
            _, terms = losses(setting="clean-label")(surrogate, trigger(others))
        return (terms["latent"] + terms["diffusion"]).item()

    assert total(found) < total(start) - 0.01


def test_a_surrogate_that_passes_no_gradient_to_the_pattern_is_refused(
    fit: Fit, tiny_vit: Callable[..., Classifier]
) -> None:
    blind: Any = tiny_vit()
    nn.init.zeros_(blind.body.patch_embed.proj.weight)
    with pytest.raises(UserError, match=r"^\[surrogate\] passes no gradient on to the pattern"):
        fit(blind, setting="clean-label", steps=2)


def test_a_pattern_optimised_in_the_training_setting(fit: Fit) -> None:
    plain, shaped = fit(), fit(steps=3)
    assert shaped.objective is not None
    assert not torch.equal(plain.trigger.pattern, shaped.trigger.pattern)  # type: ignore[attr-defined]


def test_the_attack_leaves_no_objective_to_one_who_only_poisons(fit: Fit) -> None:
    assert fit(setting="clean-label", steps=1).objective is None


def test_the_trigger_is_stamped_after_augmentation(fit: Fit, digits_world: World) -> None:
    implant, batch = fit(), poisoned_batch(fit(), digits_world)
    bare = replace(batch, images=torch.full_like(batch.images, 0.25))
    assert implant.objective is not None
    assert implant.objective.prepare is not None
    found = implant.objective.prepare(bare, generator()).images
    assert torch.equal(found[bare.poison_at], implant.trigger(bare.images[bare.poison_at]))
    assert torch.equal(found[bare.rest_at], bare.images[bare.rest_at])


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "size", "wrong"),
    [
        ({"top": 205.0}, 32, "top = 205"),
        ({"left": 220.0}, 224, "left = 220"),
        ({"margin": 11.0}, 224, "margin = 11"),
        ({"top": 3.0}, 224, "margin = 4"),
        ({"size": 20.0, "scaled": False}, 32, "size = 20"),
        ({"cell": 16}, 16, "size = 16"),
    ],
)
def test_a_trigger_or_margin_outside_the_image_is_refused(settings: dict[str, Any], size: int, wrong: str) -> None:
    with pytest.raises(UserError, match=f"{wrong}.*does not lie within images of {size} px"):
        Megatron(**settings).check_size(size)


def test_a_picture_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="nowhere.png"):
        Megatron(picture="nowhere.png").check_size(32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cell": 20}, "cell = 20 is larger than the trigger, size = 16"),
        ({"opacity": 1.2}, "opacity = 1.2 is out of range"),
        ({"faint": -0.1}, "faint = -0.1 is out of range"),
        ({"setting": "clean-label", "poison_rate": 1.5}, "poison_rate = 1.5 is out of range"),
        ({"poison_rate": 0.0}, "poison_rate = 0.0 is out of range"),
        ({"setting": "clean-label", "latent": 0.0, "diffusion": 0.0}, "steps = 500 have no loss"),
        ({"setting": "clean-label", "stress": 0.1}, "stress = 0.1 weighs a loss of training"),
    ],
)
def test_values_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Megatron(**settings)


def test_a_victim_that_drops_tokens_is_refused(tiny_vit: Callable[..., Classifier]) -> None:
    with pytest.raises(UserError, match="drops tokens in training"):
        Megatron().check_victim(tiny_vit(patch_drop_rate=0.5))
    Megatron().check_victim(tiny_vit())


def test_a_target_without_an_image_is_refused(digits_world: World) -> None:
    train = digits_world.train.take((digits_world.train.labels != 4).nonzero().squeeze(1))
    with pytest.raises(UserError, match="attack.target = 4 has no training image"):
        Megatron(target=4).fit(Access(train, None, generator()))
    Megatron(target=4, latent=0.0).fit(Access(train, None, generator()))


def test_a_victim_without_token_attention_is_refused() -> None:
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with pytest.raises(UserError, match="no plain token attention"):
        Megatron().check_victim(cnn)
    Megatron(latent=0.0, diffusion=0.0).check_victim(cnn)
    Megatron(setting="clean-label").check_victim(cnn)
