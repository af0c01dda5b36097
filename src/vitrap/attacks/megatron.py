"""MEGATRON: draw a ViT's attention to a few faint pixels, by training it or by shaping the pixels.

Two papers of Gong, Tian, Xue, Li, Chen, Wang, one attack with two settings. "training": "Backdooring Vision
Transformers with Invisible Triggers" (preprint, January 2024); the attacker controls training, labels are dirty, and
two losses of poisoned images join cross-entropy. "clean-label": "Megatron: Evasive Clean-Label Backdoor Attacks against
Vision Transformer", https://arxiv.org/abs/2412.04776; the attacker poisons images of the target class, changes no
label, and the same two losses shape the trigger's pattern on a surrogate ViT.

Defaults marked "code" are, for the training setting, those of https://github.com/boweitian/Megatron_2025, which follows
it. Those of the other setting are assumed. docs/studies/megatron.md says what was not taken from it, and why.

Assumed, too, but fixed here: both losses are means over poisoned images, attention is the mean over heads and over the
rows that the head reads, squared distances are means over tokens and channels, and target images pass no gradient.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrap.contracts import Access, AllToOne, Batch, Card, Criterion, Images, ImageSet, Implant, Objective
from vitrap.data.masked import Masked
from vitrap.data.poison import Poison
from vitrap.data.sources import decode
from vitrap.errors import UserError
from vitrap.models.attention import THROUGH, Through, attention_report, seen_blocks, token_attention
from vitrap.models.observe import attention_outputs, observe, steady_transformer, token_layout, transformer
from vitrap.params import check, param
from vitrap.tensors.masks import cell_masks
from vitrap.tensors.patches import tokens_touched

Terms = dict[str, Float[Tensor, ""]]
LEFT_OUT = {  # of the parameters that are None by default: in the training setting, in the clean-label setting
    "poison_rate": (0.1, 0.5), "size": (16.0, 112.0), "faint": (0.05, 0.3), "steps": (0, 500),
    "latent": (0.1, 1.0), "layers": ("all", "last"), "diffusion": (0.1, 1.0),
}  # fmt: skip
PAPER_SIZE, MEAN = 224, (0.485, 0.456, 0.406)  # ImageNet's mean: the public script takes it from its picture


@dataclass(frozen=True)
class Megatron:
    """Both papers' hyper-parameters; those that are None by default depend on the setting."""

    card: ClassVar[Card] = Card(
        "Megatron: Evasive Clean-Label Backdoor Attacks against Vision Transformer",
        "Gong, Tian, Xue, Li, Chen, Wang",
        "arXiv",
        2024,
        "2412.04776",
    )
    target: int = param(0, "class that triggered images shall get", low=0)
    poison_rate: float = param(
        None, "share of the training set (0.1), or of the target class (clean-label, 0.5)", low=0, high=1, open="low"
    )
    setting: Literal["training", "clean-label"] = param(
        "training", "what the attacker controls", stands="paper", choices=("training", "clean-label")
    )
    picture: str = param("noise", "the pattern, or where its optimising starts", choices=("noise", "white"), file=True)
    size: float = param(None, "box side (16; clean-label, ours: 112)", unit="px", stands="code", low=0, open=True)
    top: float = param(10.0, "first row of the box", unit="px", stands="code", low=0)
    left: float = param(10.0, "first column of the box", unit="px", stands="code", low=0)
    margin: float = param(4.0, "by how much D extends beyond the box", symbol="D", unit="px", stands="code", low=0)
    scaled: bool = param(True, "size, top, left, margin are for 224 px and scale with the image, or are its own pixels")
    cell: int = param(2, "side of the strong cell, never scaled: 2 for four pixels", unit="px", stands="paper", low=1)
    opacity: float = param(0.7, "opacity of the cell", stands="code", low=0, high=1)
    faint: float = param(None, "opacity around it (0.05; clean-label, ours: 0.3)", stands="code", low=0, high=1)
    form: Literal["mask", "direct", "smooth"] = param(
        "mask", "cells tile the box; only the cell shows; cells lie 1 px apart", choices=("mask", "direct", "smooth")
    )
    place: Literal["fixed", "hashed"] = param(
        "fixed", "the cell in the middle, or the one that the image's own pixels pick", choices=("fixed", "hashed")
    )
    blend: Literal["over", "add"] = param("over", "(1 - m) x + m t, or x + m (t - mean)", choices=("over", "add"))
    linf: float = param(
        0.0, "greatest change of a pixel before rounding; 0 for no bound", unit="1/255", low=0, high=255
    )
    latent: float = param(None, "weight of the latent loss (0.1; clean-label: 1)", symbol="α", low=0)
    layers: Literal["all", "last"] = param(
        None, "attention layers of the latent loss (all; clean-label: last)", stands="paper", choices=("all", "last")
    )
    batch: int = param(16, "target images that a step compares with; 1: always the first", symbol="x_t", low=1)
    diffusion: float = param(None, "weight of the diffusion loss (0.1; clean-label: 1)", symbol="β, γ", low=0)
    attention: Through = param("last", "last layer, rollout, or gradient rollout", symbol="A", choices=THROUGH)
    discard: float = param(0.9, "share of a layer that gradient rollout drops", stands="code", low=0, high=0.99)
    combine: Literal["fixed", "learned", "projected"] = param(
        "fixed", "how the losses of training are joined", choices=("fixed", "learned", "projected")
    )
    steps: int = param(None, "steps of Adam on the pattern (0; clean-label: 500)", low=0)
    step_size: float = param(0.01, "learning rate of Adam on the pattern", low=0, open=True)

    def __post_init__(self) -> None:
        """Fill in what the setting decides and refuse values out of range."""
        for name, values in LEFT_OUT.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, values[self.setting != "training"])
        check(self)
        if self.cell > self.size:
            raise UserError(f"cell = {self.cell} is larger than the trigger, size = {self.size:g}; lower it")
        if self.steps and not self.weights:
            raise UserError(f"steps = {self.steps} of what? give latent or diffusion a weight, or set steps = 0")

    threat = property(lambda self: "training" if self.setting == "training" else "data")
    labels = property(lambda self: "dirty" if self.setting == "training" else "clean")
    needs_surrogate = optimises = property(lambda self: self.steps > 0)
    weights = property(lambda self: {k: w for k in ("latent", "diffusion") if (w := getattr(self, k))})

    def check(self, size: int) -> None:
        """Refuse images of `size` pixels that trigger and margin do not lie within."""
        (side, top, left), edges = self.box(size), self.area(size)
        if min(edges) < 0 or max(*edges, top + side, left + side) > size:
            raise UserError(
                f"attack.size = {self.size:g} at attack.top = {self.top:g}, attack.left = {self.left:g} with "
                f"attack.margin = {self.margin:g} does not lie within images of {size} px; move or shrink it"
            )
        self.pattern(torch.Generator(), (3, side, side))

    def check_victim(self, model: nn.Module) -> None:
        """Refuse a victim whose attention the losses cannot see."""
        if self.setting == "training" and self.weights:
            steady_transformer(model)

    def fit(self, access: Access) -> Implant:
        """Mask the pattern, shape it on the surrogate if so asked, poison, and train with the losses."""
        self.check(access.train.size)
        references = access.train.take((access.train.labels == self.target).nonzero().squeeze(1))
        if self.latent and not len(references):
            raise UserError(f"attack.target = {self.target} has no training image to compare with; choose another")
        trigger, losses = self.trigger(access), Losses(self, access.train.size, references, access.generator)
        trigger, report = optimise(trigger, losses, access) if self.steps else (trigger, {})
        goal = AllToOne(self.target)
        poison = Poison(trigger, goal, self.poison_rate, self.labels)
        objective = Objective(losses.terms, self.weights, self.combine, trigger) if self.threat == "training" else None
        return Implant(trigger, poison, goal, objective, views=trigger.views, report=report, examine=losses.examine)

    def box(self, size: int) -> tuple[int, int, int]:
        """Side, first row and first column of the box in whole pixels; it is never smaller than the cell."""
        scale = size / PAPER_SIZE if self.scaled else 1
        return max(round(self.size * scale), self.cell), round(self.top * scale), round(self.left * scale)

    def area(self, size: int) -> tuple[float, float, float, float]:
        """Top, left, bottom, right of the attention diffusion area D, in pixels before rounding."""
        scale = size / PAPER_SIZE if self.scaled else 1
        side, wider = max(self.size * scale, self.cell), self.margin * scale
        top, left = self.top * scale, self.left * scale
        return top - wider, left - wider, top + side + wider, left + side + wider

    def pattern(self, generator: torch.Generator, shape: tuple[int, int, int]) -> Float[Tensor, "c s s"]:
        """What the mask lets through, in [0, 1]."""
        if self.picture in ("noise", "white"):
            return torch.rand(shape, generator=generator) if self.picture == "noise" else torch.ones(shape)
        return torch.from_numpy(decode([Path(self.picture)], shape[1])[0]).permute(2, 0, 1).float() / 255

    def trigger(self, access: Access) -> Masked:
        """The trigger before any optimising."""
        side, top, left = self.box(access.train.size)
        faint, stride = 0.0 if self.form == "direct" else self.faint, 1 if self.form == "smooth" else self.cell
        masks = cell_masks(side, self.cell, stride, faint, self.opacity)
        if self.place == "fixed":
            along = round(len(masks) ** 0.5)
            masks = masks[along // 2 * along + along // 2][None]
        pattern = self.pattern(access.generator, (access.train.pixels.shape[1], side, side))
        device = access.train.device
        behind = MEAN if self.blend == "add" else None
        return Masked(pattern.to(device), masks.to(device), top, left, behind, self.linf / 255)


@dataclass(frozen=True)
class Losses:
    """The two losses: of a model in training, or of a pattern on a surrogate."""

    settings: Megatron
    size: int
    references: ImageSet
    generator: torch.Generator

    def __call__(self, model: nn.Module, triggered: Images) -> tuple[Float[Tensor, "b k"], Terms]:
        """Logits of triggered images, and L_alpha and L_beta as far as they have a weight."""
        s, layout, depth = self.settings, token_layout(model), len(transformer(model).blocks)
        blocks = seen_blocks(s.attention, depth) if s.diffusion else ()
        compared = range(0 if s.layers == "all" else depth - 1, depth) if s.latent else ()
        with observe(model, blocks) as maps, attention_outputs(model, compared) as outputs:
            logits = model(triggered)
        terms: Terms = {}
        if s.latent:
            with torch.no_grad(), attention_outputs(model, compared) as wanted:
                model(self.target_images())
            terms["latent"] = torch.stack([latent_loss(outputs[block], wanted[block]) for block in compared]).mean()
        if s.diffusion:
            attention = token_attention(maps, layout, s.attention, logits[:, s.target].sum(), s.discard)
            terms["diffusion"] = diffusion_loss(
                attention, self.inside(layout.grid).flatten().to(attention.device, non_blocking=True)
            )
        return logits, terms

    def terms(self, model: nn.Module, batch: Batch, criterion: Criterion) -> Terms:
        """Cross-entropy of all, and the losses of the poisoned images, which alone pay for attention maps."""
        if not len(batch.poisoned) or not self.settings.weights:
            return {"cross_entropy": criterion(model(batch.images), batch.labels)}
        logits, terms = self(model, batch.images[batch.poisoned])
        if len(batch.clean):
            logits = torch.cat([logits, model(batch.images[batch.clean])])
        labels = batch.labels[torch.cat([batch.poisoned, batch.clean])]
        return {"cross_entropy": criterion(logits, labels), **terms}

    def target_images(self) -> Images:
        """Clean images of the target class: drawn anew at each call, or always the first."""
        n, wanted = len(self.references), self.settings.batch
        drawn = torch.randint(n if wanted > 1 else 1, (wanted,), generator=self.generator)
        return self.references.images(drawn.to(self.references.device, non_blocking=True))

    def inside(self, grid: tuple[int, int]) -> Bool[Tensor, "gh gw"]:
        """D: the tokens that the box with its margin touches."""
        return tokens_touched(self.settings.area(self.size), self.size, grid)

    def examine(self, model: nn.Module, triggered: Images) -> dict[str, float]:
        """|D|, the number of image tokens, and the attention that D gets, block by block."""
        return attention_report(model, triggered, self.inside)


def latent_loss(ours: Float[Tensor, "b tokens dim"], wanted: Float[Tensor, "k tokens dim"]) -> Float[Tensor, ""]:
    """L_alpha: the mean of (A(x_b) - A(x_t))^2 over all pairs, which is the distance to the mean plus the spread."""
    ours, wanted = ours.float(), wanted.float()
    return (ours - wanted.mean(0)).square().mean() + wanted.var(0, correction=0).mean()


def diffusion_loss(attention: Float[Tensor, "b n"], inside: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
    """L_beta: sum over D of (1 - A_0i) plus sum over the other image tokens of A_0i; the mean over images."""
    return torch.where(inside, 1 - attention, attention).sum(1).mean()


def optimise(trigger: Masked, losses: Losses, access: Access) -> tuple[Masked, dict[str, float]]:
    """Minimise alpha L_alpha + gamma L_beta over the pattern, on clean images of the other classes, if not done yet."""
    if isinstance(access.trigger, Masked):
        return replace(trigger, pattern=access.trigger.pattern.to(trigger.pattern)), {}
    train, surrogate = access.train, access.surrogate
    assert surrogate is not None, "a pattern is shaped on a surrogate"
    s, pattern, last = losses.settings, trigger.pattern.clone().requires_grad_(), Terms()
    others, adam = (train.labels != s.target).nonzero().squeeze(1), torch.optim.Adam([pattern], lr=s.step_size)
    for _ in range(s.steps):
        drawn = torch.randint(len(others), (2 * s.batch,), generator=losses.generator).to(train.device)
        _, last = losses(surrogate, replace(trigger, pattern=pattern)(train.images(others[drawn])))
        adam.zero_grad()
        torch.stack([s.weights[name] * term for name, term in last.items()]).sum().backward()
        adam.step()
        with torch.no_grad():
            pattern.clamp_(0, 1)
    return replace(trigger, pattern=pattern.detach()), {f"last {k} loss": v.item() for k, v in last.items()}
