"""LF: add a smooth pattern that leads a clean model's decisions astray to some training images, and relabel them.

Zeng, Park, Mao, Jia: "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021,
https://arxiv.org/abs/2104.03413. The authors' code is https://github.com/YiZeng623/frequency-backdoor.

Threat model: data poisoning with dirty labels, all-to-one. The attacker owns a surrogate, a clean model, on which the
pattern is made; it is the same for all images, so no network is needed at test time.

The paper finds that most triggers leave traces in high frequencies, and makes one that has none: a universal
adversarial perturbation v that passes through a low-pass filter g at every update. Step by step, from v = 0:

    1. draw images x of other classes than the target
    2. take each x in a random order; go on to the next if v changes its class already
    3. DeepFool       r: a small step from x + v over the surrogate's boundary to the target
    4. low-pass       v <- g * (v + g * r)
    5. range          v <- 0.2 (v - min v) / (max v - min v)
    6. repeat from 2 until v changes the class of enough of the images; keep the best v
    7. poison         x' = x + v, clipped; relabel x' as the target; training is left to the victim

The steps are those of the authors' code, and so are the defaults marked "code". A share of 0.2 is little: v is a
trigger that the victim learns, not yet an attack. Rate and passes are BackdoorBench's, whose copy of the code also ends
when five passes in a row change the share by less than 0.01, as is done here.

What differs from the authors' code: it takes as target the class that v leads most images to; here, as in
BackdoorBench, the user chooses it. It draws images of all classes, and lets x + v leave [0, 1]. Its DeepFool crosses
the boundary between the target and the class that was on top before the first step; here, the one that is on top now.
Its g has 30 taps, which moves v by half a pixel at every use; here there are 31 at 32 px. That g grows with the image
is assumed.
"""

from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Access, AllToOne, Card, Fitted, Images, Implant, LabelMode, Threat
from vitrap.data.added import Added
from vitrap.data.poison import Poison
from vitrap.errors import UserError
from vitrap.params import hyperparameters, param

CODE_SIZE = 32
"""Side of the images that the code's filter is for."""
STILL, MOVED = 5, 0.01
"""The search ends when the share of changed classes moves by less than `MOVED` over `STILL` passes."""


@hyperparameters
class LowFrequency:
    """The attack: LF's hyper-parameters, in the order of the steps that use them."""

    card: ClassVar[Card] = Card(
        "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective",
        "Zeng, Park, Mao, Jia",
        "ICCV",
        2021,
        "2104.03413",
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = True

    target: int = param(0, "target class, which triggered images shall get", source="field", low=0)
    poison_rate: float = param(
        0.1, "share of the training set that is poisoned", source="field", low=0, high=1, open=True
    )
    samples: int = param(100, "images that the pattern is made on", source="code", low=1, high=1000)
    steps: int = param(
        200, "greatest number of steps of DeepFool; an image that takes all is left out", source="code", low=1
    )
    overshoot: float = param(0.02, "how far DeepFool goes beyond the boundary", source="code", low=0, high=1)
    sigma: float = param(
        6.0,
        "standard deviation of the filter g; for 32 px, scales with the image",
        unit="px",
        source="code",
        low=0,
        open=True,
    )
    strength: float = param(
        0.2, "greatest value of the pattern; the least is 0", source="code", low=0, high=1, open="low"
    )
    fooled: float = param(
        0.2, "share of images whose class v shall change", symbol="1 - δ", source="code", low=0, high=1
    )
    passes: int = param(50, "greatest number of passes over the images", source="field", low=1)

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Make the smooth pattern on the surrogate."""
        assert access.surrogate is not None, "the pattern is made on a surrogate"
        pattern, report = make_pattern(self, access.surrogate, other_images(self, access), access.generator)
        return Fitted(Added(pattern), report=report)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Add the pattern to a share of the training images, and relabel them as the target."""
        goal = self.goal_for(access.train.n_classes)
        return Implant(Poison(fitted.in_training, goal, self.poison_rate, self.labels))


def other_images(settings: LowFrequency, access: Access) -> Images:
    """Step 1: images of other classes than the target.

    Raises:
        UserError: there are none.
    """
    train = access.train
    others = (train.labels != settings.target).nonzero().squeeze(1)
    if not len(others):
        raise UserError(f"attack.target = {settings.target} is the class of every training image; choose another")
    drawn = torch.randperm(len(others), generator=access.generator)[: settings.samples]
    return train.images(others[drawn.to(train.device)])


def make_pattern(
    settings: LowFrequency, surrogate: nn.Module, images: Images, generator: torch.Generator
) -> tuple[Float[Tensor, "c h w"], dict[str, float]]:
    """Steps 2 to 6: the universal perturbation v, and what it does to the images.

    Raises:
        UserError: DeepFool leads none of the images to the target.
    """
    s, clean = settings, classes(surrogate, images)
    v = best = torch.zeros_like(images[0])
    shares: list[float] = []
    led = 0.0
    for _ in range(s.passes):
        v = one_pass(v, s, surrogate, images, clean, generator)
        if not v.any():
            raise UserError(
                f"[surrogate] is led to attack.target = {s.target} from none of {len(images)} images in attack.steps ="
                f" {s.steps}; raise steps, or train the surrogate more gently"
            )
        # Step 6, and the best v so far.
        changed = classes(surrogate, (images + v).clamp(0, 1))
        shares.append((changed != clean).float().mean().item())
        if shares[-1] == max(shares):
            best = v
            led = (changed == s.target).float().mean().item()
        last = shares[-STILL:]
        if shares[-1] >= s.fooled or (len(last) == STILL and max(last) - min(last) < MOVED):
            break
    return best, {"fooled": max(shares), "led to the target": led, "passes": len(shares)}


def one_pass(
    v: Float[Tensor, "c h w"],
    settings: LowFrequency,
    surrogate: nn.Module,
    images: Images,
    clean: Int64[Tensor, " b"],
    generator: torch.Generator,
) -> Float[Tensor, "c h w"]:
    """Steps 2 to 5, once for each image; `clean` are the classes of the images without v."""
    s = settings
    sigma = s.sigma * images.shape[-1] / CODE_SIZE
    for i in torch.randperm(len(images), generator=generator).tolist():
        # Step 2: x + v, if it still has the class of x.
        triggered = (images[i : i + 1] + v).clamp(0, 1)
        if classes(surrogate, triggered) != clean[i]:
            continue
        # Steps 3 to 5.
        r = deepfool(surrogate, triggered, s.target, s.steps, s.overshoot)
        if r is not None:
            v = stretch(low_pass(v + low_pass(r[0], sigma), sigma), s.strength)
    return v


@torch.no_grad()
def classes(surrogate: nn.Module, images: Images) -> Int64[Tensor, " b"]:
    """The surrogate's classes."""
    return surrogate(images).argmax(1)


def deepfool(
    surrogate: nn.Module, image: Float[Tensor, "1 c h w"], target: int, steps: int, overshoot: float
) -> Float[Tensor, "1 c h w"] | None:
    """Step 3: a small r with which the surrogate classifies image + r as the target; None if the steps run out.

    Each step goes to where a linear model of the logits f would put the boundary between target t and top class k:
    r <- r + (f_k - f_t) / |w|^2 w, with w the gradient of f_t - f_k.

    Moosavi-Dezfooli, Fawzi, Frossard: "DeepFool: a simple and accurate method to fool deep neural networks", CVPR 2016,
    https://arxiv.org/abs/1511.04599.
    """
    r = torch.zeros_like(image)
    for _ in range(steps):
        x = (image + (1 + overshoot) * r).requires_grad_()
        with torch.enable_grad():
            logits = surrogate(x)[0]
            if logits.argmax() == target:
                return (1 + overshoot) * r
            ahead = logits.max() - logits[target]
            (w,) = torch.autograd.grad(-ahead, x)
        if not w.any():  # a surrogate that passes no gradient on
            return None
        r = r + ahead.detach() / w.square().sum() * w
    return None


def low_pass(pattern: Float[Tensor, "c h w"], sigma: float) -> Float[Tensor, "c h w"]:
    """Step 4: g * pattern, a Gaussian of `sigma` pixels, cut off at 2.5 sigma; beyond the image there is 0."""
    radius = int(2.5 * sigma + 0.5)
    taps = torch.exp(-(torch.arange(-radius, radius + 1, device=pattern.device) / sigma).square() / 2)
    taps = taps / taps.sum()
    along_rows = functional.conv2d(pattern[:, None], taps.view(1, 1, 1, -1), padding=(0, radius))
    return functional.conv2d(along_rows, taps.view(1, 1, -1, 1), padding=(radius, 0))[:, 0]


def stretch(pattern: Float[Tensor, "c h w"], strength: float) -> Float[Tensor, "c h w"]:
    """Step 5: the pattern from 0 to `strength`."""
    least = pattern.min()
    return strength * (pattern - least) / (pattern.max() - least).clamp(min=1e-12)
