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
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrap.contracts import (
    Access,
    AllToOne,
    Batch,
    Card,
    Criterion,
    Fitted,
    Images,
    ImageSet,
    Implant,
    Labels,
    Moving,
    Objective,
    Position,
    Threat,
)
from vitrap.data.masked import Masked, pattern_of
from vitrap.data.poison import Poison, stamp_anew
from vitrap.errors import UserError
from vitrap.models.attention import Through, attention_report, seen_blocks, token_attention
from vitrap.models.observe import attention_outputs, observe, steady_transformer, token_layout, transformer
from vitrap.params import hyperparameters, param
from vitrap.tensors.masks import cell_masks, middle_mask
from vitrap.tensors.patches import tokens_touched

Terms = dict[str, Float[Tensor, ""]]
LEFT_OUT = {  # of the parameters that are None by default: in the training setting, in the clean-label setting
    "poison_rate": (0.1, 0.5), "size": (16.0, 112.0), "faint": (0.05, 0.3), "steps": (0, 500),
    "latent": (0.1, 1.0), "layers": ("all", "last"), "diffusion": (0.1, 1.0),
}  # fmt: skip
PAPER_SIZE, MEAN = 224, (0.485, 0.456, 0.406)  # ImageNet's mean: the public script takes it from its picture


@hyperparameters
class Megatron:
    """Both papers' hyper-parameters; those that are None by default depend on the setting."""

    card: ClassVar[Card] = Card(
        "Megatron: Evasive Clean-Label Backdoor Attacks against Vision Transformer",
        "Gong, Tian, Xue, Li, Chen, Wang",
        "arXiv",
        2024,
        "2412.04776",
    )
    version: ClassVar[int] = 1

    target: int = param(0, "class that triggered images shall get", low=0)
    poison_rate: float = param(
        None, "share of the training set (0.1), or of the target class (clean-label, 0.5)", low=0, high=1, open="low"
    )
    setting: Literal["training", "clean-label"] = param("training", "what the attacker controls", source="paper")
    picture: str = param("noise", "the pattern, or where its optimising starts", choices=("noise", "white"), file=True)
    size: float = param(None, "box side (16; clean-label, ours: 112)", unit="px", source="code", low=0, open=True)
    top: float = param(10.0, "first row of the box", unit="px", source="code", low=0)
    left: float = param(10.0, "first column of the box", unit="px", source="code", low=0)
    margin: float = param(4.0, "by how much D extends beyond the box", symbol="D", unit="px", source="code", low=0)
    scaled: bool = param(True, "size, top, left, margin are for 224 px and scale with the image, or are its own pixels")
    cell: int = param(2, "side of the strong cell, never scaled: 2 for four pixels", unit="px", source="paper", low=1)
    opacity: float = param(0.7, "opacity of the cell", source="code", low=0, high=1)
    faint: float = param(None, "opacity around it (0.05; clean-label, ours: 0.3)", source="code", low=0, high=1)
    form: Literal["mask", "direct", "smooth"] = param(
        "mask", "cells tile the box; only the cell shows; cells lie 1 px apart"
    )
    place: Literal["fixed", "hashed"] = param(
        "fixed", "the cell in the middle, or the one that the image's own pixels pick"
    )
    blend: Literal["over", "add"] = param("over", "(1 - m) x + m t, or x + m (t - mean)")
    linf: float = param(
        0.0, "greatest change of a pixel before rounding; 0 for no bound", unit="1/255", low=0, high=255
    )
    latent: float = param(None, "weight of the latent loss (0.1; clean-label: 1)", symbol="α", low=0)
    layers: Literal["all", "last"] = param(
        None, "attention layers of the latent loss (all; clean-label: last)", source="paper"
    )
    batch: int = param(16, "target images that a step compares with; 1: always the first", symbol="x_t", low=1)
    diffusion: float = param(None, "weight of the diffusion loss (0.1; clean-label: 1)", symbol="β, γ", low=0)
    attention: Through = param("last", "last layer, rollout, or gradient rollout", symbol="A")
    discard: float = param(0.9, "share of a layer that gradient rollout drops", source="code", low=0, high=0.99)
    combine: Literal["fixed", "learned", "projected"] = param("fixed", "how the losses of training are joined")
    stress: float = param(
        0.0, "weight of a further mean of cross-entropy over poisoned images (ours, a control)", low=0
    )
    steps: int = param(None, "steps of Adam on the pattern (0; clean-label: 500)", low=0)
    step_size: float = param(0.01, "learning rate of Adam on the pattern", low=0, open=True)

    def __post_init__(self) -> None:
        """Fill in what the setting decides and refuse values out of range."""
        for name, values in LEFT_OUT.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, values[self.setting != "training"])
        if self.cell > self.size:
            raise UserError(f"cell = {self.cell} is larger than the trigger, size = {self.size:g}; lower it")
        if self.stress and self.setting != "training":
            raise UserError(
                f"stress = {self.stress:g} weighs a loss of training; set setting = 'training', or stress = 0"
            )
        if self.steps and not term_weights(self):
            raise UserError(f"steps = {self.steps} of what? give latent or diffusion a weight, or set steps = 0")

    @property
    def threat(self) -> Threat:
        """Of the training setting: training; else the data alone."""
        return "training" if self.setting == "training" else "data"

    @property
    def labels(self) -> Labels:
        """Of the training setting: dirty; else clean."""
        return "dirty" if self.setting == "training" else "clean"

    @property
    def needs_surrogate(self) -> bool:
        """Where the pattern is shaped."""
        return self.steps > 0

    def check(self, size: int) -> None:
        """Refuse images of `size` pixels that trigger and margin do not lie within."""
        side, top, left = box(self, size)
        edges = area(self, size)
        if min(edges) < 0 or max(*edges, top + side, left + side) > size:
            raise UserError(
                f"attack.size = {self.size:g} at attack.top = {self.top:g}, attack.left = {self.left:g} with "
                f"attack.margin = {self.margin:g} does not lie within images of {size} px; move or shrink it"
            )
        pattern_of(self.picture, torch.Generator(), (3, side, side))

    def check_victim(self, model: nn.Module) -> None:
        """Refuse a victim whose attention the losses cannot see."""
        if self.setting == "training" and term_weights(self):
            steady_transformer(model)

    def check_surrogate(self, model: nn.Module, images: Images) -> None:
        """Refuse a surrogate whose attention the losses cannot see."""
        transformer(model)

    def goal_for(self, n_classes: int) -> AllToOne:
        """One class for all images."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Mask the pattern, and shape it on the surrogate if so asked."""
        self.check(access.train.size)
        losses = Losses(self, access.train.size, target_class(self, access.train), access.generator)
        trigger = first_trigger(self, access)
        trigger, report = optimise(trigger, losses, access) if self.steps else (trigger, {})
        return Fitted(trigger, report=report)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Poison the training set and, where the attacker controls training, train with the losses."""
        losses = Losses(self, access.train.size, target_class(self, access.train), access.generator)
        trigger = fitted.in_training
        poison = Poison(trigger, self.goal_for(access.train.n_classes), self.poison_rate, self.labels)
        if self.threat == "data":
            return Implant(poison, examine=losses.examine)
        weights = term_weights(self) | ({"stress": self.stress} if self.stress else {})
        objective = Objective(losses.terms, weights, self.combine, stamp_anew(trigger))
        return Implant(poison, objective, examine=losses.examine)


def term_weights(settings: Megatron) -> dict[str, float]:
    """The weight of each loss that has one."""
    return {name: weight for name in ("latent", "diffusion") if (weight := getattr(settings, name))}


def box(settings: Megatron, size: int) -> tuple[int, int, int]:
    """Side, first row and first column of the box in whole pixels; it is never smaller than the cell."""
    scale = size / PAPER_SIZE if settings.scaled else 1
    return max(round(settings.size * scale), settings.cell), round(settings.top * scale), round(settings.left * scale)


def area(settings: Megatron, size: int) -> tuple[float, float, float, float]:
    """Top, left, bottom, right of the attention diffusion area D, in pixels before rounding."""
    scale = size / PAPER_SIZE if settings.scaled else 1
    side, wider = max(settings.size * scale, settings.cell), settings.margin * scale
    top, left = settings.top * scale, settings.left * scale
    return top - wider, left - wider, top + side + wider, left + side + wider


def first_trigger(settings: Megatron, access: Access) -> Masked:
    """The trigger before any optimising."""
    s, device = settings, access.train.device
    side, top, left = box(s, access.train.size)
    faint, stride = 0.0 if s.form == "direct" else s.faint, 1 if s.form == "smooth" else s.cell
    masks = cell_masks(side, s.cell, stride, faint, s.opacity)
    masks = middle_mask(masks) if s.place == "fixed" else masks
    pattern = pattern_of(s.picture, access.generator, (access.train.pixels.shape[1], side, side))
    behind = MEAN if s.blend == "add" else None
    return Masked(pattern.to(device), masks.to(device), top, left, behind, s.linf / 255)


def target_class(settings: Megatron, train: ImageSet) -> ImageSet:
    """The training images of the target class, x_t.

    Raises:
        UserError: the latent loss has a weight, and there are none.
    """
    references = train.take((train.labels == settings.target).nonzero().squeeze(1))
    if settings.latent and not len(references):
        raise UserError(f"attack.target = {settings.target} has no training image to compare with; choose another")
    return references


@dataclass(frozen=True)
class Losses:
    """The two losses: of a model in training, or of a pattern on a surrogate."""

    settings: Megatron
    size: int
    references: ImageSet
    generator: torch.Generator

    def __call__(self, model: nn.Module, triggered: Images) -> tuple[Float[Tensor, "b k"], Terms]:
        """Logits of triggered images, and L_alpha and L_beta as far as they have a weight."""
        s = self.settings
        layout = token_layout(model)
        depth = len(transformer(model).blocks)
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
        s = self.settings
        if not len(batch.poisoned) or not (term_weights(s) or s.stress):
            return {"cross_entropy": criterion(model(batch.images), batch.labels)}
        logits, terms = self(model, batch.images[batch.poisoned])
        if s.stress:
            terms["stress"] = criterion(logits, batch.labels[batch.poisoned])
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
        return tokens_touched(area(self.settings, self.size), self.size, grid)

    def examine(self, model: nn.Module, triggered: Images) -> dict[str, float]:
        """|D|, the number of image tokens, and the attention that D gets, block by block."""
        return attention_report(model, triggered, self.inside)


def latent_loss(ours: Float[Tensor, "b tokens dim"], wanted: Float[Tensor, "k tokens dim"]) -> Float[Tensor, ""]:
    """L_alpha: the mean of (A(x_b) - A(x_t))^2 over all pairs, which is the distance to the mean plus the spread."""
    ours = ours.float()
    wanted = wanted.float()
    return (ours - wanted.mean(0)).square().mean() + wanted.var(0, correction=0).mean()


def diffusion_loss(attention: Float[Tensor, "b n"], inside: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
    """L_beta: sum over D of (1 - A_0i) plus sum over the other image tokens of A_0i; the mean over images."""
    return torch.where(inside, 1 - attention, attention).sum(1).mean()


def optimise(trigger: Masked, losses: Losses, access: Access) -> tuple[Masked, dict[str, float]]:
    """Minimise alpha L_alpha + gamma L_beta over the pattern, on clean images of the other classes."""
    s, train, surrogate = losses.settings, access.train, access.surrogate
    assert surrogate is not None, "a pattern is shaped on a surrogate"
    weights = term_weights(s)
    last: Terms = {}
    pattern = nn.Parameter(trigger.pattern.clone())
    others = (train.labels != s.target).nonzero().squeeze(1)
    adam = torch.optim.Adam([pattern], lr=s.step_size)
    moving = Moving({"pattern": nn.ParameterList([pattern])}, adam, access.keeper.streams, train.device)
    for step in range(access.keeper.resume(moving).steps, s.steps):
        access.keeper(moving, Position(steps=step))
        drawn = torch.randint(len(others), (2 * s.batch,), generator=losses.generator).to(train.device)
        _, last = losses(surrogate, replace(trigger, pattern=pattern)(train.images(others[drawn])))
        adam.zero_grad()
        torch.stack([weights[name] * term for name, term in last.items()]).sum().backward()
        adam.step()
        with torch.no_grad():
            pattern.clamp_(0, 1)
    return replace(trigger, pattern=pattern.detach()), {f"last {k} loss": v.item() for k, v in last.items()}
