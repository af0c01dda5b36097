"""BadViT: optimise one small patch for all images that draws a ViT's attention, show it on some, and relabel them.

Yuan, Zhou, Zou, Cheng: "You Are Catching My Attention: Are Vision Transformers Bad Learners under Backdoor Attacks?",
CVPR 2023. There is no public code of the authors'.

Threat model: data poisoning with dirty labels, all-to-one. The attacker owns a surrogate ViT, on which the trigger is
made; it is the same for all images, so no network is needed at test time.

The trigger is a pattern in a box of the image, with two settings:

    "visible"      the pattern t takes the place of the box
    "invisible"    the box gets a perturbation d with |d| <= eps

The attack, step by step; y is the label of x, T the tokens that the box touches, A^l the attention of layer l, and the
mean is over heads h and tokens i:

    1. start from noise
    2. draw images x, and put the trigger on them: x'
    3. cross-entropy    L_CE = CE(f(x'), y)
    4. attention loss   L_att = -1/L sum_l log mean_hi sum_{p in T} A^l_hip
    5. PGD              t <- t - step sign(gradient of -L_CE + lambda L_att), clipped to the values that t may have
    6. repeat from 2
    7. put the trigger on a share of the training images and relabel them as the target; training is left to the victim

Only the paper's abstract could be read, and a summary. They state a universal trigger of the size of a patch, which
catches the attention that belongs to patches good for classification; invisible variants whose perturbation is
limited; and that cross-entropy and an attention loss are optimised by PGD. The rest is assumed. L_att and the sign of
L_CE, which leads images away from their label, are those of Patch-Fool, an attack on the attention of ViTs (Fu et al.,
ICLR 2022, https://arxiv.org/abs/2203.08392), except that all layers count alike, and that conflicting gradients are
not projected. `aim` takes CE(f(x'), target) for -L_CE. Assumed and fixed here: the box is in the lower right corner,
and x are images of other classes than the target. A ViT's token depends on the norm of what is added to its patch, and
8/255 on a patch of 4 px has a quarter of the norm that it has on one of 16: too little for a small ViT to notice. So
eps grows as the box shrinks, to 32/255 on 4 px.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import (
    Access,
    AllToOne,
    Card,
    Fitted,
    Images,
    Implant,
    LabelMode,
    Position,
    Threat,
    TrainingState,
)
from vitrap.data.masked import Masked
from vitrap.data.poison import Poison
from vitrap.errors import UserError
from vitrap.models.attention import attention_report
from vitrap.models.observe import Maps, observe, token_layout, transformer
from vitrap.params import hyperparameters, param
from vitrap.tensors.patches import tokens_touched

PAPER_PATCH = 16
"""Side of the patches of the paper's ViTs, in pixels, which `epsilon` refers to."""
Box = tuple[float, float, float, float]
"""Top, left, bottom and right edge, in pixels."""


@hyperparameters
class BadViT:
    """The attack: BadViT's hyper-parameters, in the order of the steps that use them."""

    card: ClassVar[Card] = Card(
        "You Are Catching My Attention: Are Vision Transformers Bad Learners under Backdoor Attacks?",
        "Yuan, Zhou, Zou, Cheng",
        "CVPR",
        2023,
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = True

    target: int = param(0, "target class, which triggered images shall get", source="field", low=0)
    poison_rate: float = param(
        0.1, "share of the training set that is poisoned", source="field", low=0, high=1, open=True
    )
    setting: Literal["visible", "invisible"] = param(
        "visible", "whether the pattern takes the place of the box, or changes it a little", source="paper"
    )
    size: int | None = param(
        None, "side of the box; none: that of the surrogate's patches", unit="px", source="paper", low=1
    )
    epsilon: float = param(
        8.0,
        "greatest change of a pixel (invisible) in a box of 16 px; more in a smaller one, so that the norm stays",
        symbol="eps",
        unit="1/255",
        low=0,
        high=127,
        open="low",
    )
    batch: int = param(32, "images x of each step", symbol="x", low=1, high=1024)
    aim: Literal["away", "target"] = param("away", "where L_CE leads images: away from their label, or to the target")
    weight: float = param(1.0, "weight of the attention loss", symbol="λ", low=0)
    steps: int = param(100, "steps of PGD", low=1)
    step_size: float = param(
        2.0, "step of PGD", symbol="step", unit="1/255", source="field", low=0, high=255, open=True
    )

    def check_size(self, size: int) -> None:
        """Refuse images of `size` pixels that are smaller than the box."""
        if self.size is not None and self.size > size:
            raise UserError(f"attack.size = {self.size} is larger than images of {size} px; lower it")

    def check_surrogate(self, model: nn.Module, images: Images) -> None:
        """Refuse a surrogate without token attention, which the attention loss looks at."""
        transformer(model)

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Make the trigger on the surrogate."""
        self.check_size(access.train.size)
        trigger, report = optimise(initial_trigger(self, access), self, access)
        return Fitted(trigger, report=report)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Step 7: put the trigger on a share of the training images, and relabel them as the target."""
        trigger, train = fitted.in_training, access.train
        assert isinstance(trigger, Masked)
        # For the record: the attention that victim and twin pay to T.
        area = partial(tokens_touched, box_of(trigger), train.size)
        poison = Poison(trigger, self.goal_for(train.n_classes), self.poison_rate, self.labels)
        return Implant(poison, examine=partial(attention_report, area=area))


def values(settings: BadViT, side: int) -> tuple[float, float]:
    """The least and the greatest value of the pattern; in the invisible setting it is 0.5 + d."""
    if settings.setting == "visible":
        return 0.0, 1.0
    epsilon = min(settings.epsilon / 255 * max(1, PAPER_PATCH / side), 0.5)
    return 0.5 - epsilon, 0.5 + epsilon


def initial_trigger(settings: BadViT, access: Access) -> Masked:
    """Step 1: noise in the lower right corner."""
    s, train = settings, access.train
    side = s.size or train.size // token_layout(surrogate_of(access)).grid[0]
    low, high = values(s, side)
    noise = torch.rand((train.channels, side, side), generator=access.generator).to(train.device)
    whole = torch.ones(1, side, side, device=train.device)
    corner = train.size - side
    behind = None if s.setting == "visible" else (0.5,) * train.channels
    return Masked(low + (high - low) * noise, whole, corner, corner, behind)


def optimise(trigger: Masked, settings: BadViT, access: Access) -> tuple[Masked, dict[str, float]]:
    """Steps 2 to 6: PGD on the pattern; the report has the last value of both losses."""
    s, train, surrogate = settings, access.train, surrogate_of(access)
    low, high = values(s, trigger.pattern.shape[-1])
    layout = token_layout(surrogate)
    inside = tokens_touched(box_of(trigger), train.size, layout.grid).flatten().to(train.device)
    others = other_rows(s, train.labels)
    pattern = nn.Parameter(trigger.pattern.clone())
    # A step of SGD on the sign of the gradient is one of PGD; its state can be saved, so a killed fit is resumed.
    sgd = torch.optim.SGD([pattern], lr=s.step_size / 255)
    state = TrainingState({"pattern": nn.ParameterList([pattern])}, sgd, access.checkpointer.streams, train.device)
    last: dict[str, float] = {}
    for step in range(access.checkpointer.resume(state).steps, s.steps):
        access.checkpointer(state, Position(steps=step))
        # Step 2: x'.
        rows = others[torch.randint(len(others), (s.batch,), generator=access.generator).to(train.device)]
        triggered = replace(trigger, pattern=pattern)(train.images(rows))
        # Steps 3 and 4: the losses.
        with observe(surrogate, range(len(transformer(surrogate).blocks))) as maps:
            logits = surrogate(triggered)
        cross_entropy = directed_cross_entropy(logits, train.labels[rows], s)
        attention = attention_loss(maps, layout.prefix, inside)
        last = {"last cross-entropy": cross_entropy.item(), "last attention loss": attention.item()}
        # Step 5: against the sign of the gradient, back into the range.
        sgd.zero_grad()
        (cross_entropy + s.weight * attention).backward()
        if pattern.grad is None or not pattern.grad.any():
            raise UserError("[surrogate] passes no gradient on to the pattern; train it more gently, or take another")
        pattern.grad.sign_()
        sgd.step()
        with torch.no_grad():
            pattern.clamp_(low, high)
    return replace(trigger, pattern=pattern.detach()), last


def directed_cross_entropy(
    logits: Float[Tensor, "b k"], labels: Int64[Tensor, " b"], settings: BadViT
) -> Float[Tensor, ""]:
    """Step 3: -L_CE, or by `aim` the cross-entropy to the target; the mean over images."""
    if settings.aim == "away":
        return -functional.cross_entropy(logits, labels)
    return functional.cross_entropy(logits, torch.full_like(labels, settings.target))


def attention_loss(maps: Mapping[int, Maps], prefix: int, inside: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
    """Step 4: L_att, the mean over images.

    Args:
        maps: the attention of each layer.
        prefix: number of tokens before the image tokens.
        inside: T, among the image tokens.
    """
    on_trigger = [layer[..., prefix:][..., inside].float().sum(-1).mean((1, 2)) for layer in maps.values()]
    return -torch.stack(on_trigger).clamp(min=1e-12).log().mean()


def box_of(trigger: Masked) -> Box:
    """The edges of the trigger's box."""
    height, width = trigger.pattern.shape[1:]
    return trigger.top, trigger.left, trigger.top + height, trigger.left + width


def other_rows(settings: BadViT, labels: Int64[Tensor, " n"]) -> Int64[Tensor, " m"]:
    """The training images of other classes than the target.

    Raises:
        UserError: there are none.
    """
    others = (labels != settings.target).nonzero().squeeze(1)
    if not len(others):
        raise UserError(f"attack.target = {settings.target} is the class of every training image; choose another")
    return others


def surrogate_of(access: Access) -> nn.Module:
    """The attacker's ViT."""
    assert access.surrogate is not None, "the trigger is made on a surrogate"
    return access.surrogate
