"""A step of the training loop over a bare PyTorch loop with the same model, batches, arithmetic and optimiser.

The bare loop knows nothing of vitrap: a timm model, uint8 pixels and labels, and the usual lines. Both start from the
same weights and see the same batches, so that they must end in the same place.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.compare import Figure, Scale, in_turns
from benchmarks.subjects import image_set, network
from vitrap.contracts import ImageSet
from vitrap.models.classifier import Classifier
from vitrap.train.loop import Streams, train
from vitrap.train.recipe import Recipe

WANTED = 1.03


def figures(scale: Scale) -> Iterator[Figure]:
    """Both precisions, with one rate and with rates by layer, as the bound has it; crop and flip for information."""
    # The bound is tight, and a host's other load comes and goes: many short turns say more than a few long ones.
    scale = replace(scale, steps=max(1, scale.steps // 2), repeats=2 * scale.repeats + 1)
    data = image_set(scale.steps * scale.batch, scale.device)
    usual = Recipe(epochs=1, batch_size=scale.batch)
    for precision in ("fp32", "bf16"):
        for augmented in (False, True):
            recipe = replace(usual, precision=precision, crop=4 if augmented else 0, flip=augmented)
            name = f"{precision}, with crop and flip" if augmented else precision
            yield figure(name, data, recipe, scale, None if augmented else WANTED)
        by_layer = replace(usual, precision=precision, layer_decay=0.65, head_lr=2e-3)
        yield figure(f"{precision}, rates by layer", data, by_layer, scale, WANTED)


def figure(name: str, data: ImageSet, recipe: Recipe, scale: Scale, wanted: float | None) -> Figure:
    """One recipe with both loops; the first, untimed turn says how far apart they end."""
    mine, other = network(scale), network(scale)
    bare = Bare(other, recipe)
    my_streams, other_streams = streams(scale.device), streams(scale.device)

    def ours() -> None:
        train(mine, data, recipe, my_streams)

    def plain() -> None:
        bare.train(data.pixels, data.labels, other_streams.order, other_streams.augmentation)

    ours()
    plain()
    with torch.no_grad():
        apart = max((a - b).abs().max().item() for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    note = f"{scale.steps} steps of {scale.batch}; weights then differ by {apart:.1g} at most"
    times = in_turns(ours, plain, scale)
    return Figure("training", name, *times, at_most=wanted, note=note)


def streams(device: str) -> Streams:
    """Order and augmentation, the same at each call."""
    order, projection = torch.Generator().manual_seed(1), torch.Generator().manual_seed(3)
    return Streams(order, torch.Generator(device).manual_seed(2), projection, torch.Generator())


class Bare:
    """A bare training loop."""

    def __init__(self, model: Classifier, recipe: Recipe) -> None:
        self.body, self.mean, self.std, self.recipe = model.body, model.mean, model.std, recipe

    def train(self, pixels: Tensor, labels: Tensor, order: torch.Generator, chances: torch.Generator) -> float:
        """Train on all images; the mean loss of the last epoch."""
        body, how, device = self.body, self.recipe, pixels.device
        bf16 = how.precision == "bf16"
        layers: list[Any] = [m for m in body.modules() if isinstance(m, Attention)]
        for layer in layers:
            layer.fused_attn = not (bf16 and device.type == "cpu")
        groups = decay_groups(body, how.weight_decay) if how.layer_decay == 1 else layer_groups(body, how)
        optimiser = torch.optim.AdamW(groups, lr=how.lr, fused=True)
        peaks = [group["lr"] for group in optimiser.param_groups]
        steps, step, total = how.epochs * math.ceil(len(labels) / how.batch_size), 0, torch.zeros((), device=device)
        body.train()
        for _ in range(how.epochs):
            total.zero_()
            for rows in torch.randperm(len(labels), generator=order).to(device).split(how.batch_size):
                for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                    group["lr"] = peak * schedule(step / steps, how.warmup)
                x = crop_and_flip(pixels[rows].float() / 255, how, chances)
                with torch.autocast(device.type, torch.bfloat16, bf16):
                    logits = body((x - self.mean) / self.std)
                    loss = functional.cross_entropy(logits, labels[rows], label_smoothing=how.label_smoothing)
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(body.parameters(), how.clip)
                optimiser.step()
                total += loss.detach() * len(rows)
                step += 1
        body.eval()
        return total.item() / len(labels)


def decay_groups(body: nn.Module, decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases, norms and one-token embeddings do not."""
    matrices = [w for w in body.parameters() if w.ndim >= 2 and w.shape[0] > 1]
    others = [w for w in body.parameters() if w.ndim < 2 or w.shape[0] == 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def layer_groups(body: nn.Module, how: Recipe) -> list[dict[str, object]]:
    """A ViT's groups, a rate for each block: the patches' embedding is lowest, the last norm learns as its block."""
    depth = len(body.get_submodule("blocks")._modules)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, weight in body.named_parameters():
        block = depth - 1 if name.startswith("norm") else int(name.split(".")[1]) if name.startswith("blocks") else -1
        below = 0 if name.startswith("head") else depth - block
        matrix = weight.ndim >= 2 and weight.shape[0] > 1
        peak = how.lr * how.layer_decay**below if below or how.head_lr is None else how.head_lr
        empty = {"params": [], "lr": peak, "weight_decay": how.weight_decay if matrix else 0.0}
        groups.setdefault((below, matrix), empty)["params"].append(weight)
    return list(groups.values())


def schedule(progress: float, warmup: float) -> float:
    """A line up, half a cosine down."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def crop_and_flip(x: Tensor, how: Recipe, chances: torch.Generator) -> Tensor:
    """Each image its own shift and mirror, by plain indexing."""
    (b, c, h, w), at = x.shape, x.device
    if how.crop:
        down, across = torch.randint(2 * how.crop + 1, (2, b), generator=chances, device=at)
        row, column = down[:, None] + torch.arange(h, device=at), across[:, None] + torch.arange(w, device=at)
        padded = functional.pad(x, (how.crop,) * 4)
        image, channel = torch.arange(b, device=at), torch.arange(c, device=at)
        x = padded[image[:, None, None, None], channel[:, None, None], row[:, None, :, None], column[:, None, None, :]]
    if how.flip:
        x = torch.where((torch.rand(b, generator=chances, device=at) < 0.5)[:, None, None, None], x.flip(-1), x)
    return x
