"""Writes and reads triggers: tensors and networks as safetensors, everything else as JSON in the metadata.

A trigger is a frozen dataclass. Its fields may be tensors, networks, the attack's own settings, and values that JSON
can write. The metadata name its class, which is looked up in the attack's own file and nowhere else. A network is one
of timm's, or of a class with an attribute `arguments`: the arguments of its `__init__`, as JSON can write them. The
file then names class and arguments; only classes of vitrap or of the attack's own package are built from a file.
"""

import importlib
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitrap.contracts import Crafted, Fitted, Images, Trigger
from vitrap.errors import UserError, shown
from vitrap.models.classifier import LARGEST, Classifier, blank_model, check_sizes, largest, parse_architecture
from vitrap.models.weights import first_line
from vitrap.probe import check_type, check_weights
from vitrap.tensor_file import TensorFile, read_tensor_file, write_tensor_file

TRIGGER = "trigger.safetensors"
"""File of the trigger that fires at test time."""
STORED = "stored.safetensors"
"""File of the trigger of poisoned training images, where it is another one; or of those images themselves."""
MISFITS = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError, ArithmeticError)
"""What a class of ours may raise if it is given values of other types or shapes than it was written with."""


def check_networks(trigger: Trigger | Crafted, attack: Any) -> None:
    """Refuse a trigger with a network that could not be built again from its file.

    Raises:
        UserError: naming the field and the network's class.
    """
    for name, network in _networks(trigger).items():
        built = how_built(network)
        if "module" in built:
            _own_class(built["module"], attack)
        elif built["network"] is None:
            raise UserError(
                f"the trigger's {name} is a {type(network).__name__}, which its file cannot build again; give the"
                " network's class an attribute `arguments`: what its __init__ takes, as JSON can write it"
            )


def save_trigger(trigger: Trigger | Crafted, attack: Any, path: Path, **facts: str) -> None:
    """Write a trigger of an attack; `facts` go into the file's metadata.

    Raises:
        TypeError: the trigger is no dataclass, or a field of it cannot be written.
    """
    if not is_dataclass(trigger):
        raise TypeError(f"a trigger of type {type(trigger).__name__} cannot be kept; make it a frozen dataclass")
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for f in fields(trigger):
        value = getattr(trigger, f.name)
        if isinstance(value, Tensor):
            tensors[f.name] = value
        elif isinstance(value, nn.Module):
            tensors |= {f"{f.name}.{k}": v for k, v in weights_of(value).items()}
            plain[f.name] = how_built(value)
        elif value is not attack:  # a field that holds the attack itself is not written
            plain[f.name] = {"value": value}
    kept = {"trigger": type(trigger).__name__, "fields": json.dumps(plain)}
    write_tensor_file(path, tensors, {**kept, **facts})


def read_trigger(
    path: Path,
    attack: Any,
    networks: Mapping[str, nn.Module] | None = None,
    device: torch.device | str = "cpu",
) -> Trigger:
    """Read a trigger that `save_trigger` wrote for an attack.

    Args:
        path: the file.
        attack: the attack with its settings, as in the run's spec.
        networks: networks of the trigger that cannot be built from the file, by field name, with their weights.
        device: where the trigger is to work.

    Raises:
        UserError: the file is missing, damaged, or of another attack.
    """
    return cast(Trigger, _read(path, attack, networks or {}, device))


def _read(path: Path, attack: Any, networks: Mapping[str, nn.Module], device: torch.device | str) -> Trigger | Crafted:
    """Read a file's tensors and metadata, and build the trigger of them."""
    try:
        file = read_tensor_file(path)
    except (OSError, UserError) as error:
        raise UserError(f"trigger file {str(path)!r} is missing or damaged: {error}") from error
    try:
        return _built(file, attack, networks, device)
    except MISFITS as error:
        raise UserError(f"trigger file {str(path)!r}: {first_line(error)}") from error


def _built(
    file: TensorFile, attack: Any, networks: Mapping[str, nn.Module], device: torch.device | str
) -> Trigger | Crafted:
    """The trigger of a file; whatever its class makes of odd values is raised as it is."""
    kind = _kind(file.facts.get("trigger", ""), attack)
    plain = file.table("fields") if "fields" in file.facts else {}
    values: dict[str, Any] = {}
    for f in fields(kind):
        if f.name in file.tensors:
            values[f.name] = file.tensors[f.name].to(device)
        elif f.name not in plain:  # the field holds the attack itself
            values[f.name] = attack
        elif "value" not in plain[f.name]:
            network = _network(f.name, plain[f.name], attack, file.tensors, networks)
            values[f.name] = network.to(device).eval().requires_grad_(False)
        else:
            value = plain[f.name]["value"]
            values[f.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _kind(named: str, attack: Any) -> Any:
    """The class of this name that is a trigger, from the file of an attack; or `Crafted`."""
    kind: Any = getattr(sys.modules[type(attack).__module__], named, None)
    kind = Crafted if named == Crafted.__name__ else kind
    fires = isinstance(kind, type) and any("__call__" in vars(each) for each in kind.__mro__)
    if kind is not Crafted and not (is_dataclass(kind) and fires):
        raise UserError(
            f"belongs to another attack than {type(attack).__name__} (its trigger is a {shown(named)});"
            " run its spec again"
        )
    return kind


def try_out(trigger: Trigger, images: Images, path: Path) -> None:
    """Refuse a trigger that does not return finite images of the same shape.

    Args:
        trigger: the trigger.
        images: some images.
        path: the trigger's file, for the message.

    Raises:
        UserError: it does not.
    """
    damaged = f"trigger file {str(path)!r} is damaged"
    try:
        found = trigger(images)
        fits = found.shape == images.shape and bool(found.isfinite().all())
    except MISFITS as error:
        raise UserError(f"{damaged}: its trigger fails ({first_line(error)}); run its spec again") from error
    if not fits:
        raise UserError(f"{damaged}: its trigger does not return images; run its spec again")


def save_fitted(fitted: Fitted, attack: Any, folder: Path, **facts: str) -> None:
    """Write the trigger at test time and what stored poison carries into a folder, each where there is one.

    `facts` go into the files' metadata.
    """
    for name, trigger in ((TRIGGER, fitted.trigger), (STORED, fitted.stored)):
        if trigger is not None:
            save_trigger(trigger, attack, folder / name, **facts)


def read_fitted(folder: Path, attack: Any, device: torch.device | str) -> Fitted:
    """Read the triggers in the folder of a stage or of a finished run.

    Args:
        folder: it has `trigger.safetensors`, unless the trigger is known only after training, and may have
            `stored.safetensors`.
        attack: as for `read_trigger`.
        device: as for `read_trigger`.

    Raises:
        UserError: a file is damaged, or of another attack.
    """
    trigger = read_trigger(folder / TRIGGER, attack, device=device) if (folder / TRIGGER).exists() else None
    stored = _read(folder / STORED, attack, {}, device) if (folder / STORED).exists() else None
    return Fitted(trigger, stored)


def _networks(trigger: Trigger | Crafted) -> dict[str, nn.Module]:
    """The networks that a trigger holds, by field name."""
    values = {f.name: getattr(trigger, f.name) for f in fields(trigger)} if is_dataclass(trigger) else {}
    return {name: value for name, value in values.items() if isinstance(value, nn.Module)}


def weights_of(network: nn.Module) -> Mapping[str, Tensor]:
    """A network's weights by name, without the normalisation around a timm network."""
    return (network.body if isinstance(network, Classifier) else network).state_dict()


def how_built(network: nn.Module) -> dict[str, Any]:
    """What a file says of a network so that it can be built again; {"network": None} where it cannot."""
    if isinstance(network, Classifier):
        return {"network": asdict(network.architecture)}
    arguments = getattr(network, "arguments", None)
    if arguments is None:
        return {"network": None}
    kind = type(network)
    return {"module": f"{kind.__module__}:{kind.__qualname__}", "arguments": dict(arguments)}


def _network(
    name: str, built: Mapping[str, Any], attack: Any, tensors: Mapping[str, Tensor], given: Mapping[str, nn.Module]
) -> nn.Module:
    """Build the network of a field, or take it from `given`, with its weights."""
    if built.get("network") is None and "module" not in built:
        if name not in given:
            raise UserError(
                f"the trigger's {name} is a network that its file cannot build: give it as networks={{{name!r}: ...}}"
            )
        check_type(given[name], nn.Module, f"networks[{name!r}]")
        check_weights(given[name].state_dict(), f"networks[{name!r}]")
        return given[name]
    weights = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    if "module" in built:
        check_sizes(built["arguments"], max(LARGEST, largest(weights)))
        with torch.random.fork_rng(devices=[]):  # its first weights are replaced, and must change no random state
            network = module = _own_class(built["module"], attack)(**built["arguments"])
    else:
        network = blank_model(parse_architecture(built["network"], weights))
        module = network.body
    check_weights(weights, f"the trigger file's {name}")
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the trigger file's {name} does not fit its network: {str(error).splitlines()[0]}") from error
    return network


def _own_class(named: str, attack: Any) -> type[nn.Module]:
    """The module class of this name, from vitrap or the attack's own package; nothing else is ever imported.

    Raises:
        UserError: it is of another package, or not there.
    """
    place, _, name = named.partition(":")
    home = type(attack).__module__.partition(".")[0]
    found: Any = None
    parts = place.split(".")
    # A module such as `__main__` would do its work when it is imported.
    if parts[0] in (home, "vitrap") and all(part.isidentifier() and not part.startswith("__") for part in parts):
        with suppress(ImportError):
            found = getattr(importlib.import_module(place), name, None)
    if not isinstance(found, type) or not issubclass(found, nn.Module) or found.__module__ != place:
        raise UserError(
            f"a trigger file names the network class {named!r}, which is none of vitrap's or of {home}; it is not built"
        )
    return found
