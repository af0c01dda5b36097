"""MEGATRON: draw a ViT's attention to a few faint pixels, by training the ViT or by shaping the pixels.

Two papers of Gong, Tian, Xue, Li, Chen, Wang, as two settings of one attack:

    "training"      "Backdooring Vision Transformers with Invisible Triggers", preprint, January 2024.
                    Threat model: the attacker controls training; labels are dirty, all-to-one.
    "clean-label"   "Megatron: Evasive Clean-Label Backdoor Attacks against Vision Transformer",
                    https://arxiv.org/abs/2412.04776. Threat model: the attacker poisons images of the target class,
                    changes no label, and owns a surrogate ViT.

The trigger is a pattern shown through an opacity mask in a small box: one cell of the box is strong, the rest faint.
Two losses tie it to attention. x_b is an image with the trigger, x_t a clean image of the target class, A_0i the
attention that the class token pays to image token i, and D the attention diffusion area: the tokens of the box and
around it.

    L_alpha = |A(x_b) - A(x_t)|^2                                   latent loss, on outputs of attention layers
    L_beta  = sum_{i in D} (1 - A_0i) + sum_{i not in D} A_0i       attention diffusion loss

The steps of each setting:

    "training"      1. put the trigger, with a given pattern, on a share of the training images; relabel them
                    2. train the victim on cross-entropy + alpha L_alpha + beta L_beta
    "clean-label"   1. minimise alpha L_alpha + gamma L_beta over the pattern, on the surrogate
                    2. put the trigger on a share of the target class; training is left to the victim

Defaults marked "code" are, for the training setting, those of https://github.com/boweitian/Megatron_2025; those of the
clean-label setting are assumed. docs/studies/megatron.md lists what this file does otherwise than that code, and why.
Assumed and fixed here: both losses are means over poisoned images; A_0i is the mean over heads and over the rows of the
tokens that feed the classifier (the class token, or all pooled tokens); squared distances are means over tokens and
channels; target images pass no gradient.

`stress` is ours, a control: like both losses it makes poisoned images count for more, but it says nothing of attention.
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
    Combine,
    Criterion,
    Fitted,
    Images,
    ImageSet,
    Implant,
    LabelMode,
    Objective,
    Position,
    Threat,
    TrainingState,
)
from vitrap.data.masked import Masked
from vitrap.data.pattern import make_pattern
from vitrap.data.poison import Poison, stamp_after_augmentation
from vitrap.errors import UserError
from vitrap.models.attention import AttentionMap, attention_report, blocks_needed, token_attention
from vitrap.models.observe import attention_outputs, observe, token_layout, transformer, transformer_keeping_tokens
from vitrap.params import DefaultFrom, hyperparameters, param
from vitrap.tensors.masks import cell_masks, middle_mask
from vitrap.tensors.patches import tokens_touched

Terms = dict[str, Float[Tensor, ""]]
PAPER_SIZE = 224
"""Side of the papers' images, in pixels, which `size`, `top`, `left` and `margin` refer to."""
MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean colour, which the public code subtracts from the pattern before adding it to the image."""


def by_setting(training: float | str, clean_label: float | str) -> DefaultFrom:
    """A default for each setting."""
    return DefaultFrom("setting", {"training": training, "clean-label": clean_label})


@hyperparameters
class Megatron:
    """The attack: both papers' hyper-parameters, in the order of the steps that use them."""

    card: ClassVar[Card] = Card(
        "Megatron: Evasive Clean-Label Backdoor Attacks against Vision Transformer",
        "Gong, Tian, Xue, Li, Chen, Wang",
        "arXiv",
        2024,
        "2412.04776",
    )
    version: ClassVar[int] = 1

    target: int = param(0, "target class, which triggered images shall get", low=0)
    poison_rate: float = param(
        by_setting(0.1, 0.5), "share that is poisoned: of the training set, or with clean labels of the target class",
        low=0, high=1, open="low",
    )  # fmt: skip
    setting: Literal["training", "clean-label"] = param("training", "what the attacker controls", source="paper")
    picture: str = param("noise", "pattern, or where its optimising starts", choices=("noise", "white"), file=True)
    size: float = param(
        by_setting(16.0, 112.0), "box side (clean-label: ours)", unit="px", source="code", low=0, open=True
    )
    top: float = param(10.0, "first row of the box", unit="px", source="code", low=0)
    left: float = param(10.0, "first column of the box", unit="px", source="code", low=0)
    margin: float = param(4.0, "how far D extends beyond the box", symbol="D", unit="px", source="code", low=0)
    scaled: bool = param(True, "size, top, left, margin are for 224 px and scale with the image; false: as given")
    cell: int = param(2, "side of the strong cell, never scaled: 2 for four pixels", unit="px", source="paper", low=1)
    opacity: float = param(0.7, "opacity of the strong cell", source="code", low=0, high=1)
    faint: float = param(by_setting(0.05, 0.3), "opacity around it (clean-label: ours)", source="code", low=0, high=1)
    form: Literal["mask", "direct", "smooth"] = param(
        "mask", "where the cell may lie: on a grid that tiles the box; the same, opacity 0 around it; at every pixel"
    )
    place: Literal["fixed", "hashed"] = param("fixed", "the cell's place: the middle, or picked by a hash of the image")
    blend: Literal["over", "add"] = param("over", "with mask m and pattern t: (1 - m) x + m t, or x + m (t - mean)")
    linf: float = param(0.0, "greatest change of a pixel before rounding; 0: no bound", unit="1/255", low=0, high=255)
    latent: float = param(by_setting(0.1, 1.0), "weight of the latent loss", symbol="α", low=0)
    layers: Literal["all", "last"] = param(by_setting("all", "last"), "layers of the latent loss", source="paper")
    batch: int = param(
        16, "target images x_t that each step draws; 1: always the first", symbol="x_t", low=1, high=1024
    )
    diffusion: float = param(by_setting(0.1, 1.0), "weight of the attention diffusion loss", symbol="β, γ", low=0)
    attention: AttentionMap = param("last", "map A: last layer, rollout, or gradient rollout", symbol="A")
    discard: float = param(0.9, "share of each layer that gradient rollout drops", source="code", low=0, high=0.99)
    combine: Combine = param("fixed", "how the losses of training are combined")
    stress: float = param(0.0, "weight of a second cross-entropy on poisoned images alone (ours, a control)", low=0)
    steps: int = param(by_setting(0, 500), "steps of Adam on the pattern", low=0)
    step_size: float = param(0.01, "learning rate of Adam on the pattern", low=0, open=True)

    def check_settings(self) -> None:
        """Refuse combinations without a meaning."""
        if self.cell > self.size:
            raise UserError(f"cell = {self.cell} is larger than the trigger, size = {self.size:g}; lower it")
        if self.stress and self.setting != "training":
            raise UserError(f"stress = {self.stress:g} weighs a loss of training; set setting = 'training', or it to 0")
        if self.steps and not loss_weights(self):
            raise UserError(f"steps = {self.steps} have no loss: latent = diffusion = 0; weigh one, or set steps = 0")

    @property
    def threat(self) -> Threat:
        """What the attacker controls: training, or the data alone."""
        return "training" if self.setting == "training" else "data"

    @property
    def labels(self) -> LabelMode:
        """Whether poisoned images change their label (training) or keep it (clean-label)."""
        return "dirty" if self.setting == "training" else "clean"

    @property
    def needs_surrogate(self) -> bool:
        """Only where a pattern is optimised."""
        return self.steps > 0

    def check_size(self, size: int) -> None:
        """Refuse images of `size` pixels that are too small for the box and its margin."""
        side, top, left = box(self, size)
        edges = diffusion_area(self, size)
        if min(edges) < 0 or max(*edges, top + side, left + side) > size:
            raise UserError(
                f"attack.size = {self.size:g} at attack.top = {self.top:g}, attack.left = {self.left:g} with "
                f"attack.margin = {self.margin:g} does not lie within images of {size} px; move or shrink it"
            )
        make_pattern(self.picture, torch.Generator(), (3, side, side))  # refuses a picture that cannot be read

    def check_victim(self, model: nn.Module) -> None:
        """Refuse a victim whose attention the losses cannot see."""
        if self.setting == "training" and loss_weights(self):
            transformer_keeping_tokens(model)

    def check_surrogate(self, model: nn.Module, images: Images) -> None:
        """Refuse a surrogate whose attention the losses cannot see."""
        transformer(model)

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Make the trigger and, where it has steps, optimise its pattern on the surrogate."""
        self.check_size(access.train.size)
        losses = Losses(self, access.train.size, target_class(self, access.train), access.generator)
        trigger = initial_trigger(self, access)
        if not self.steps:
            return Fitted(trigger)
        trigger, report = optimise(trigger, losses, access)
        return Fitted(trigger, report=report)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Poison the training set and, in the training setting, add both losses to the victim's training."""
        losses = Losses(self, access.train.size, target_class(self, access.train), access.generator)
        trigger = fitted.in_training
        poison = Poison(trigger, self.goal_for(access.train.n_classes), self.poison_rate, self.labels)
        if self.threat == "data":
            return Implant(poison, examine=losses.examine)
        weights = loss_weights(self) | ({"stress": self.stress} if self.stress else {})
        # The attacker controls training: the trigger is put on after augmentation, so no crop or flip moves it.
        objective = Objective(losses.terms, weights, self.combine, stamp_after_augmentation(trigger))
        return Implant(poison, objective, examine=losses.examine)


def loss_weights(settings: Megatron) -> dict[str, float]:
    """The weights of L_alpha and L_beta, without those that are 0."""
    weights = {"latent": settings.latent, "diffusion": settings.diffusion}
    return {name: weight for name, weight in weights.items() if weight}


def box_in_pixels(settings: Megatron, size: int) -> tuple[float, float, float, float]:
    """Side, first row, first column and margin of the box in images of `size` pixels, before rounding."""
    scale = size / PAPER_SIZE if settings.scaled else 1
    side = max(settings.size * scale, settings.cell)
    return side, settings.top * scale, settings.left * scale, settings.margin * scale


def box(settings: Megatron, size: int) -> tuple[int, int, int]:
    """Side, first row and first column of the box in whole pixels; it is never smaller than the cell."""
    side, top, left, _ = box_in_pixels(settings, size)
    return round(side), round(top), round(left)


def diffusion_area(settings: Megatron, size: int) -> tuple[float, float, float, float]:
    """Top, left, bottom and right edge of D, in fractional pixels: rounded, they could add or drop a row of tokens."""
    side, top, left, margin = box_in_pixels(settings, size)
    return top - margin, left - margin, top + side + margin, left + side + margin


def initial_trigger(settings: Megatron, access: Access) -> Masked:
    """The trigger before any optimising: the pattern under one mask, or under a mask for each place of the cell."""
    s, train = settings, access.train
    side, top, left = box(s, train.size)
    stride = 1 if s.form == "smooth" else s.cell
    masks = cell_masks(side, s.cell, stride, 0.0 if s.form == "direct" else s.faint, s.opacity)
    if s.place == "fixed":
        masks = middle_mask(masks)
    pattern = make_pattern(s.picture, access.generator, (train.channels, side, side))
    subtracted = MEAN if s.blend == "add" else None
    return Masked(pattern.to(train.device), masks.to(train.device), top, left, subtracted, s.linf / 255)


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
    """Computes L_alpha and L_beta, for a victim in training or for a pattern that is optimised on the surrogate.

    Attributes:
        settings: the attack's hyper-parameters.
        size: working size of the images, in pixels.
        references: clean images of the target class.
        generator: the attacker's random stream, which draws from the references.
    """

    settings: Megatron
    size: int
    references: ImageSet
    generator: torch.Generator

    def __call__(self, model: nn.Module, triggered: Images) -> tuple[Float[Tensor, "b k"], Terms]:
        """Logits of triggered images, and those of the two losses that have a weight."""
        s = self.settings
        # Only the blocks that a loss needs are observed: observing one switches its fused attention off.
        depth = len(transformer(model).blocks)
        mapped = blocks_needed(s.attention, depth) if s.diffusion else ()
        first = 0 if s.layers == "all" else depth - 1
        compared = range(first, depth) if s.latent else ()
        with observe(model, mapped) as maps, attention_outputs(model, compared) as outputs:
            logits = model(triggered)
        terms: Terms = {}
        if s.latent:
            # L_alpha compares with the same layers' outputs on clean target images, without gradient.
            with torch.no_grad(), attention_outputs(model, compared) as wanted:
                model(self.target_images())
            by_layer = [latent_loss(outputs[block], wanted[block]) for block in compared]
            terms["latent"] = torch.stack(by_layer).mean()
        if s.diffusion:
            # L_beta needs the attention paid to each image token; gradient rollout differentiates the target's logit.
            layout = token_layout(model)
            attention = token_attention(maps, layout, s.attention, logits[:, s.target].sum(), s.discard)
            inside = self.inside(layout.grid).flatten().to(attention.device, non_blocking=True)
            terms["diffusion"] = diffusion_loss(attention, inside)
        return logits, terms

    def terms(self, model: nn.Module, batch: Batch, criterion: Criterion) -> Terms:
        """Cross-entropy of all images of a batch, and the losses of its poisoned ones.

        Poisoned and clean images go through the model separately: only the poisoned ones' attention is observed.
        """
        s = self.settings
        if not len(batch.poison_at) or not (loss_weights(s) or s.stress):
            return {"cross_entropy": criterion(model(batch.images), batch.labels)}
        logits, terms = self(model, batch.images[batch.poison_at])
        if s.stress:
            terms["stress"] = criterion(logits, batch.labels[batch.poison_at])
        if len(batch.rest_at):
            logits = torch.cat([logits, model(batch.images[batch.rest_at])])
        labels = batch.labels[torch.cat([batch.poison_at, batch.rest_at])]
        return {"cross_entropy": criterion(logits, labels), **terms}

    def target_images(self) -> Images:
        """Clean images of the target class: a new draw at each call, or always the first image."""
        wanted = self.settings.batch
        candidates = len(self.references) if wanted > 1 else 1
        drawn = torch.randint(candidates, (wanted,), generator=self.generator)
        return self.references.images(drawn.to(self.references.device, non_blocking=True))

    def inside(self, grid: tuple[int, int]) -> Bool[Tensor, "gh gw"]:
        """D: the tokens that the box with its margin touches."""
        return tokens_touched(diffusion_area(self.settings, self.size), self.size, grid)

    def examine(self, model: nn.Module, triggered: Images) -> dict[str, float]:
        """For the record: |D|, the number of image tokens, and the attention that D gets, block by block."""
        return attention_report(model, triggered, self.inside)


def latent_loss(ours: Float[Tensor, "b tokens dim"], wanted: Float[Tensor, "k tokens dim"]) -> Float[Tensor, ""]:
    """L_alpha of one layer: the mean of (A(x_b) - A(x_t))^2 over all pairs of a triggered and a target image.

    Over all pairs, the mean square is the squared distance to the targets' mean plus the targets' variance.
    """
    distance = ours.float() - wanted.float().mean(0)
    return distance.square().mean() + wanted.float().var(0, correction=0).mean()


def diffusion_loss(attention: Float[Tensor, "b n"], inside: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
    """L_beta: sum over D of (1 - A_0i) plus sum over the other image tokens of A_0i; the mean over images."""
    return torch.where(inside, 1 - attention, attention).sum(1).mean()


def optimise(trigger: Masked, losses: Losses, access: Access) -> tuple[Masked, dict[str, float]]:
    """Minimise alpha L_alpha + gamma L_beta over the pattern, on clean images of the other classes.

    Returns:
        The trigger with its final pattern, and the last value of each loss.
    """
    s, train = losses.settings, access.train
    assert access.surrogate is not None, "a pattern is shaped on a surrogate"
    weights = loss_weights(s)
    last: Terms = {}
    pattern = nn.Parameter(trigger.pattern.clone())
    others = (train.labels != s.target).nonzero().squeeze(1)
    adam = torch.optim.Adam([pattern], lr=s.step_size)
    # The checkpointer saves pattern, optimiser and random streams now and then, so that a killed fit can be resumed.
    state = TrainingState({"pattern": nn.ParameterList([pattern])}, adam, access.checkpointer.streams, train.device)
    for step in range(access.checkpointer.resume(state).steps, s.steps):
        access.checkpointer(state, Position(steps=step))
        # x_b: clean images of other classes, twice as many as x_t (assumed), with the pattern as it is now.
        drawn = torch.randint(len(others), (2 * s.batch,), generator=losses.generator).to(train.device)
        triggered = replace(trigger, pattern=pattern)(train.images(others[drawn]))
        _, last = losses(access.surrogate, triggered)
        # One step of Adam down the weighted sum, projected back onto valid pixels.
        adam.zero_grad()
        torch.stack([weights[name] * term for name, term in last.items()]).sum().backward()
        if step == 0 and (pattern.grad is None or not pattern.grad.any()):
            raise UserError("[surrogate] passes no gradient on to the pattern; train it more gently, or take another")
        adam.step()
        with torch.no_grad():
            pattern.clamp_(0, 1)
    return replace(trigger, pattern=pattern.detach()), {f"last {k} loss": v.item() for k, v in last.items()}
