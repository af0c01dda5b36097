"""Neural Cleanse: a class that an unusually small patch turns all images into is a backdoor's target.

Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao: "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural
Networks", IEEE S&P 2019, https://doi.org/10.1109/SP.2019.00031; code: bolunwang/backdoor.

A judgement of the whole model, from some clean images without labels:

    1. for each class y, search a mask m and a pattern p, each in [0, 1], that minimise the mean of
       cross-entropy(f((1 - m) x + m p), y) + cost * |m|, with |m| the sum of the mask
    2. after each epoch, adapt the cost: it is 0 until `patience` epochs in a row have turned 98 % of the images into y;
       from then on, so many epochs in a row with that success double it, and so many without divide it by 2^1.5
    3. the norm of a class is the least |m| of an epoch with that success; the search ends early if this norm has not
       fallen for long, and the cost has gone up and down
    4. the anomaly index of a class is (median norm - norm) / MAD, where MAD is 1.4826 times the median distance of the
       norms from their median. The model counts as backdoored where the greatest index is above 2

What differs: the searches of all classes run as one batch, each with the cost and the end of its own, so no result
changes. The code takes 1000 images an epoch and up to 1000 epochs; here it is 150 images and 80 epochs, so that 43
classes take minutes on two cores. The other half of the paper, which unlearns the trigger that was found, is left out:
a judgement leaves the model as it was. As in the code, a class that no patch reaches has the norm of its last mask, and
images of class y take part in its search. Nothing is particular to CNNs, so nothing is re-derived for ViTs.

What others' ports do: backdoor-toolbox starts with a cost above 0, and keeps the last mask that had success, not the
smallest.

What to expect: the method assumes a small patch. A trigger that covers the image, such as Blended's, needs no smaller
mask than a clean class does. And 2 is no small rate of false alarms: if all norms are drawn from one normal
distribution, the greatest index is above 2 in 64 % of cases with 43 classes, and in 33 % with 10 (20,000 draws each).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from vitrap.contracts import Card, Images, Judged, OutcomeKind, Suspect
from vitrap.errors import UserError
from vitrap.params import hyperparameters, param

PIXELS_AT_ONCE = 512 * 32**2
"""Pixels of one forward pass, or one class: 512 images at 32 px. It bounds memory, not the result."""
BETAS = (0.5, 0.9)
"""Adam's, from the code."""


@hyperparameters
class NeuralCleanse:
    """The defence: Neural Cleanse's hyper-parameters."""

    card: ClassVar[Card] = Card(
        "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks",
        "Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao",
        "IEEE S&P",
        2019,
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "judgement"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    images: int = param(150, "clean images of the search, or as many as there are", low=1, high=500)
    epochs: int = param(80, "most passes over these images", source="field", low=1)
    batch_size: int = param(32, "images per step", source="code", low=1)
    lr: float = param(0.1, "Adam's learning rate, for mask and pattern", source="code", low=0, open=True)
    cost: float = param(1e-3, "weight of |m| when it is first set", symbol="λ", source="code", low=0, open=True)
    factor: float = param(
        2.0, "what the cost is multiplied by; it is divided by factor^1.5", source="code", low=1, open=True
    )
    patience: int = param(5, "epochs in a row before the cost changes", source="code", low=1)
    success: float = param(
        0.98, "share of images in class y that counts as success", source="field", low=0, high=1, open="low"
    )
    progress: float = param(
        0.99, "the norm has fallen where it is below this share of the last one", source="code", low=0, high=1
    )
    stop: int = param(25, "epochs without a lower norm after which a class ends early", source="code", low=1)
    threshold: float = param(2.0, "anomaly index above which a class is a target", source="paper", low=0)

    def apply(self, suspect: Suspect) -> Judged:
        """Search the smallest patch of each class, and test whether one of them is an outlier."""
        if suspect.n_classes < 3:
            raise UserError(
                f"neural_cleanse compares one class with at least 2 others, and n_classes = {suspect.n_classes};"
                " choose another defence"
            )
        # Steps 1 to 3.
        clean = suspect.clean
        rows = torch.randperm(len(clean), generator=suspect.generator)[: self.images]
        patches = draw_patches(suspect)
        with suspect.computing():
            norms = smallest_norms(self, suspect, patches, clean.images(rows.to(clean.device)))
        if not norms.isfinite().all():
            raise UserError("neural_cleanse came to masks that are NaN or infinite; lower its lr")
        # Step 4.
        index = anomaly_index(norms.double().cpu())
        order = index.argsort(descending=True, stable=True)
        greatest = index[order[0]].item()
        # The likeliest target comes first, also where it is no outlier.
        above = max(1, int((index > self.threshold).sum()))
        report = {
            "anomaly index": greatest,
            "smallest norm": norms.min().item(),
            "median norm": norms.double().quantile(0.5).item(),
        }
        return Judged(greatest, self.threshold, tuple(order[:above].tolist()), index.float(), report=report)


@dataclass(frozen=True)
class Patches:
    """A mask and a pattern for each class, as numbers without bounds: (tanh + 1) / 2 brings them into [0, 1]."""

    masks: Float[Tensor, "k 1 h w"]
    patterns: Float[Tensor, "k c h w"]

    def mask(self, classes: Int64[Tensor, " some"]) -> Float[Tensor, "some 1 h w"]:
        """The masks of some classes, in [0, 1]."""
        return (self.masks[classes].tanh() + 1) / 2

    def on(self, images: Images, classes: Int64[Tensor, " some"]) -> Float[Tensor, "some b c h w"]:
        """Step 1: (1 - m) x + m p, with the patch of each class on each of the images."""
        mask = self.mask(classes)[:, None]
        pattern = (self.patterns[classes].tanh()[:, None] + 1) / 2
        return (1 - mask) * images + mask * pattern


def draw_patches(suspect: Suspect) -> Patches:
    """Masks and patterns that are even noise in [0, 1], as the code draws them."""
    clean = suspect.clean
    shape = (suspect.n_classes, 1 + clean.channels, clean.size, clean.size)
    # atanh(2 u - 1) is logit(u) / 2
    free = torch.rand(shape, generator=suspect.generator).logit(1e-6) / 2
    masks, patterns = free.to(clean.device).split((1, clean.channels), 1)
    return Patches(masks.clone().requires_grad_(), patterns.clone().requires_grad_())


def smallest_norms(settings: NeuralCleanse, suspect: Suspect, patches: Patches, images: Images) -> Float[Tensor, " k"]:
    """Steps 1 to 3: the norm of each class, all classes searched at once."""
    weights = {name: weight.detach() for name, weight in suspect.model.named_parameters()}
    # Adam goes on moving the patches of classes that have ended; nobody looks at them any more.
    adam = torch.optim.Adam([patches.masks, patches.patterns], settings.lr, BETAS)
    search = new_search(settings, suspect.n_classes, images.device)
    active = torch.arange(suspect.n_classes, device=images.device)
    for _ in range(settings.epochs):
        hits = torch.zeros_like(search.cost)
        norm = torch.zeros_like(search.cost)
        order = torch.randperm(len(images), generator=suspect.generator).to(images.device)
        for rows in order.split(settings.batch_size):
            adam.zero_grad()
            for some in active.split(max(1, PIXELS_AT_ONCE // (len(rows) * images.shape[-1] ** 2))):
                hit, sums = descend(suspect.model, weights, patches, images[rows], some, search.cost)
                hits[some] += hit
                norm[some] += sums * len(rows) / len(images)
            adam.step()
        ended = search.after_epoch(hits / len(images), norm)
        active = active[~ended[active]]
        if not len(active):
            break
    last = patches.mask(torch.arange(suspect.n_classes, device=images.device)).detach().sum((1, 2, 3))
    return torch.where(search.best.isinf(), last, search.best)


def descend(
    model: nn.Module,
    weights: dict[str, Tensor],
    patches: Patches,
    images: Images,
    classes: Int64[Tensor, " some"],
    cost: Float[Tensor, " k"],
) -> tuple[Float[Tensor, " some"], Float[Tensor, " some"]]:
    """Add the gradients of step 1's loss for some classes; return how many images reach each class, and |m|."""
    with torch.enable_grad():
        stamped = patches.on(images, classes).flatten(0, 1)
        logits = functional_call(model, weights, (stamped,)).float().unflatten(0, (len(classes), len(images)))
        wanted = classes[:, None].expand(-1, len(images))
        error = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        sums = patches.mask(classes).sum((1, 2, 3))
        # The sum over classes, so that no class weighs less the more there are.
        (error.view_as(wanted).mean(1) + cost[classes] * sums).sum().backward()
    return (logits.argmax(2) == wanted).float().sum(1), sums.detach()


@dataclass
class Search:
    """How far the search of each class has come; all tensors have an entry for each class.

    Attributes:
        settings: the defence.
        cost: the present weight of |m|.
        best: the least norm with success; infinite before there is one.
        idle: epochs in a row in which it has not fallen.
        ready: epochs of success in a row while the cost is 0.
        good: epochs of success in a row, since the cost was last set or raised.
        bad: epochs without success in a row, since the cost was last lowered.
        raised: whether the cost has been raised since it was set.
        lowered: whether it has been lowered since.
    """

    settings: NeuralCleanse
    cost: Float[Tensor, " k"]
    best: Float[Tensor, " k"]
    idle: Int64[Tensor, " k"]
    ready: Int64[Tensor, " k"]
    good: Int64[Tensor, " k"]
    bad: Int64[Tensor, " k"]
    raised: Bool[Tensor, " k"]
    lowered: Bool[Tensor, " k"]

    def after_epoch(self, reached: Float[Tensor, " k"], norm: Float[Tensor, " k"]) -> Bool[Tensor, " k"]:
        """Steps 2 and 3, given the means over an epoch; returns which classes have ended."""
        success = reached >= self.settings.success
        # Step 3: the least norm, and how long it has not fallen.
        before = self.best
        self.best = torch.where(success, torch.minimum(norm, before), before)
        stuck = self.best >= self.settings.progress * before
        self.idle = torch.where(self.best.isinf(), self.idle, (self.idle + 1) * stuck)
        ended = self.raised & self.lowered & (self.idle >= self.settings.stop)
        self._adapt_cost(success)
        return ended

    def _adapt_cost(self, success: Bool[Tensor, " k"]) -> None:
        """Step 2, in the order of the code."""
        patience = self.settings.patience
        # The cost is set; the counters begin anew.
        self.ready = (self.ready + 1) * (success & (self.cost == 0))
        begins = self.ready >= patience
        self.cost = torch.where(begins, self.settings.cost, self.cost)
        self.good = (self.good * ~begins + 1) * success
        self.bad = (self.bad * ~begins + 1) * ~success
        # It is raised or lowered; while it is 0, both leave it there.
        up = self.good >= patience
        down = self.bad >= patience
        self.cost = torch.where(up, self.cost * self.settings.factor, self.cost)
        self.cost = torch.where(down, self.cost / self.settings.factor**1.5, self.cost)
        self.good = self.good * ~up
        self.bad = self.bad * ~down
        self.raised = (self.raised & ~begins) | up
        self.lowered = (self.lowered & ~begins) | down


def new_search(settings: NeuralCleanse, n_classes: int, device: torch.device) -> Search:
    """No epoch yet: every cost is 0, and no norm is known."""
    zero = torch.zeros(n_classes, device=device)
    count = torch.zeros_like(zero, dtype=torch.int64)
    no = torch.zeros_like(zero, dtype=torch.bool)
    return Search(settings, zero, zero + torch.inf, count, count, count, count, no, no)


def anomaly_index(norms: Float64[Tensor, " k"]) -> Float64[Tensor, " k"]:
    """Step 4: how many MAD each norm is below the median.

    >>> anomaly_index(torch.tensor([1.0, 4.0, 5.0, 6.0, 7.0], dtype=torch.float64)).round(decimals=3).tolist()
    [2.698, 0.674, 0.0, -0.674, -1.349]
    """
    median = norms.quantile(0.5)
    mad = 1.4826 * (norms - median).abs().quantile(0.5)
    # Norms that are equal but for a few have a MAD of 0.
    return (median - norms) / mad.clamp(min=1e-6 * median.clamp(min=1e-6))
