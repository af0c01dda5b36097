"""A plan: a spec with its data opened and everything about it checked, before anything is written.

It also says what each stage depends on: everything that decides its content, down to a digest of the code it uses,
so that an edited attack never meets yesterday's victim.
"""

import inspect
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitrap.contracts import Goal
from vitrap.data.poison import choose_covers, choose_rows
from vitrap.data.sources import World, open_data
from vitrap.errors import UserError
from vitrap.experiment.code import fitting_code, measuring_code, training_code
from vitrap.experiment.network import Network, first_image, network_of, tensors_digest, try_out
from vitrap.experiment.progress import Steps, silent
from vitrap.experiment.spec import Spec, digest
from vitrap.experiment.store import Stage
from vitrap.experiment.streams import SURROGATE_SEED, TEST_SURROGATE_SEED, stream
from vitrap.images import CHUNK
from vitrap.keeping import state_seconds
from vitrap.metrics.stealth import lpips_at_hand
from vitrap.models.observe import transformer
from vitrap.train.arithmetic import Arithmetic, arithmetic_of
from vitrap.train.optimiser import make_optimiser
from vitrap.train.recipe import ARITHMETIC


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
        test_surrogate: the attacker's second one, for the trigger at test time; None where there is none.
        other: the attacker's other images; None where no setting names any.
    """

    spec: Spec
    world: World
    device: torch.device
    arithmetic: Arithmetic
    victim: Network
    surrogate: Network | None
    content: str
    test_surrogate: Network | None = None
    other: World | None = None

    @property
    def goal(self) -> Goal:
        """What the attacker wants."""
        return self.spec.attack.goal_for(self.world.train.n_classes)

    def surrogates(self) -> dict[str, tuple[Network, int]]:
        """The attacker's own networks by name, each with its seed."""
        both = {
            "surrogate": (self.surrogate, SURROGATE_SEED),
            "test_surrogate": (self.test_surrogate, TEST_SURROGATE_SEED),
        }
        return {name: (network, seed) for name, (network, seed) in both.items() if network is not None}

    def clean_stage(self, network: Network, seed: int) -> Stage:
        """A model trained on the clean training set: twin or surrogate, as the seed has it."""
        depends = {"network": network.depends, "seed": seed, "code": training_code()}
        return Stage("clean", {**self._training(), **depends})

    def surrogate_keys(self) -> dict[str, str]:
        """What stands for each trained surrogate: its stage's key, or its checkpoint's digest where it is ready."""
        return {
            name: digest(network.depends) if network.checkpoint else self.clean_stage(network, seed).key
            for name, (network, seed) in self.surrogates().items()
        }

    def twin_stage(self) -> Stage:
        """The clean twin."""
        return self.clean_stage(self.victim, self.spec.seed)

    def victim_stage(self) -> Stage:
        """The victim."""
        attack = self.spec.attack
        named = {"name": self.spec.attack_name, "version": attack.version, **asdict(attack), **self._contents()}
        depends = {
            "network": self.victim.depends,
            "seed": self.spec.seed,
            "surrogates": self.surrogate_keys(),
            "attack": named,
            "code": training_code(inspect.getfile(type(attack))),
        }
        if attack.threat == "weights":
            depends["twin"] = self.twin_stage().key
        return Stage("victim", {**self._training(), **depends})

    def trigger_stage(self) -> Stage:
        """The attack's trigger; neither the victim's network nor its recipe is part of it."""
        depends = dict(self.victim_stage().depends)
        alone = () if self.surrogates() else ("arithmetic",)  # where no network computes it
        for name in ("network", "recipe", "twin", *alone):
            depends.pop(name, None)
        return Stage("trigger", {**depends, "code": fitting_code(inspect.getfile(type(self.spec.attack)))})

    def keys(self) -> dict[str, str]:
        """The key of everything that the run's record rests on."""
        trained = {"victim": self.victim_stage().key, "twin": self.twin_stage().key, **self.surrogate_keys()}
        lpips = {"torchmetrics": version("torchmetrics")} if lpips_at_hand() else None
        measures = {"code": measuring_code(), "lpips": lpips}
        measure = Stage("measure", {**trained, **measures})
        return {**trained, "measure": measure.key}

    def _contents(self) -> dict[str, str]:
        """The content of the files and data sets that the attack's settings name, each in place of its name."""
        attack, found = self.spec.attack, {}
        for f in fields(attack):
            path = Path(str(getattr(attack, f.name)))
            if f.metadata["param"].file and path.is_file():
                found[f.name] = sha256(path.read_bytes()).hexdigest()
            if f.metadata["param"].data and self.other is not None:
                found[f.name] = self.other.fingerprint
        return found

    def _training(self) -> dict[str, Any]:
        train = self.world.train
        return {
            "data": {"content": self.content, "size": train.size, "rows": digest(train.index.tolist())},
            "recipe": {k: v for k, v in asdict(self.spec.recipe).items() if k not in ARITHMETIC},
            "arithmetic": asdict(self.arithmetic),
            "device": self.device.type,
            "versions": {library: version(library) for library in ("torch", "timm")},
        }


def make_plan(  # noqa: PLR0913 - all that a run is made of
    spec: Spec,
    device: str,
    model: nn.Module | None = None,
    world: World | None = None,
    steps: Steps = silent,
    attacking: bool = True,
) -> Plan:
    """Open the data and check all that can be checked before work starts.

    Args:
        spec: what to run.
        device: "auto", "cpu", "cuda" or "cuda:N".
        model: a network over images in [0, 1] in place of the spec's.
        world: data in place of the spec's.
        steps: how to show what is under way.
        attacking: whether the attack is still to be fitted, with the surrogates that it asks for, and the victim still
            to be trained from where its weights start.

    Raises:
        UserError: data, device, model, checkpoint or target do not fit.
    """
    chosen = choose_device(device)
    data, content = spec.data, _content(world) if world else ""
    if world is None:
        with steps("read the data", None):
            world = open_data(data.name, data.size, data.limit, holdout=data.holdout, device=chosen)
        content = world.fingerprint
    if data.measured == "choose":
        world = replace(world, test=world.choose)
    _check_attack(spec, world)
    victim = network_of(spec.model, world, model)
    surrogate, second = _surrogates(spec, world, victim) if attacking else (None, None)
    tried = try_out(victim if attacking else replace(victim, checkpoint=None, weights=None, pretrained=False), world)
    _check_batches(spec, tried)
    make_optimiser(tried, spec.recipe)
    state_seconds()
    if hasattr(spec.attack, "check_victim"):
        spec.attack.check_victim(tried)
    if any(defence.method.needs_attention for defence in spec.defences):
        transformer(tried)
    for network in (surrogate, second):
        if network is not None:
            ready = try_out(network, world)
            if hasattr(spec.attack, "check_surrogate"):
                spec.attack.check_surrogate(ready, first_image(world))
    arithmetic = arithmetic_of(spec.recipe, tried, chosen)
    other = _other_images(spec, world, chosen)
    return Plan(spec, world, chosen, arithmetic, victim, surrogate, content, second, other)


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


def _check_attack(spec: Spec, world: World) -> None:
    """Whether the attack suits the data: its seed, image size, classes, and images enough for its rates."""
    attack, train = spec.attack, world.train
    taken = (SURROGATE_SEED, *((TEST_SURROGATE_SEED,) if spec.test_surrogate else ()))
    if attack.needs_surrogate and spec.seed in taken:
        raise UserError(f"seed = {spec.seed} is the surrogate's own: the twin would be the surrogate; choose another")
    if spec.test_surrogate is not None and not getattr(attack, "test_surrogate", False):
        raise UserError(f"attack {spec.attack_name} has no surrogate at test time; remove [test_surrogate]")
    if hasattr(attack, "check"):
        attack.check(train.size)
    for name in ("target", "source"):
        label = getattr(attack, name, None)
        if label is not None and label >= train.n_classes:
            known = f"its {train.n_classes} are 0 to {train.n_classes - 1}"
            raise UserError(f"attack.{name} = {label} is no class of {world.name}: {known}")
    if spec.recipe.jitter and train.pixels.shape[1] != 3:
        raise UserError(f"recipe.jitter = {spec.recipe.jitter:g} changes colours, and the images are grey; set it to 0")
    goal = attack.goal_for(train.n_classes)
    free = torch.ones_like(train.labels, dtype=torch.bool)
    if (rate := getattr(attack, "poison_rate", None)) is not None:
        free[choose_rows(train.labels, rate, goal, attack.labels, stream(0, "check"))] = False
    if rate := getattr(attack, "cover_rate", None):
        choose_covers(free, rate, stream(0, "check"))


def _surrogates(spec: Spec, world: World, victim: Network) -> tuple[Network | None, Network | None]:
    """The attacker's own networks: the surrogate, and the one at test time, where the spec has such a table.

    A surrogate that the spec does not describe starts like the victim, fresh or from pretrained weights, and is trained
    with a seed of its own. It never has weights that are the victim's alone: a checkpoint, a network from outside.
    """
    if not spec.attack.needs_surrogate:
        return None, None
    found = [network_of(table, world) if table else None for table in (spec.surrogate, spec.test_surrogate)]
    return found[0] or replace(victim, checkpoint=None, module=None), found[1]


def _other_images(spec: Spec, world: World, device: torch.device) -> World | None:
    """The data set that a setting of the attack names, at the run's image size; of the run's own, its training part.

    Raises:
        UserError: it cannot be opened.
    """
    names = [getattr(spec.attack, f.name) for f in fields(spec.attack) if f.metadata["param"].data]
    named = [name for name in names if name is not None]
    if not named:
        return None
    return world if named[0] == world.name else open_data(named[0], world.train.size, device=device)


def _check_batches(spec: Spec, model: nn.Module) -> None:
    """Refuse batches of one image where batch norm could not take them."""
    if spec.recipe.batch_size == 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UserError("recipe.batch_size = 1 is too small for a network with batch norm; make it at least 2")


def _content(world: World) -> str:
    """A digest of the training and the test set, the same whether their pixels are in memory or mapped."""
    whole = sha256()
    for name, part in (("train", world.train), ("test", world.test)):
        others = {f"{name}.{key}": value for key, value in vars(part).items() if key not in ("pixels", "place")}
        whole.update(tensors_digest(others).encode())
        for rows in part.rows(CHUNK):
            whole.update(tensors_digest({f"{name}.pixels": part.gather(rows)}).encode())
    return whole.hexdigest()
