"""`Network`: how a network of a run is built, where its weights start, and what stands for it in a stage's key."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrap.contracts import Images
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.experiment.record import BuiltNetwork, OwnNetwork
from vitrap.experiment.spec import ModelTable
from vitrap.experiment.spec_paths import SpecPath
from vitrap.experiment.streams import ambient
from vitrap.models.classifier import Architecture, Classifier, blank_model, fetch_weights, load_weights, open_model
from vitrap.probe import check_network, check_type
from vitrap.train.optimiser import head_weights


@dataclass(frozen=True)
class Network:
    """A network of a run before it is built: its architecture, and where its weights start.

    Attributes:
        architecture: timm name, image size, classes and overrides.
        pretrained: whether its weights start from the hub's.
        checkpoint: a safetensors file whose weights it takes as they are; None: none.
        module: the caller's own network, in place of all that; None: none.
        weights: a safetensors file whose weights, adapted to the network, training starts from; None: none.
        linear_probe: whether its head alone is trained.
    """

    architecture: Architecture
    pretrained: bool = False
    checkpoint: str | None = None
    module: nn.Module | None = None
    weights: str | None = None
    linear_probe: bool = False

    def build(self, seed: int, device: torch.device | str = "cpu") -> nn.Module:
        """Build the network as it is before training; fresh weights depend on the seed alone."""
        if self.module is not None:
            return deepcopy(self.module).to(device)
        start = {"pretrained": self.pretrained, "checkpoint": self.checkpoint, "weights": self.weights}
        with ambient(seed, "weights"):
            network = open_model(self.architecture, **start)
        if self.linear_probe:
            network.requires_grad_(False)
            for weight in head_weights(network.body, "linear_probe"):
                weight.requires_grad_(True)
        return network.to(device)

    def read(self, path: Path, device: torch.device | str) -> nn.Module:
        """The trained network, with the weights of a stage's file: frozen and in evaluation mode."""
        network = deepcopy(self.module) if self.module is not None else blank_model(self.architecture)
        load_weights(network.body if isinstance(network, Classifier) else network, path)
        return network.to(device).eval().requires_grad_(False)

    @cached_property
    def adapted(self) -> str | None:
        """What of `weights` was adapted to the network, in one line; None where there is no such file."""
        if self.module is not None or self.weights is None:
            return None
        with ambient(0, "weights"):
            return open_model(self.architecture, weights=self.weights).adapted

    def for_record(self) -> BuiltNetwork | OwnNetwork:
        """What the record says of the network."""
        if self.module is not None:
            return OwnNetwork(type(self.module).__qualname__)
        return BuiltNetwork(
            **asdict(self.architecture),
            pretrained=self.pretrained,
            checkpoint=self.checkpoint is not None,
            weights=self.adapted,
            linear_probe=self.linear_probe,
        )

    @cached_property
    def depends(self) -> dict[str, Any]:
        """All that decides the network before training, for stage keys; files are digested on the first call."""
        if self.module is not None:
            return {"module": repr(self.module), "weights": tensors_digest(self.module.state_dict())}
        start = self.checkpoint or self.weights or (fetch_weights(self.architecture.name) if self.pretrained else None)
        content = _weights_digest(Path(start)) if start else None
        adapted = {"adapted": True} if self.weights else {}
        about = {"architecture": asdict(self.architecture), "pretrained": self.pretrained, "weights": content}
        probed = {"linear_probe": True} if self.linear_probe else {}
        return {**about, **adapted, **probed}


def network_of(table: ModelTable, world: World, module: nn.Module | None = None) -> Network:
    """The network that a spec's table describes, for images of `world`; or `module`, the caller's own.

    Raises:
        UserError: a network from outside is no module, or is to be a linear probe.
    """
    if module is not None:
        check_type(module, nn.Module, "model")
    if module is not None and table.linear_probe:
        raise UserError("model.linear_probe = true says nothing of a network given from outside; freeze its weights")
    start = (table.pretrained, table.checkpoint, module, table.weights)
    return Network(architecture_of(table, world), *start, table.linear_probe)


def architecture_of(table: ModelTable, world: World) -> Architecture:
    """The architecture that a spec's table describes; without a name it is a small ViT."""
    size = world.train.size
    small = {"patch_size": max(1, size // 8), "depth": 4, "embed_dim": 96, "num_heads": 3}
    if world.name == "digits":
        small = {"patch_size": max(1, size // 4), "depth": 3, "embed_dim": 64, "num_heads": 4}
    overrides = dict(table.overrides) if table.name else {**small, **table.overrides}
    return Architecture(table.name or "vit_tiny_patch16_224", size, world.train.n_classes, overrides)


def try_out(network: Network, world: World, role: str = "model", *, untrained: bool = True) -> nn.Module:
    """Build a network and classify one image with it, to find mistakes early.

    Args:
        network: the network.
        world: has the image.
        role: the network's table in a spec, for messages.
        untrained: whether it is yet to be trained, and may have a head of zeros.

    Raises:
        UserError: it cannot be built, or is not what `probe.check_network` asks for.
    """
    model = network.build(0).eval()
    check_network(model, first_image(world), world.train.n_classes, role, untrained=untrained)
    return model


def first_image(world: World) -> Images:
    """One image to try a network with, on the CPU."""
    return world.train.images(torch.zeros(1, dtype=torch.int64, device=world.train.device)).cpu()


def tensors_digest(named: Mapping[str, Any]) -> str:
    """The SHA-256 (hex) of named tensors: names, shapes, types and content; values of other types are ignored."""
    whole = sha256()
    for name, tensor in named.items():
        if isinstance(tensor, torch.Tensor):
            whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _weights_digest(path: Path) -> str:
    """The SHA-256 (hex) of a file of weights."""
    content = SpecPath(str(path)).content
    if content is None:
        raise UserError(f"the weights that the network starts from are not at {str(path)!r} any more; put them back")
    return content
