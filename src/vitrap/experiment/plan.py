"""`make_plan`: opens a spec's data and checks everything about it, before anything is written.

A `Plan` also says what each stage depends on: all that decides the stage's content, down to a digest of the code that
makes it. So no stage that an older version of the attack made is used with the present one.
"""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from vitrap.contracts import Goal
from vitrap.data.poison import choose_covers, choose_rows
from vitrap.data.sources import World, open_data
from vitrap.errors import UserError
from vitrap.experiment.code import fitting_code, measuring_code, training_code
from vitrap.experiment.network import Network, first_image, network_of, tensors_digest, try_out
from vitrap.experiment.progress import Progress, no_progress
from vitrap.experiment.spec import Spec, digest
from vitrap.experiment.store import Stage, key_of
from vitrap.experiment.streams import SURROGATE_SEED, TEST_SURROGATE_SEED, stream
from vitrap.images import CHUNK, ImageSet
from vitrap.metrics.stealth import lpips_at_hand
from vitrap.models.observe import transformer
from vitrap.probe import check_type
from vitrap.resuming import state_seconds
from vitrap.train.arithmetic import Arithmetic, arithmetic_of
from vitrap.train.loop import BATCH_NORMS
from vitrap.train.optimiser import make_optimiser
from vitrap.train.recipe import ARITHMETIC

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SeededNetwork:
    """A network, and the seed that its weights and its training are drawn with."""

    network: Network
    seed: int


@dataclass(frozen=True)
class Plan:
    """A run before it starts: the spec, its data opened, device, networks and arithmetic decided. No model is trained.

    Attributes:
        spec: the spec.
        world: the data, on `device`.
        device: where everything is computed.
        arithmetic: how every network of the run computes.
        threads: how many of the processor's threads share each sum, which decides its last digits; None on a GPU.
        victim: the network of victim and twin.
        surrogates: the attacker's own networks, by their tables in a spec; empty where the attack uses none.
        data_digest: stands for the content of the data in stage keys.
        other: other images of the attacker; None where no setting of the attack names a data set.
    """

    spec: Spec
    world: World
    device: torch.device
    arithmetic: Arithmetic
    threads: int | None
    victim: Network
    surrogates: Mapping[str, SeededNetwork]
    data_digest: str
    other: World | None = None

    @property
    def twin(self) -> SeededNetwork:
        """The clean twin: the victim's network with the run's seed."""
        return SeededNetwork(self.victim, self.spec.seed)

    @property
    def goal(self) -> Goal:
        """Which label triggered images should get."""
        return self.spec.attack.goal_for(self.world.train.n_classes)

    def clean_stage(self, model: SeededNetwork) -> Stage:
        """The stage of a model that is trained on clean images, twin or surrogate: network and seed are in its key."""
        depends = {"network": model.network.depends, "seed": model.seed, "code": training_code()}
        return Stage("clean", {**self._training(), **depends})

    def surrogate_keys(self) -> dict[str, str]:
        """A key for each surrogate: that of its stage or, where it is read from a checkpoint, a digest of that."""
        return {
            name: digest(each.network.depends) if each.network.checkpoint else self.clean_stage(each).key
            for name, each in self.surrogates.items()
        }

    def twin_stage(self) -> Stage:
        """The stage of the clean twin."""
        return self.clean_stage(self.twin)

    def victim_stage(self) -> Stage:
        """The stage of the victim: it depends on training, seed, surrogates, and all about the attack."""
        attack = self.spec.attack
        # A file that a setting names counts by its content, not by its path.
        settings = {**asdict(attack), **self._file_digests()}
        depends = {
            "network": self.victim.depends,
            "seed": self.spec.seed,
            "surrogates": self.surrogate_keys(),
            "attack": {"name": self.spec.attack_name, "version": attack.version, **settings},
            "code": training_code(inspect.getfile(type(attack))),
        }
        # An attacker of weights edits the trained twin.
        if attack.threat == "weights":
            depends["twin"] = self.twin_stage().key
        return Stage("victim", {**self._training(), **depends})

    def trigger_stage(self) -> Stage:
        """The stage of the trigger: as the victim's, but it depends on neither the victim's network nor its recipe."""
        depends = dict(self.victim_stage().depends)
        for name in ("network", "recipe", "twin"):
            depends.pop(name, None)
        # Without a surrogate no network computes the trigger, and how networks compute does not matter.
        if not self.surrogates:
            depends.pop("arithmetic")
            depends.pop("threads")
        return Stage("trigger", {**depends, "code": fitting_code(inspect.getfile(type(self.spec.attack)))})

    def keys(self) -> dict[str, str]:
        """The key of each trained model by role and, as `measure`, one of them all and the code that measures them."""
        trained = {"victim": self.victim_stage().key, "twin": self.twin_stage().key, **self.surrogate_keys()}
        # LPIPS is measured where its weights are at hand, so a record without it is made again once they are.
        lpips = {"torchmetrics": version("torchmetrics")} if lpips_at_hand() else None
        measure = key_of({**trained, "code": measuring_code(), "lpips": lpips})
        return {**trained, "measure": measure}

    def _file_digests(self) -> dict[str, str]:
        """Digests of the files and data sets that the attack's settings name, by the name of the setting."""
        digests = self.spec.contents().items()
        found = {key.removeprefix("attack."): content for key, content in digests if key.startswith("attack.")}
        if self.other is not None:
            found |= {f.name: self.other.fingerprint for f in fields(self.spec.attack) if f.metadata["param"].data}
        return found

    def _training(self) -> dict[str, Any]:
        """What every training of the run depends on: data, recipe, arithmetic, device and libraries."""
        train = self.world.train
        return {
            "data": {"content": self.data_digest, "size": train.size, "rows": digest(train.index.tolist())},
            "recipe": {k: v for k, v in asdict(self.spec.recipe).items() if k not in ARITHMETIC},
            "arithmetic": asdict(self.arithmetic),
            "device": self.device.type,
            "threads": self.threads,
            "versions": {library: version(library) for library in ("torch", "timm")},
        }


def make_plan(  # noqa: PLR0913 - all that a run is made of
    spec: Spec,
    device: str,
    model: nn.Module | None = None,
    world: World | None = None,
    progress: Progress = no_progress,
    with_surrogates: bool = True,
) -> Plan:
    """Open the data and check all that can be checked before work starts.

    Args:
        spec: what to run.
        device: "auto", "cpu", "cuda" or "cuda:N".
        model: a network over images in [0, 1] in place of the spec's.
        world: data in place of the spec's.
        progress: displays that data are being read.
        with_surrogates: False where nothing is attacked, as for a finished run: the plan then has no surrogates, and
            the victim's starting weights, which may be gone by now, are not read.

    Raises:
        UserError: data, device, model, checkpoint or target do not fit.
    """
    chosen = choose_device(device)
    # Open the data, unless they are given. Their content goes into the keys of all stages.
    data = spec.data
    if world is None:
        with progress("read the data", None):
            world = open_data(data.name, data.size, data.limit, holdout=data.holdout, device=chosen)
        data_digest = world.fingerprint
    else:
        _check_world(world)
        data_digest = digest_of_data(world)
    # To choose settings, a run is measured on held-out training images in place of the test set.
    if data.measured == "choose":
        world = replace(world, test=world.choose)
    _check_attack(spec, world)
    # Decide the networks.
    victim = network_of(spec.model, world, model)
    surrogates = _surrogates(spec, world, victim) if with_surrogates else {}
    # Build the victim once and show it an image. Recipe, attack and defences may refuse such a network; what the calls
    # below return is not needed.
    without_weights = replace(victim, checkpoint=None, weights=None, pretrained=False)
    victim_model = try_out(victim if with_surrogates else without_weights, world)
    _check_recipe(spec, world, victim_model)
    make_optimiser(victim_model, spec.recipe)
    if hasattr(spec.attack, "check_victim"):
        spec.attack.check_victim(victim_model)
    if any(defence.method.needs_attention for defence in spec.defences):
        transformer(victim_model)
    # Likewise each surrogate.
    for role, surrogate in surrogates.items():
        ready = try_out(surrogate.network, world, role, untrained=surrogate.network.checkpoint is None)
        if hasattr(spec.attack, "check_surrogate"):
            spec.attack.check_surrogate(ready, first_image(world))
    # Refuse an odd VITRAP_STATE_SECONDS here, not in the first training.
    state_seconds()
    arithmetic = arithmetic_of(spec.recipe, victim_model, chosen)
    other = _other_images(spec, world, chosen)
    threads = torch.get_num_threads() if chosen.type == "cpu" else None
    return Plan(spec, world, chosen, arithmetic, threads, victim, surrogates, data_digest, other)


def training_steps(spec: Spec, n: int) -> int:
    """The number of steps of a training on `n` images."""
    return spec.recipe.epochs * -(-n // spec.recipe.batch_size)


def choose_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is the GPU where there is one, else the CPU.

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
    """Refuse an attack that does not suit the data: its seed, image size, classes, or too few images for its rates."""
    attack, train = spec.attack, world.train
    # A surrogate with the run's own seed and network would be the very twin.
    taken = [SURROGATE_SEED, TEST_SURROGATE_SEED] if spec.test_surrogate else [SURROGATE_SEED]
    if attack.needs_surrogate and spec.seed in taken:
        raise UserError(f"seed = {spec.seed} is the surrogate's own: the twin would be the surrogate; choose another")
    if spec.test_surrogate is not None and not getattr(attack, "takes_test_surrogate", False):
        raise UserError(f"attack {spec.attack_name} has no surrogate at test time; remove [test_surrogate]")
    if hasattr(attack, "check_size"):
        attack.check_size(train.size)
    for name in ("target", "source"):
        label = getattr(attack, name, None)
        if label is not None and label >= train.n_classes:
            known = f"its {train.n_classes} are 0 to {train.n_classes - 1}"
            raise UserError(f"attack.{name} = {label} is no class of {world.name}: {known}")
    # Draw poison and covers once, for these functions refuse rates that there are not images enough for.
    goal = attack.goal_for(train.n_classes)
    _check_classes(spec, world, goal)
    free = torch.ones_like(train.labels, dtype=torch.bool)
    if (rate := getattr(attack, "poison_rate", None)) is not None:
        free[choose_rows(train.labels, rate, goal, attack.labels, stream(0, "check"))] = False
    if rate := getattr(attack, "cover_rate", None):
        choose_covers(free, rate, stream(0, "check"))


def _check_world(world: World) -> None:
    """Refuse data from outside whose parts differ in channels, size or number of classes.

    Raises:
        UserError: naming the part.
    """
    check_type(world, World, "world")
    wanted = _shape(world.train)
    for name in ("test", "choose", "clean", "threshold"):
        if (found := _shape(getattr(world, name))) != wanted:
            raise UserError(
                f"world.{name} has (channels, size, classes) {found}, and world.train {wanted}; make them alike"
            )


def _shape(images: ImageSet) -> tuple[int, int, int]:
    """Channels, working size and number of classes of a set."""
    return images.channels, images.size, images.n_classes


def _check_classes(spec: Spec, world: World, goal: Goal) -> None:
    """Refuse a goal that no test image counts for, and classes that nothing teaches, for hold-out may take all of one.

    These are the classes of test images, and those that the attacker wants for them.
    """
    train, test = world.train.labels, world.test.labels
    empty = sorted(set(range(world.train.n_classes)) - set(train.unique().tolist()))
    if empty:
        log.warning("vitrap: %s has no training image of %d of its classes: %s", world.name, len(empty), empty[:10])
    counted = test[goal.counts(test)]
    if not len(counted):
        raise UserError(
            f"no image that {world.name} is measured on counts for the goal of attack {spec.attack_name}; "
            "choose another attack.target or attack.source"
        )
    for labels, what in ((goal.labels(counted), "the attack's target"), (test, "which it is measured on")):
        untaught = labels[~torch.isin(labels, train)].unique()
        if len(untaught):
            raise UserError(
                f"{world.name} has no training image of class {int(untaught[0])}, {what}; choose another target or "
                f"source, lower data.holdout = {spec.data.holdout:g}, or leave that class out"
            )


def _surrogates(spec: Spec, world: World, victim: Network) -> dict[str, SeededNetwork]:
    """The attacker's own networks: the surrogate, and the one at test time where the spec has such a table.

    A surrogate that the spec does not describe is built like the victim and starts as it does, fresh or from pretrained
    weights, but is trained with a seed of its own. It never takes weights that only the victim has, those of a
    checkpoint or of a network that the caller gave.
    """
    if not spec.attack.needs_surrogate:
        return {}
    like_victim = replace(victim, checkpoint=None, module=None)
    network = network_of(spec.surrogate, world) if spec.surrogate else like_victim
    found = {"surrogate": SeededNetwork(network, SURROGATE_SEED)}
    if spec.test_surrogate:
        found["test_surrogate"] = SeededNetwork(network_of(spec.test_surrogate, world), TEST_SURROGATE_SEED)
    return found


def _other_images(spec: Spec, world: World, device: torch.device) -> World | None:
    """The data set that a setting of the attack names, at the run's image size; None where no setting names one.

    Raises:
        UserError: it cannot be opened.
    """
    names = [getattr(spec.attack, f.name) for f in fields(spec.attack) if f.metadata["param"].data]
    named = [name for name in names if name is not None]
    if not named:
        return None
    # The run's own data set is opened already; an attack gets its training set alone.
    return world if named[0] == world.name else open_data(named[0], world.train.size, device=device)


def _check_recipe(spec: Spec, world: World, model: nn.Module) -> None:
    """Refuse jitter of grey images, and batches of one image for a network with batch norm, which needs two."""
    if spec.recipe.jitter and world.train.channels != 3:
        raise UserError(f"recipe.jitter = {spec.recipe.jitter:g} changes colours, and the images are grey; set it to 0")
    if spec.recipe.batch_size == 1 and any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        raise UserError("recipe.batch_size = 1 is too small for a network with batch norm; make it at least 2")


def digest_of_data(world: World) -> str:
    """A digest of the training and the test set, the same whether their pixels are in memory or mapped from a file."""
    whole = sha256()
    for name, part in (("train", world.train), ("test", world.test)):
        # Pixels are digested a chunk at a time, for they may not fit into memory.
        others = {f"{name}.{key}": value for key, value in vars(part).items() if key not in ("pixels", "pixel_row")}
        whole.update(tensors_digest(others).encode())
        for rows in part.row_batches(CHUNK):
            whole.update(tensors_digest({f"{name}.pixels": part.gather(rows)}).encode())
    return whole.hexdigest()
