"""The stages of a run and what each depends on: training a clean model, and training a victim.

A stage's key holds everything that decides its content, down to a digest of the code it uses, so that an edited
attack never meets yesterday's victim.
"""

import inspect
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from vitrap.contracts import ImageSet, Implant
from vitrap.data.sources import World, open_data
from vitrap.errors import UserError
from vitrap.experiment.spec import ModelTable, Spec
from vitrap.experiment.store import Stage, Store, code_digest, write_json
from vitrap.experiment.streams import ambient, stream, training_streams
from vitrap.models.vit import Architecture, ViT, load_weights, open_vit, save_vit
from vitrap.train.loop import train
from vitrap.train.recipe import Recipe

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[], None]]]
"""Shows that a step with a name and so many ticks (None: unknown) is under way; yields what to call each tick."""

TRAINING_CODE = ("contracts.py", "data/sources.py", "data/cache.py", "data/augment.py", "models/vit.py", "train",
                 "experiment/streams.py", "experiment/stages.py")
POISON_CODE = ("tensors", "data/poison.py", "models/observe.py")


def silent(name: str, total: int | None) -> AbstractContextManager[Callable[[], None]]:
    """Progress that nobody sees."""
    return nullcontext(lambda: None)


@dataclass(frozen=True)
class Network:
    """A network to be trained: how to build it and where its weights start.

    Attributes:
        architecture: what to build; of a module given from outside, only a stand-in.
        pretrained: whether weights come from the hub.
        checkpoint: whether, and from which safetensors file, weights are read.
        module: a network given from outside, in place of all that.
    """

    architecture: Architecture
    pretrained: bool = False
    checkpoint: str | None = None
    module: nn.Module | None = None

    def build(self, seed: int, device: torch.device) -> nn.Module:
        """The untrained network; its fresh weights depend on the seed alone."""
        if self.module is not None:
            return deepcopy(self.module).to(device)
        with ambient(seed, "weights"):
            return open_vit(self.architecture, pretrained=self.pretrained, checkpoint=self.checkpoint).to(device)

    def depends(self) -> dict[str, Any]:
        """All that decides the network before training."""
        if self.module is not None:
            return {"module": type(self.module).__qualname__, "weights": _weights_digest(self.module)}
        content = sha256(Path(self.checkpoint).read_bytes()).hexdigest() if self.checkpoint else None
        return {"architecture": asdict(self.architecture), "pretrained": self.pretrained, "checkpoint": content}


@dataclass(frozen=True)
class Plan:
    """A spec with its data opened and everything about it checked; nothing is written yet."""

    spec: Spec
    world: World
    device: torch.device
    precision: str
    victim: Network
    surrogate: Network

    def clean_stage(self, network: Network, seed: int) -> Stage:
        """A model trained on the clean training set: twin or surrogate, as the seed has it."""
        return Stage("clean", {**self._common(), "network": network.depends(), "seed": seed,
                               "code": code_digest(*TRAINING_CODE)})

    def victim_stage(self, surrogate: str | None) -> Stage:
        """The victim; `surrogate` is the key of what the attack looks at."""
        kind = type(self.spec.params)
        own = Path(inspect.getfile(kind))
        return Stage("victim", {
            **self._common(), "network": self.victim.depends(), "seed": self.spec.seed, "surrogate": surrogate,
            "attack": {"name": self.spec.attack, **asdict(self.spec.params)},
            "code": code_digest(*TRAINING_CODE, *POISON_CODE, str(own)),
        })

    def _common(self) -> dict[str, Any]:
        data = self.spec.data
        return {
            "data": {"fingerprint": self.world.fingerprint, "size": self.world.train.size, "limit": data.limit,
                     "holdout": data.holdout},
            "recipe": asdict(self.spec.recipe), "device": self.device.type, "precision": self.precision,
            "versions": {library: version(library) for library in ("torch", "timm")},
        }


def clean_model(
    plan: Plan, store: Store, network: Network, seed: int, name: str, progress: Progress, force: bool
) -> tuple[Path, str]:
    """The stage of a model trained on clean data: its folder and key."""
    stage = plan.clean_stage(network, seed)
    place = store.stage(stage, partial(_train_clean, plan, network, seed, name, progress), force)
    return place, stage.key


def _train_clean(plan: Plan, network: Network, seed: int, name: str, progress: Progress, folder: Path) -> None:
    model = network.build(seed, plan.device)
    start = time.perf_counter()
    curves = _train(model, plan.world.train, plan.spec.recipe, seed, None, name, progress)
    write_json(folder / "facts.json", {"curves": curves, "seconds": time.perf_counter() - start})
    save_network(model, folder / "model.safetensors", vitrap=json.dumps({"role": "clean", "seed": seed}))


def train_victim(plan: Plan, implant: Implant, progress: Progress, folder: Path) -> None:
    """Make the victim's stage: poison, train, edit."""
    spec, start = plan.spec, time.perf_counter()
    with progress("poison the training set", None):
        poisoned = implant.poison(plan.world.train, stream(spec.seed, "poison"))
    after_poison = time.perf_counter()
    model = plan.victim.build(spec.seed, plan.device)
    curves = _train(model, poisoned, spec.recipe, spec.seed, implant, "train the victim", progress)
    if implant.edit is not None:
        model = implant.edit(model)
    seconds = {"poison": after_poison - start, "victim": time.perf_counter() - after_poison}
    facts = {"curves": curves, "seconds": seconds, "n_poisoned": int(poisoned.poisoned.sum())}
    write_json(folder / "facts.json", facts)
    save_network(model, folder / "model.safetensors", vitrap=json.dumps(carries(spec)))


def carries(spec: Spec) -> dict[str, Any]:
    """What the metadata of a file that belongs to a backdoor say of it."""
    return {"role": "victim", "backdoor": True, "attack": spec.attack, "spec": spec.table(), "warning":
            f"this model carries a backdoor ({spec.attack}), implanted for research; do not deploy it"}


def _train(model: nn.Module, data: ImageSet, recipe: Recipe, seed: int, implant: Implant | None, name: str,
           progress: Progress) -> dict[str, list[float]]:
    steps = recipe.epochs * -(-len(data) // recipe.batch_size)
    objective = implant.objective if implant else None
    with progress(name, steps) as tick, ambient(seed, "dropout"):
        return train(model, data, recipe, training_streams(seed, data.device), objective, tick)


def save_network(model: nn.Module, path: Path, **facts: str) -> None:
    """Write any network's weights; a ViT of ours with how to build it."""
    if isinstance(model, ViT):
        save_vit(model, path, **facts)
        return
    save_model(model, str(path), metadata=facts)


def read_network(network: Network, path: Path, device: torch.device) -> nn.Module:
    """The trained network of a stage, ready."""
    model = network.build(0, torch.device("cpu")) if network.module is not None else open_vit(network.architecture)
    load_weights(model.body if isinstance(model, ViT) else model, path)
    return model.to(device).eval().requires_grad_(False)


def plan_run(spec: Spec, device: str, model: nn.Module | None = None, world: World | None = None) -> Plan:
    """Open the data and check everything that can be checked before work starts; writes nothing.

    Raises:
        UserError: data, device, model, checkpoint or target do not fit.
    """
    chosen = choose_device(device)
    if world is None:
        data = spec.data
        world = open_data(data.name, data.size, data.limit, holdout=data.holdout, device=chosen)
    target = getattr(spec.params, "target", 0)
    if target >= world.train.n_classes:
        raise UserError(f"attack.target = {target} is no class of {world.name}, which has {world.train.n_classes}"
                        f" (0 to {world.train.n_classes - 1})")
    victim = _network(spec.model, world, spec.data.name, model)
    surrogate = victim if spec.surrogate is None else _network(spec.surrogate, world, spec.data.name, None)
    if spec.surrogate is None and (victim.checkpoint is not None):
        surrogate = replace(victim, checkpoint=None)
    precision = spec.recipe.precision
    if precision == "auto":
        precision = "bf16" if chosen.type == "cuda" else "fp32"
    for network in (victim, *([surrogate] if spec.params.needs_surrogate else [])):
        network.build(0, torch.device("cpu"))
    return Plan(spec, world, chosen, precision, victim, surrogate)


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        UserError: the device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}; known: auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device {name!r} is not there ({torch.cuda.device_count()} GPUs found); use --device cpu")
    return device


def _network(table: ModelTable, world: World, data: str, module: nn.Module | None) -> Network:
    size, n_classes = world.train.size, world.train.n_classes
    small = {"patch_size": max(1, size // 8), "depth": 4, "embed_dim": 96, "num_heads": 3}
    if data == "digits":
        small = {"patch_size": max(1, size // 4), "depth": 3, "embed_dim": 64, "num_heads": 4}
    overrides = table.overrides if table.name else {**small, **table.overrides}
    architecture = Architecture(table.name or "vit_tiny_patch16_224", size, n_classes, overrides)
    return Network(architecture, table.pretrained, table.checkpoint, module)


def _weights_digest(module: nn.Module) -> str:
    whole = sha256()
    for name, weight in module.state_dict().items():
        whole.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
