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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vitrap.contracts import Crafted, Fitted, Trigger
from vitrap.errors import UserError
from vitrap.files import write_bytes
from vitrap.models.classifier import Architecture, Classifier, blank_model
from vitrap.probe import check_type, check_weights

TRIGGER = "trigger.safetensors"
"""File of the trigger that fires at test time."""
STORED = "stored.safetensors"
"""File of the trigger of poisoned training images, where it is another one; or of those images themselves."""


def check_networks(trigger: Trigger | Crafted, settings: Any) -> None:
    """Refuse a trigger with a network that could not be built again from its file.

    Raises:
        UserError: naming the field and the network's class.
    """
    for name, network in _networks(trigger).items():
        built = how_built(network)
        if "module" in built:
            _own_class(built["module"], settings)
        elif built["network"] is None:
            raise UserError(
                f"the trigger's {name} is a {type(network).__name__}, which its file cannot build again; give the"
                " network's class an attribute `arguments`: what its __init__ takes, as JSON can write it"
            )


def save_trigger(trigger: Trigger | Crafted, settings: Any, path: Path, **facts: str) -> None:
    """Write a trigger of the attack `settings`; `facts` go into the file's metadata.

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
            tensors[f.name] = value.detach().cpu().contiguous()
        elif isinstance(value, nn.Module):
            tensors |= {f"{f.name}.{k}": v.detach().cpu().contiguous() for k, v in weights_of(value).items()}
            plain[f.name] = how_built(value)
        elif value is not settings:
            plain[f.name] = {"value": value}
    kept = {"trigger": type(trigger).__name__, "fields": json.dumps(plain)}
    write_bytes(path, save(tensors, {**kept, **facts}))


def read_trigger(
    path: Path,
    settings: Any,
    networks: Mapping[str, nn.Module] | None = None,
    device: torch.device | str = "cpu",
) -> Trigger:
    """Read a trigger that `save_trigger` wrote for the attack `settings`.

    Args:
        path: the file.
        settings: the attack with its settings, as in the run's spec.
        networks: networks of the trigger that cannot be built from the file, by field name, with their weights.
        device: where the trigger is to work.

    Raises:
        UserError: the file is missing, damaged, or of another attack.
    """
    return cast(Trigger, _read(path, settings, networks or {}, device))


def _read(
    path: Path, settings: Any, networks: Mapping[str, nn.Module], device: torch.device | str
) -> Trigger | Crafted:
    """Read a file's tensors and metadata, and build the trigger of them."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"trigger file {str(path)!r} is missing or damaged: {error}") from error
    kind: Any = getattr(sys.modules[type(settings).__module__], facts.get("trigger", ""), None)
    kind = Crafted if facts.get("trigger") == Crafted.__name__ else kind
    if not isinstance(kind, type) or not is_dataclass(kind):
        raise UserError(f"trigger file {str(path)!r} belongs to another attack than {type(settings).__name__}")
    plain = json.loads(facts.get("fields", "{}"))
    values: dict[str, Any] = {}
    for f in fields(kind):
        if f.name in tensors:
            values[f.name] = tensors[f.name].to(device)
        elif f.name not in plain:
            values[f.name] = settings
        elif "value" not in plain[f.name]:
            network = _network(f.name, plain[f.name], settings, tensors, networks)
            values[f.name] = network.to(device).eval().requires_grad_(False)
        else:
            value = plain[f.name]["value"]
            values[f.name] = tuple(value) if isinstance(value, list) else value
    found: Any = kind(**values)
    return found


def read_fitted(
    folder: Path,
    settings: Any,
    networks: Mapping[str, nn.Module] | None = None,
    device: torch.device | str = "cpu",
) -> Fitted:
    """Read the triggers in the folder of a stage or of a finished run.

    Args:
        folder: it has `trigger.safetensors`, unless the trigger is known only after training, and may have
            `stored.safetensors`.
        settings: as for `read_trigger`.
        networks: as for `read_trigger`.
        device: as for `read_trigger`.

    Raises:
        UserError: a file is damaged, or of another attack.
    """
    there = [(folder / name).exists() for name in (TRIGGER, STORED)]
    trigger = read_trigger(folder / TRIGGER, settings, networks, device) if there[0] else None
    stored = _read(folder / STORED, settings, networks or {}, device) if there[1] else None
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
    name: str, built: Mapping[str, Any], settings: Any, tensors: Mapping[str, Tensor], given: Mapping[str, nn.Module]
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
    if "module" in built:
        with torch.random.fork_rng(devices=[]):  # its first weights are replaced, and must change no random state
            network = module = _own_class(built["module"], settings)(**built["arguments"])
    else:
        network = blank_model(Architecture(**built["network"]))
        module = network.body
    weights = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    check_weights(weights, f"the trigger file's {name}")
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the trigger file's {name} does not fit its network: {str(error).splitlines()[0]}") from error
    return network


def _own_class(named: str, settings: Any) -> type[nn.Module]:
    """The module class of this name, from vitrap or the attack's own package; nothing else is ever imported.

    Raises:
        UserError: it is of another package, or not there.
    """
    place, _, name = named.partition(":")
    home = type(settings).__module__.partition(".")[0]
    found: Any = None
    if place.partition(".")[0] in (home, "vitrap") and all(part.isidentifier() for part in place.split(".")):
        with suppress(ImportError):
            found = getattr(importlib.import_module(place), name, None)
    if not isinstance(found, type) or not issubclass(found, nn.Module) or found.__module__ != place:
        raise UserError(
            f"a trigger file names the network class {named!r}, which is none of vitrap's or of {home}; it is not built"
        )
    return found
