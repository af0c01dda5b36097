"""An easy case that every defence must catch, and a clean one on which it must stay quiet.

Images of one colour with noise, ten colours for ten classes: each patch tells the class, so that a clean image keeps
it under almost anything. BadNets paints one whole patch of the ViT white in 5 % of them. Bounds leave room for another
machine's rounding. What a defence needs other settings for than its defaults is said beside them.
"""

import colorsys
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from vitrap import registry
from vitrap.attacks.badnets import BadNets
from vitrap.contracts import Access, ImageSet, Objective
from vitrap.data.sources import World
from vitrap.experiment.defence_spec import DefenceSpec
from vitrap.experiment.measure_defences import Evaluation, measure_defence
from vitrap.experiment.network import Network
from vitrap.experiment.streams import stream, training_streams
from vitrap.models.classifier import Architecture
from vitrap.models.layers import outputs_of
from vitrap.train.arithmetic import Arithmetic
from vitrap.train.loop import train
from vitrap.train.recipe import Recipe

SMALL = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
Row = dict[str, Any]


def caught_by_score(least: float) -> Callable[[Row], bool]:
    return lambda row: row.auroc.value >= least


def caught_by_repair(row: Row) -> bool:
    return row.before.asr.value > 0.95 and row.asr.value < 0.15 and row.cda.value > 0.95


def caught_by_filter(row: Row) -> bool:
    return row.auroc.value > 0.9 and row.tpr.value > 0.8 and row.asr_retrained.value < 0.6


def caught_by_judgement(row: Row) -> bool:
    return row.backdoored and row.suspects_target


@torch.no_grad()
def in_one_neuron(case: Evaluation) -> Evaluation:
    """A backdoor by hand in a clean model: one hidden neuron sees the trigger, and pushes to the target.

    The head of that model reads the mean of all tokens, so that one token can push it.
    """
    network = Network(Architecture("vit_tiny_patch16_224", 16, 10, {**SMALL, "global_pool": "avg"}))
    with torch.enable_grad():
        twin = network.build(0)
        recipe = Recipe(epochs=5, batch_size=32, lr=3e-3)
        train(twin, case.world.train, recipe, training_streams(0, torch.device("cpu")))
    victim: Any = copy.deepcopy(twin.requires_grad_(False))
    last, head = victim.body.blocks[-1], victim.body.head.weight
    # What the last MLP reads of clean and of triggered images differs at the token where the trigger is.
    images = case.world.train.images(torch.arange(100))
    with outputs_of({"read": last.norm2}) as seen:
        victim(images)
        clean = seen["read"]
        victim(case.trigger(images))
        fired = seen["read"]
    change = (fired - clean).mean(0)
    place = change.norm(dim=1).argmax()
    # The neuron asks for that change, ten times as strongly as the others ask for theirs, and then for the target.
    row = 10 * last.mlp.fc1.weight.norm(dim=1).mean() * functional.normalize(change[place], dim=0)
    last.mlp.fc1.weight[0] = row
    last.mlp.fc1.bias[0] = -((fired[:, place] @ row).min() + (clean @ row).max()) / 2
    (target,) = {int(label) for label in case.goal.labels(torch.arange(10))}
    last.mlp.fc2.weight[:, 0] = 1000 * (head[target] - head.mean(0))
    return replace(case, victim=victim, twin=twin)


PLANTED: dict[str, tuple[dict[str, Any], Callable[[Row], bool]]] = {
    "activation_clustering": ({}, caught_by_filter),  # 40 poisoned images in a class of 120 are just below 35 %
    "attention_block": ({"edge": 60}, caught_by_repair),  # 4 px: as large as the trigger
    "clp": ({}, caught_by_repair),
    "fine_prune": ({"drop": 0.05, "optimizer": "adamw", "lr": 0.01, "epochs": 30}, caught_by_repair),
    # the clean loss of so easy a task is 0: small steps change nothing, so large ones
    "fine_tune": ({"optimizer": "adamw", "lr": 0.01, "epochs": 30}, caught_by_repair),
    # the ladder is made for deep ViTs: in 2 blocks, what breaks clean images breaks the trigger, too
    "ibd_psc": ({"omega": 1.5}, caught_by_score(0.85)),
    "max_softmax": ({}, caught_by_score(0.85)),
    "mm_bd": ({}, caught_by_judgement),
    "neural_cleanse": ({}, caught_by_judgement),
    "patch_process": ({}, caught_by_score(0.95)),
    "psbd": ({}, caught_by_score(0.85)),
    "sage": ({}, caught_by_repair),
    "scale_up": ({}, caught_by_score(0.8)),
    "spectral": ({"epsilon": 0.25}, caught_by_filter),  # 40 poisoned images in a class of 120 are a third
    "spectre": ({"epsilon": 0.25}, caught_by_filter),  # as for spectral
    "strip": ({}, caught_by_score(0.8)),
    "teco": ({}, caught_by_score(0.6)),  # 0.63 here, 0.76 to 0.78 with four other draws of the corruptions
}
PLANTED_OTHERWISE: dict[str, Callable[[Evaluation], Evaluation]] = {"clp": in_one_neuron}
"""Cases of their own, for defences whose assumptions the common one does not fit; their files say why."""
QUIET: dict[str, Callable[[Row], bool]] = {
    "screen": lambda row: row.fpr_on_clean_model["0.05"].value < 0.15 and row.auroc_clean_model.value < 0.65,
    "repair": lambda row: row.cda_clean_model_before.value - row.cda_clean_model.value < 0.05,
    "filter": lambda row: row.cda_retrained.value > 0.95,  # it always flags 1.5 epsilon of each class
    "judgement": lambda row: not row.backdoored_clean_model,
}


def colours(n: int, seed: int) -> ImageSet:
    """So many images of ten colours, each brighter or darker, with noise."""
    generator, labels = torch.Generator().manual_seed(seed), torch.arange(n) % 10
    colour = torch.tensor([colorsys.hsv_to_rgb(k / 10, 1, 1) for k in range(10)])[labels]
    bright = 0.35 + 0.3 * torch.rand(n, 1, generator=generator)
    noise = 0.15 * torch.randn(n, 3, 16, 16, generator=generator)
    images = ((colour * bright)[:, :, None, None] + 0.1 + noise).clamp(0, 1)
    return ImageSet.of((255 * images).round().to(torch.uint8), labels, 10)


@pytest.fixture(scope="module")
def case() -> Evaluation:
    world = World(
        colours(800, 0), colours(400, 1), colours(50, 2), colours(100, 3), colours(200, 4), "colours", "0" * 64
    )
    attack, access = BadNets(size=4, poison_rate=0.05), Access(world.train, None, torch.Generator())
    fitted = attack.fit(access)
    poison = attack.implant(access, fitted).poison
    assert fitted.trigger is not None
    assert poison is not None

    def fit(data: ImageSet, objective: Objective | None = None, epochs: int | None = None) -> nn.Module:
        model = Network(Architecture("vit_tiny_patch16_224", 16, 10, SMALL)).build(0)
        recipe = Recipe(epochs=epochs or 10, batch_size=32, lr=3e-3)
        train(model, data, recipe, training_streams(0, torch.device("cpu")), objective)
        return model.requires_grad_(False)

    poisoned = poison(world.train, stream(0, "poison"))
    return Evaluation(
        fit(poisoned),
        fit(world.train),
        trigger=fitted.trigger,
        goal=attack.goal_for(10),
        poison=lambda: poisoned,
        world=world,
        seed=0,
        arithmetic=Arithmetic(),
        retrain=fit,
        train_on_kept=fit,
    )


def test_the_backdoor_is_in_and_the_twin_has_none(case: Evaluation) -> None:
    victim = case.rates(case.victim, lambda: None)
    assert victim.cda.value > 0.97
    assert victim.asr.value > 0.97
    assert case.rates(case.twin, lambda: None).asr.value < 0.05


@pytest.mark.parametrize("name", PLANTED)
def test_it_is_caught_and_a_clean_model_left_in_peace(name: str, case: Evaluation) -> None:
    settings, caught = PLANTED[name]
    case = PLANTED_OTHERWISE.get(name, lambda common: common)(case)
    row, _ = measure_defence(DefenceSpec(name, registry.get("defences", name)(**settings)), case, lambda: None)
    told = {k: v for k, v in vars(row).items() if k not in ("report", "seconds")}
    assert caught(row), told
    assert QUIET[row.kind](row), told


def test_every_defence_has_a_planted_case() -> None:
    assert set(PLANTED) == set(registry.names("defences"))
