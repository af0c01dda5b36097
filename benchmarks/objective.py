"""A training step with MEGATRON's losses over a plain step of the same loop on the same set, a tenth of it poisoned."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.compare import Figure, Scale, in_turns
from benchmarks.subjects import image_set, network
from benchmarks.training import streams
from vitrap.attacks.megatron import Megatron
from vitrap.contracts import Access, ImageSet, Implant, Objective
from vitrap.train.loop import train
from vitrap.train.recipe import Recipe

WANTED = 1.5
CASES: dict[str, tuple[Megatron, float | None]] = {
    "last layer": (Megatron(), WANTED),
    "rollout": (Megatron(attention="rollout"), WANTED),
    "gradient rollout": (Megatron(attention="gradient"), None),  # differentiates twice: for information
    "last layer, projected": (Megatron(combine="projected"), None),
}


def figures(scale: Scale) -> Iterator[Figure]:
    """Every kind of attention map, in both precisions."""
    data = image_set(scale.steps * scale.batch, scale.device)
    for precision in ("fp32", "bf16"):
        for name, (attack, wanted) in CASES.items():
            recipe = Recipe(epochs=1, batch_size=scale.batch, precision=precision)
            yield figure(f"{precision}, {name}", attack, data, recipe, scale, wanted)


def figure(  # noqa: PLR0913 - one comparison's worth of settings
    name: str, attack: Megatron, data: ImageSet, recipe: Recipe, scale: Scale, wanted: float | None
) -> Figure:
    """The loop with the attack's objective, and without; both stamp the trigger in each batch."""
    implant, without = implant_of(attack, data), implant_of(replace(attack, latent=0.0, diffusion=0.0), data)
    assert implant.objective is not None
    assert implant.poison is not None
    poisoned = implant.poison(data, torch.Generator().manual_seed(1))
    mine, other, objective = network(scale), network(scale), implant.objective
    my_streams, other_streams = streams(scale.device), streams(scale.device)

    def ours(objective: Objective = objective) -> None:
        train(mine, poisoned, recipe, my_streams, objective)

    def plain() -> None:
        train(other, poisoned, recipe, other_streams, without.objective)

    note = f"{scale.steps} steps of {scale.batch}, {int(poisoned.poisoned.sum())} of {len(data)} images poisoned"
    return Figure("objective", name, *in_turns(ours, plain, scale), at_most=wanted, note=note)


def implant_of(attack: Megatron, data: ImageSet) -> Implant:
    """The attack on a set, with a random stream of its own."""
    access = Access(data, None, torch.Generator().manual_seed(0))
    return attack.implant(access, attack.fit(access))
