"""Poisoning throughput of each attack over a plain vectorised version of the same trigger.

Ours is `poison_set` over every image of the set. Plain is what one would write by hand in a page of torch: gather the
rows, to floats, trigger, to bytes, in the same batches, in fp32. Both must give the same pictures.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.compare import Figure, Scale, in_turns
from benchmarks.subjects import SIZE, image_set, surrogate
from vitrap import registry
from vitrap.contracts import Access, ImageSet
from vitrap.data.poison import poison_set
from vitrap.tensors.pixels import hashed_noise

WANTED = 0.8
BATCH = 256
"""What `poison_set` takes at a time."""
Stamp = Callable[[Tensor], Tensor]


def figures(scale: Scale) -> Iterator[Figure]:
    """One figure for each attack with a plain version."""
    data, model = image_set(scale.images, scale.device), surrogate(scale)
    rows = torch.arange(len(data), device=data.device)
    for name, build in PLAIN.items():
        attack = registry.get("attacks", name)()
        access = Access(data, model if attack.needs_surrogate else None, torch.Generator())
        trigger, goal = attack.fit(access).in_training, attack.goal_for(data.n_classes)
        stamp = build(attack, model)

        def ours(trigger: Any = trigger, goal: Any = goal, kind: Any = attack.labels) -> ImageSet:
            return poison_set(data, rows, trigger, goal, kind, BATCH)

        def plain(stamp: Stamp = stamp) -> Tensor:
            return plain_poison(data.pixels, rows, stamp)

        far = share_apart(ours().stamped, plain())
        note = f"{len(data)} images; {far:.2%} of pixels differ by more than 1/255"
        times = in_turns(ours, plain, scale)
        yield Figure("poisoning", name, *times, at_least=WANTED, speed=True, note=note)


def share_apart(ours: Tensor | None, plain: Tensor) -> float:
    """The share of pixels that differ by more than one step of 8 bits."""
    assert ours is not None
    return ((ours.int() - plain.int()).abs() > 1).float().mean().item()


@torch.no_grad()
def plain_poison(pixels: Tensor, rows: Tensor, stamp: Stamp) -> Tensor:
    """All images with the trigger, as bytes."""
    out = []
    for some in rows.split(BATCH):
        stamped = stamp(pixels[some].float() / 255)
        out.append((stamped * 255).round().to(torch.uint8))
    return torch.cat(out)


def plain_badnets(attack: Any, model: Any) -> Stamp:
    """BadNets at its defaults: a slice is assigned."""

    def stamp(x: Tensor) -> Tensor:
        x[:, :, -attack.size :, -attack.size :] = attack.value
        return x

    return stamp


def plain_blended(attack: Any, model: Any) -> Stamp:
    """Blended at its defaults: a fifth of noise."""
    key = torch.rand((3, SIZE, SIZE), generator=torch.Generator())

    def stamp(x: Tensor) -> Tensor:
        return (1 - attack.alpha) * x + attack.alpha * key.to(x.device)

    return stamp


def plain_ftrojan(attack: Any, model: Any) -> Stamp:
    """FTrojan at its defaults on 32 px: two cosines in both colours, as RGB."""
    places = (torch.arange(SIZE) + 0.5) * torch.pi / SIZE
    rows = [torch.cos(k * places) for k in (attack.middle, attack.high)]
    wave = 2 / SIZE * attack.magnitude / 255 * sum(torch.outer(row, row) for row in rows)
    red, blue = 1 / 0.713, 1 / 0.564
    colours = torch.tensor([red, -(0.299 * red + 0.114 * blue) / 0.587, blue])[:, None, None]

    def stamp(x: Tensor) -> Tensor:
        return (x + (colours * wave).to(x.device)).clamp(0, 1)

    return stamp


def plain_bpp(attack: Any, model: Any) -> Stamp:
    """BppAttack at its defaults: the nearest of 8 values."""

    def stamp(x: Tensor) -> Tensor:
        return (x * (attack.squeeze_num - 1)).round() / (attack.squeeze_num - 1)

    return stamp


def plain_megatron(attack: Any, model: Any) -> Stamp:
    """MEGATRON at its defaults on 32 px: four pixels of noise, most of the way over the image."""
    pattern = torch.rand((3, 2, 2), generator=torch.Generator())

    def stamp(x: Tensor) -> Tensor:
        box = x[:, :, 1:3, 1:3]
        box += attack.opacity * (pattern.to(x.device) - box)
        return x

    return stamp


def plain_sig(attack: Any, model: Any) -> Stamp:
    """SIG at its defaults: a sine is added."""
    columns = torch.arange(SIZE) / SIZE
    wave = attack.delta / 255 * torch.sin(2 * torch.pi * attack.frequency * columns)

    def stamp(x: Tensor) -> Tensor:
        return (x + wave.to(x.device)).clamp(0, 1)

    return stamp


def plain_adaptive_blend(attack: Any, model: Any) -> Stamp:
    """Adaptive-Blend at its defaults: noise on 8 of 16 pieces, which are picked by the same hash as ours."""
    picture = torch.rand((3, SIZE, SIZE), generator=torch.Generator())
    side = attack.pieces

    def stamp(x: Tensor) -> Tensor:
        noise = hashed_noise(x)[:, :side, :side].flatten(1)
        shown = noise.argsort(1).argsort(1) >= side * side / 2
        mask = shown.view(-1, 1, side, side).float().repeat_interleave(SIZE // side, 2)
        return x + attack.alpha * mask.repeat_interleave(SIZE // side, 3) * (picture.to(x.device) - x)

    return stamp


def plain_wanet(attack: Any, model: Any) -> Stamp:
    """WaNet at its defaults: a smooth field, and one call of `grid_sample`."""
    noise = torch.rand((1, 2, attack.k, attack.k), generator=torch.Generator()) * 2 - 1
    noise = attack.s * noise / noise.abs().mean()
    shift = functional.interpolate(noise, SIZE, mode="bicubic", align_corners=True).permute(0, 2, 3, 1) / SIZE
    line = torch.linspace(-1, 1, SIZE)
    down, across = torch.meshgrid(line, line, indexing="ij")
    grid = (torch.stack([across, down], 2) + shift).clamp(-1, 1)

    def stamp(x: Tensor) -> Tensor:
        return functional.grid_sample(x, grid.to(x.device).repeat(len(x), 1, 1, 1), align_corners=True)

    return stamp


def plain_ageb(attack: Any, model: Any) -> Stamp:
    """AGEB at its defaults: gradient at the last attention, quantile, 3 x 3 erosion, blend, signal, HSV means."""
    vit = model.body
    seen: list[Tensor] = []

    def keep(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        seen[:] = [args[0].detach().requires_grad_()]
        return (seen[0],)

    def gradient(x: Tensor) -> Tensor:
        last = vit.blocks[-1].attn
        last.fused_attn = False
        hook = last.attn_drop.register_forward_pre_hook(keep)
        with torch.enable_grad():
            logits = vit((x - model.mean) / model.std)
            loss = functional.cross_entropy(logits, logits.argmax(1), reduction="sum")
            (slope,) = torch.autograd.grad(loss, seen)
        hook.remove()
        last.fused_attn = True
        a = seen[0].detach()
        g = (slope * a * (1 - a)).abs()[:, :, 0, 1:].mean(1)
        side = vit.patch_embed.grid_size
        return functional.interpolate(g.view(-1, 1, *side), x.shape[-2:], mode="bilinear")

    def stamp(x: Tensor) -> Tensor:
        g = gradient(x)
        kept = round((1 - attack.tau) * g[0].numel())
        mask = g > g.flatten(1).kthvalue(g[0].numel() - kept).values[:, None, None, None]
        eroded = -functional.max_pool2d(-functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        y = attack.alpha * x + (1 - attack.alpha) * eroded + attack.signal / 255
        return plain_match(torch.where(mask, y, x).clamp(0, 1), x)

    return stamp


def plain_match(y: Tensor, x: Tensor) -> Tensor:
    """`y` with the mean saturation and brightness of `x`, one factor an image."""
    top, low = y.amax(1, keepdim=True), y.amin(1, keepdim=True)
    wanted_top, wanted_low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    own, wanted = (top - low) / top.clamp(min=1e-8), (wanted_top - wanted_low) / wanted_top.clamp(min=1e-8)
    factor = wanted.mean((2, 3), keepdim=True) / own.mean((2, 3), keepdim=True).clamp(min=1e-8)
    y = top - (top - y) * torch.minimum(factor, 1 / own.clamp(min=1e-8))
    top = y.amax(1, keepdim=True)
    factor = wanted_top.mean((2, 3), keepdim=True) / top.mean((2, 3), keepdim=True).clamp(min=1e-8)
    return (y * torch.minimum(factor, 1 / top.clamp(min=1e-8))).clamp(0, 1)


PLAIN: dict[str, Callable[[Any, Any], Stamp]] = {
    "adaptive_blend": plain_adaptive_blend,
    "ageb": plain_ageb,
    "badnets": plain_badnets,
    "blended": plain_blended,
    "bpp": plain_bpp,
    "ftrojan": plain_ftrojan,
    "megatron": plain_megatron,
    "sig": plain_sig,
    "wanet": plain_wanet,
}
"""Plain versions of attacks' triggers, from the settings and the surrogate."""
OPTIMISED = frozenset(
    {
        "badvit",
        "dbia",
        "hidden_trigger",
        "hpmi",
        "input_aware",
        "issba",
        "label_consistent",
        "low_frequency",
        "one_pixel",
        "trojvit",
    }
)
"""Attacks whose trigger is made on images. They have no plain version; a record has the seconds."""
