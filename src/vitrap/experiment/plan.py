"""A plan: a spec with its data opened and everything about it checked, before anything is written.

It also says what each stage depends on: everything that decides its content, down to a digest of the code it uses,
so that an edited attack never meets yesterday's victim.
"""

import inspect
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrap.contracts import AllToOne
from vitrap.data.poison import choose_rows
from vitrap.data.sources import World, open_data
from vitrap.errors import UserError
from vitrap.experiment.probe import measured
from vitrap.experiment.progress import Steps, silent
from vitrap.experiment.spec import ModelTable, Spec, digest
from vitrap.experiment.store import Stage, code_digest
from vitrap.experiment.streams import SURROGATE_SEED, ambient, stream
from vitrap.images import CHUNK
from vitrap.metrics.stealth import lpips_at_hand
from vitrap.models.observe import transformer
from vitrap.models.vit import Architecture, ViT, blank_vit, fetch_weights, load_weights, open_vit
from vitrap.train.arithmetic import Arithmetic, usual

TRAINING_CODE = (
    "contracts.py", "images.py", "data/sources.py", "data/cache.py", "data/augment.py", "models/vit.py",
    "models/observe.py", "train", "tensors/pixels.py", "experiment/plan.py", "experiment/streams.py",
    "experiment/stages.py",
)  # fmt: skip
POISON_CODE = ("tensors", "data/poison.py", "data/masked.py", "models/attention.py")
MEASURE_CODE = (
    "metrics", "experiment/measure.py", "experiment/record.py", "experiment/pictures.py", "experiment/run.py",
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A network and where its weights start.

    Attributes:
        architecture: what to build.
        pretrained: whether weights come from the hub.
        checkpoint: the safetensors file that weights are read from, if any.
        module: a network given from outside, in place of all that.
    """

    architecture: Architecture
    pretrained: bool = False
    checkpoint: str | None = None
    module: nn.Module | None = None

    def build(self, seed: int, device: torch.device | str = "cpu") -> nn.Module:
        """The network before training; fresh weights depend on the seed alone."""
        if self.module is not None:
            return deepcopy(self.module).to(device)
        with ambient(seed, "weights"):
            network = open_vit(self.architecture, pretrained=self.pretrained, checkpoint=self.checkpoint)
        return network.to(device)

    def read(self, path: Path, device: torch.device | str) -> nn.Module:
        """The network with the weights of a stage's file, ready: frozen and in evaluation mode."""
        network = deepcopy(self.module) if self.module is not None else blank_vit(self.architecture)
        load_weights(network.body if isinstance(network, ViT) else network, path)
        return network.to(device).eval().requires_grad_(False)

    def shown(self) -> dict[str, Any]:
        """How it is built, for the record."""
        if self.module is not None:
            return {"module": type(self.module).__qualname__}
        return {**asdict(self.architecture), "pretrained": self.pretrained, "checkpoint": self.checkpoint is not None}

    @cached_property
    def depends(self) -> dict[str, Any]:
        """All that decides the network before training, as it is when first asked for."""
        if self.module is not None:
            return {"module": repr(self.module), "weights": tensors_digest(self.module.state_dict())}
        start = self.checkpoint or (fetch_weights(self.architecture.name) if self.pretrained else None)
        content = sha256(Path(start).read_bytes()).hexdigest() if start else None
        return {"architecture": asdict(self.architecture), "pretrained": self.pretrained, "weights": content}


@dataclass(frozen=True)
class Plan:
    """All that a run needs to start.

    Attributes:
        spec: what was asked.
        world: the data, on `device`.
        device: where everything is computed.
        arithmetic: how every network of the run computes.
        victim: the network of victim and twin.
        surrogate: the attacker's own network; None where the attack looks at none.
        content: what stands for the data's content: the fingerprint, or a digest of data given from outside.
    """

    spec: Spec
    world: World
    device: torch.device
    arithmetic: Arithmetic
    victim: Network
    surrogate: Network | None
    content: str

    def clean_stage(self, network: Network, seed: int) -> Stage:
        """A model trained on the clean training set: twin or surrogate, as the seed has it."""
        depends = {"network": network.depends, "seed": seed, "code": code_digest(*TRAINING_CODE)}
        return Stage("clean", {**self._training(), **depends})

    def surrogate_key(self) -> str | None:
        """What stands for the trained surrogate: its stage's key, or its checkpoint's digest where it is ready."""
        if self.surrogate is None:
            return None
        if self.surrogate.checkpoint is not None:
            return digest(self.surrogate.depends)
        return self.clean_stage(self.surrogate, SURROGATE_SEED).key

    def twin_stage(self) -> Stage:
        """The clean twin."""
        return self.clean_stage(self.victim, self.spec.seed)

    def victim_stage(self) -> Stage:
        """The victim."""
        attack_file = inspect.getfile(type(self.spec.params))
        depends = {
            "network": self.victim.depends,
            "seed": self.spec.seed,
            "surrogate": self.surrogate_key(),
            "attack": {"name": self.spec.attack, **asdict(self.spec.params), **_files(self.spec.params)},
            "code": code_digest(*TRAINING_CODE, *POISON_CODE, attack_file),
        }
        return Stage("victim", {**self._training(), **depends})

    def trigger_stage(self) -> Stage:
        """The trigger, where the attack optimises one; the victim's network is no part of it."""
        depends = self.victim_stage().depends
        return Stage("trigger", {name: part for name, part in depends.items() if name != "network"})

    def keys(self) -> dict[str, str]:
        """The key of everything that the run's record rests on."""
        surrogate = self.surrogate_key()
        trained = {"victim": self.victim_stage().key, "twin": self.twin_stage().key}
        trained |= {"surrogate": surrogate} if surrogate else {}
        lpips = {"torchmetrics": version("torchmetrics")} if lpips_at_hand() else None
        measures = {"code": code_digest(*MEASURE_CODE), "lpips": lpips}
        measure = Stage("measure", {**trained, **measures})
        return {**trained, "measure": measure.key}

    def _training(self) -> dict[str, Any]:
        train = self.world.train
        return {
            "data": {"content": self.content, "size": train.size, "rows": digest(train.index.tolist())},
            "recipe": {k: v for k, v in asdict(self.spec.recipe).items() if k != "precision"},
            "arithmetic": asdict(self.arithmetic),
            "device": self.device.type,
            "versions": {library: version(library) for library in ("torch", "timm")},
        }


def make_plan(
    spec: Spec,
    device: str,
    model: nn.Module | None = None,
    world: World | None = None,
    steps: Steps = silent,
) -> Plan:
    """Open the data and check all that can be checked before work starts.

    Args:
        spec: what to run.
        device: "auto", "cpu", "cuda" or "cuda:N".
        model: a network over images in [0, 1] in place of the spec's.
        world: data in place of the spec's.
        steps: how to show what is under way.

    Raises:
        UserError: data, device, model, checkpoint or target do not fit.
    """
    chosen = choose_device(device)
    data, content = spec.data, _content(world) if world else ""
    if world is None:
        with steps("read the data", None):
            world = open_data(data.name, data.size, data.limit, holdout=data.holdout, device=chosen)
        content = world.fingerprint
    _check_poison(spec, world)
    victim = Network(_architecture(spec.model, world), spec.model.pretrained, spec.model.checkpoint, model)
    surrogate = _surrogate(spec, world, victim) if spec.params.needs_surrogate else None
    tried = _try_out(victim, world)
    if hasattr(spec.params, "check_victim"):
        spec.params.check_victim(tried)
    if any(defence.params.needs_attention for defence in spec.defences):
        transformer(tried)
    if surrogate is not None:
        transformer(_try_out(surrogate, world))
    arithmetic = _arithmetic(spec, victim, tried, world, chosen, steps)
    return Plan(spec, world, chosen, arithmetic, victim, surrogate, content)


def _arithmetic(  # noqa: PLR0913 - what decides the speed, and how to show that it is measured
    spec: Spec, network: Network, model: nn.Module, world: World, device: torch.device, steps: Steps
) -> Arithmetic:
    """What the spec pins, or what is fastest for the victim's network on this machine."""
    recipe, train = spec.recipe, world.train
    if recipe.precision != "auto" or not len(train):
        return usual(recipe.precision, device)
    kind = repr(network.module) if network.module is not None else asdict(network.architecture)
    size = (train.pixels.shape[1], train.size, train.n_classes)
    return measured(model, kind, size, recipe.batch_size, training_steps(spec, len(train)), device, steps)


def training_steps(spec: Spec, n: int) -> int:
    """How many steps a training on so many images has."""
    return spec.recipe.epochs * -(-n // spec.recipe.batch_size)


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
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}; known: auto, cpu, cuda, cuda:N")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UserError(f"device {name!r} is not there ({found} GPUs found); use --device cpu")
    return device


def _check_poison(spec: Spec, world: World) -> None:
    """Whether the attack suits the data: its seed, image size, target, and images enough for its rate."""
    attack, classes = spec.params, world.train.n_classes
    if attack.needs_surrogate and spec.seed == SURROGATE_SEED:
        raise UserError(f"seed = {spec.seed} is the surrogate's own: the twin would be the surrogate; choose another")
    if hasattr(attack, "check"):
        attack.check(world.train.size)
    if attack.target >= classes:
        known = f"its {classes} are 0 to {classes - 1}"
        raise UserError(f"attack.target = {attack.target} is no class of {world.name}: {known}")
    if spec.recipe.jitter and world.train.pixels.shape[1] != 3:
        raise UserError(f"recipe.jitter = {spec.recipe.jitter:g} changes colours, and the images are grey; set it to 0")
    choose_rows(world.train.labels, attack.poison_rate, AllToOne(attack.target), attack.labels, stream(0, "check"))


def _surrogate(spec: Spec, world: World, victim: Network) -> Network:
    """The spec's own, or one like the spec's victim, fresh or from the hub: never with the victim's own weights."""
    if spec.surrogate is None:
        return replace(victim, checkpoint=None, module=None)
    return Network(_architecture(spec.surrogate, world), spec.surrogate.pretrained, spec.surrogate.checkpoint)


def _architecture(table: ModelTable, world: World) -> Architecture:
    size = world.train.size
    small = {"patch_size": max(1, size // 8), "depth": 4, "embed_dim": 96, "num_heads": 3}
    if world.name == "digits":
        small = {"patch_size": max(1, size // 4), "depth": 3, "embed_dim": 64, "num_heads": 4}
    overrides = dict(table.overrides) if table.name else {**small, **table.overrides}
    return Architecture(table.name or "vit_tiny_patch16_224", size, world.train.n_classes, overrides)


def _try_out(network: Network, world: World) -> nn.Module:
    """The network, after one look at one image.

    Raises:
        UserError: it cannot be built, or cannot look at the images.
    """
    model = network.build(0).eval()
    image = world.train.images(torch.zeros(1, dtype=torch.int64, device=world.train.device)).cpu()
    try:
        with torch.no_grad():
            shape = tuple(model(image).shape)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the network cannot look at images of {world.train.size} px: {reason}; mend [model]"
        ) from error
    if shape != (1, world.train.n_classes):
        raise UserError(
            f"the network answers with shape {shape}, wanted (1, {world.train.n_classes}): one logit a class"
        )
    return model


def _files(params: Any) -> dict[str, str]:
    """The content of the files that an attack's settings name, each in place of its name."""
    named = {f.name: Path(str(getattr(params, f.name))) for f in fields(params) if f.metadata["param"].file}
    return {name: sha256(path.read_bytes()).hexdigest() for name, path in named.items() if path.is_file()}


def _content(world: World) -> str:
    """A digest of the training and the test set, the same whether their pixels are in memory or mapped."""
    whole = sha256()
    for name, part in (("train", world.train), ("test", world.test)):
        others = {f"{name}.{key}": value for key, value in vars(part).items() if key not in ("pixels", "place")}
        whole.update(tensors_digest(others).encode())
        for rows in part.rows(CHUNK):
            mapped = part.place is not None
            some = part.gather(rows).permute(0, 3, 1, 2) if mapped else part.pixels[rows]
            whole.update(tensors_digest({f"{name}.pixels": some}).encode())
    return whole.hexdigest()


def tensors_digest(named: Mapping[str, Any]) -> str:
    """The SHA-256 (hex) of named tensors: names, shapes, types and content; whatever else is named is passed over."""
    whole = sha256()
    for name, tensor in named.items():
        if isinstance(tensor, torch.Tensor):
            whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
