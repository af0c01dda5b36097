"""Opening, saving and reading a network: any image classifier of timm's, with its normalisation inside.

A model maps images in [0, 1] to logits. Its weights are saved as safetensors under timm's own names, and the metadata
of the file says how to build the model again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils.logging import get_verbosity, set_verbosity, set_verbosity_error
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor, nn

from vitrap.contracts import Images
from vitrap.errors import UserError, shown
from vitrap.formats import adapter
from vitrap.images import misshapen
from vitrap.models.arguments import overridable, refuse_body, refuse_overrides
from vitrap.models.weights import first_line, read_tensors, shared_prefix, start_from
from vitrap.probe import check_weights
from vitrap.tensor_file import read_tensor_file, write_tensor_file

LARGEST = 4096
"""Greatest side of an image in pixels."""


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build a model, without its weights.

    Attributes:
        name: timm's name.
        size: side of the images, in pixels.
        n_classes: number of classes.
        overrides: arguments of the network that differ from those of the name: patch_size, depth, embed_dim, ...
    """

    name: str
    size: int
    n_classes: int
    overrides: Mapping[str, Any] = field(default_factory=dict)


class Classifier(nn.Module):
    """A timm model over images in [0, 1]: normalisation, then `body`.

    Attributes:
        body: the timm model.
        architecture: what it was built from.
        adapted: how the weights that training starts from were adapted, in one line; "" where there are none.
    """

    def __init__(
        self, body: nn.Module, architecture: Architecture, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.body = body
        self.architecture = architecture
        self.adapted = ""
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Images) -> Float[Tensor, "b k"]:
        """Logits of images in [0, 1].

        Raises:
            UserError: the network has failed on images of another shape than its own.
        """
        try:
            return self.body((images - self.mean) / self.std)
        except (AssertionError, RuntimeError, ValueError) as error:
            own = (len(self.mean), self.architecture.size, self.architecture.size)
            if images.shape[1:] == own or isinstance(error, torch.OutOfMemoryError):
                raise
            raise misshapen(images, "b x {} x {} x {}".format(*own)) from error


def open_model(
    architecture: Architecture, *, pretrained: bool = False, checkpoint: str | None = None, weights: str | None = None
) -> Classifier:
    """Build a model, with random weights (from torch's random state) or with given ones.

    Args:
        architecture: what to build.
        pretrained: whether to take the hub's weights, adapted by timm.
        checkpoint: a safetensors file whose weights fit exactly.
        weights: a safetensors file whose weights are adapted as timm adapts pretrained weights.

    Raises:
        UserError: the name is unknown or no classifier; an override or a size does not fit; the hub cannot be
            reached; the file is no safetensors file or does not fit; its weights have a fault.
    """
    name, size = architecture.name, architecture.size
    refuse_overrides(name, size, dict(architecture.overrides))
    settings = {"num_classes": architecture.n_classes, **architecture.overrides}
    if "img_size" in overridable(name):
        settings["img_size"] = size
    build = partial(timm.create_model, name, **settings)
    adapted = ""
    if weights is not None:
        # A random copy shows which names and shapes are wanted; building it must not move torch's random state.
        with torch.random.fork_rng():
            plain = _built(architecture, build)
        body, adapted = start_from(Path(weights), name, plain, build)
    elif pretrained:
        hub = {"file": str(fetch_weights(name))}
        body = _built(architecture, partial(build, pretrained=True, pretrained_cfg_overlay=hub))
        check_weights(body.state_dict(), f"pretrained weights of {name!r}")
    else:
        body = _built(architecture, build)
    facts: Any = body.pretrained_cfg
    model = Classifier(body, architecture, facts["mean"], facts["std"])
    model.adapted = adapted
    if checkpoint is not None:
        load_weights(body, Path(checkpoint))
    return model.eval()


def _built(architecture: Architecture, build: Callable[[], nn.Module]) -> nn.Module:
    """The network that `build` returns; any error of timm's becomes a UserError."""
    try:
        body = build()
    except (TypeError, AssertionError, ArithmeticError, LookupError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model {architecture.name!r} does not take {_shown(architecture)}: {first_line(error)}"
        ) from error
    refuse_body(architecture.name, architecture.size, body)
    return body


def blank_model(architecture: Architecture) -> Classifier:
    """A model with random weights, to be filled in; torch's random state stays as it was."""
    with torch.random.fork_rng():
        return open_model(architecture)


def fetch_weights(name: str) -> Path:
    """Fetch the pretrained weights of a timm model from the hub, once, and check them.

    Only a safetensors file is requested, while timm itself would fall back on pickled files. The hub names a file by
    its SHA-256, which is compared with the content.

    Returns:
        The path of the safetensors file.

    Raises:
        UserError: timm names no pretrained weights, the hub cannot be reached, or the content does not match its hash.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise UserError(f"model {name!r} has no pretrained weights on the hub; give model.checkpoint instead")
    level = get_verbosity()
    set_verbosity_error()  # one clear line, not a warning for each try
    try:
        path = Path(hf_hub_download(config.hf_hub_id, "model.safetensors", etag_timeout=5))
    except LocalEntryNotFoundError as error:
        raise UserError(_unreachable(name, error)) from error
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise UserError(f"the hub has no safetensors weights of {name!r}; choose another model") from error
    except Exception as error:  # whatever else the hub's client and the network below it raise
        raise UserError(_unreachable(name, error)) from error
    finally:
        set_verbosity(level)
    expected = path.resolve().name
    with path.open("rb") as content:
        if len(expected) == 64 and hashlib.file_digest(content, "sha256").hexdigest() != expected:
            raise UserError(
                f"pretrained weights of {name!r} in {str(path)!r} are damaged; delete the file and try again"
            )
    return path


def load_weights(body: nn.Module, path: Path) -> None:
    """Fill a timm model from a safetensors file; names and shapes must fit exactly.

    Raises:
        UserError: the file is missing, truncated or no safetensors file; the message lists what does not fit, or names
            a weight that is NaN or infinite.
    """
    weights = read_tensors(path)
    own = body.state_dict()
    prefix = shared_prefix(weights, own)
    if prefix and {key.removeprefix(prefix): t.shape for key, t in weights.items()} == {
        key: t.shape for key, t in own.items()
    }:
        raise UserError(
            f"checkpoint {str(path)!r} has {prefix!r} before all names and fits but for that;"
            " give it as model.weights, which takes it off"
        )
    faults = {
        "missing": [k for k in own if k not in weights],
        "unknown": [k for k in weights if k not in own],
        "of whole numbers": [
            k for k in own if own[k].is_floating_point() and k in weights and not weights[k].is_floating_point()
        ],
        "of another shape": [
            f"{k} {tuple(weights[k].shape)} for {tuple(own[k].shape)}"
            for k in own
            if k in weights and weights[k].shape != own[k].shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for kind, names in faults.items()
            if names
        )
        raise UserError(
            f"checkpoint {str(path)!r} does not fit the model: {listed};"
            " [model] must describe the network that the weights come from"
        )
    weights = {k: weights[k].to(own[k].dtype) for k in own}  # in another precision a number may become infinite
    check_weights(weights, f"checkpoint {str(path)!r}")
    body.load_state_dict(weights)


def save_model(model: Classifier, path: Path, **facts: str) -> None:
    """Write the weights as safetensors, whole or not at all; `facts` go into its metadata: what the model carries."""
    architecture = json.dumps(asdict(model.architecture))
    write_tensor_file(path, model.body.state_dict(), {"architecture": architecture, **facts})


def read_model(path: Path) -> Classifier:
    """Read a model from a file that `save_model` wrote.

    Raises:
        UserError: the file is missing, damaged, or was not written by `save_model`.
    """
    try:
        file = read_tensor_file(path)
        architecture = parse_architecture(file.table("architecture"), file.tensors)
    except OSError as error:
        raise UserError(f"safetensors file {str(path)!r} cannot be read ({error.strerror})") from error
    except UserError as error:
        raise UserError(
            f"{str(path)!r} {error}, so it does not say how to build its model; name the network in [model] and give"
            " the file as its checkpoint"
        ) from error
    try:
        model = blank_model(architecture)
    except UserError as error:
        raise UserError(f"{str(path)!r} names a network that cannot be built: {error}") from error
    load_weights(model.body, path)
    return model


def parse_architecture(table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Architecture:
    """The architecture that a file's metadata describe.

    Args:
        table: what the metadata say.
        tensors: the file's tensors.

    Raises:
        UserError: it is none, or larger than any network of these tensors. The message has no subject.
    """
    try:
        architecture = adapter(Architecture).validate_json(json.dumps(table), strict=True)
    except ValidationError as errors:
        error = errors.errors()[0]
        where = ".".join(map(str, error["loc"]))
        raise UserError(f"has an architecture that is damaged ({shown(where)}: {error['msg']})") from errors
    check_sizes({"n_classes": architecture.n_classes, **architecture.overrides}, largest(tensors))
    if not 1 <= architecture.size <= LARGEST:
        raise UserError(f"has an architecture for images of {shown(architecture.size)} px")
    return architecture


def largest(tensors: Mapping[str, Tensor]) -> int:
    """The greatest whole number that an argument of a network with these tensors can be, and 64 at least.

    It is the longest side of a tensor (of width and classes), or the number of tensors (of depth).
    """
    return max([64, len(tensors), *(side for tensor in tensors.values() for side in tensor.shape)])


def check_sizes(arguments: Any, most: int) -> None:
    """Refuse arguments of a network in which a whole number is greater than `most`.

    A network that is built from a file must be no larger than the file.

    Raises:
        UserError: naming the number. The message has no subject.
    """
    waiting = [arguments]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, int) and abs(value) > most:
            raise UserError(f"has too few weights for a network with {shown(value)} of anything")


def _unreachable(name: str, error: Exception) -> str:
    """The message where weights cannot be fetched."""
    return (
        f"pretrained weights of {name!r} cannot be fetched from the hub ({type(error).__name__}); connect to the"
        " network once (they then stay in the hub's cache, which HF_HOME moves), or leave out model.pretrained"
    )


def _shown(architecture: Architecture) -> str:
    """The overrides of an architecture in words, or its image size where it has none."""
    return ", ".join(f"{k} = {v!r}" for k, v in architecture.overrides.items()) or f"size {architecture.size}"
