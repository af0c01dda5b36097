"""Opening and keeping a ViT: any plain vision transformer of timm's, with its normalisation inside.

A model here maps images in [0, 1] to logits. Weights travel as safetensors with timm's own names, and the file's
metadata says how to build the model again.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils.logging import get_verbosity, set_verbosity, set_verbosity_error
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitrap.contracts import Images
from vitrap.errors import UserError, unknown

PLAIN_ATTENTION = ("vision_transformer", "deit", "beit", "eva")
"""timm's modules whose models attend plainly over all tokens: vit, deit, deit3, beit, eva and their kin."""


@dataclass(frozen=True)
class Architecture:
    """All it takes to build a model but its weights.

    Attributes:
        name: timm's name.
        size: image size in pixels, a side.
        n_classes: number of classes.
        overrides: timm's arguments that differ from those of the name: patch_size, depth, embed_dim, ...
    """

    name: str
    size: int
    n_classes: int
    overrides: Mapping[str, Any] = field(default_factory=dict)


class ViT(nn.Module):
    """A timm model over images in [0, 1]: normalisation, then `body`.

    Attributes:
        body: the timm model.
        architecture: what it was built from.
    """

    def __init__(
        self, body: nn.Module, architecture: Architecture, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.body = body
        self.architecture = architecture
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Images) -> Float[Tensor, "b k"]:
        """Logits of images in [0, 1]."""
        return self.body((images - self.mean) / self.std)


def open_vit(architecture: Architecture, *, pretrained: bool = False, checkpoint: str | None = None) -> ViT:
    """Build a model, with fresh weights (from torch's random state), pretrained ones, or a checkpoint's.

    Raises:
        UserError: the name is unknown or of a family without plain token attention; an override or a size does
            not fit; the hub cannot be reached; the checkpoint is no safetensors file or does not fit.
    """
    _refuse_family(architecture.name)
    _refuse_overrides(architecture)
    _refuse_grid(architecture)
    weights = {"pretrained_cfg_overlay": {"file": str(fetch_weights(architecture.name))}} if pretrained else {}
    try:
        body = timm.create_model(
            architecture.name,
            pretrained=pretrained,
            num_classes=architecture.n_classes,
            img_size=architecture.size,
            **weights,
            **{k: v for k, v in architecture.overrides.items() if k != "img_size"},
        )
    except (TypeError, AssertionError, ArithmeticError, LookupError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model {architecture.name!r} does not take {_shown(architecture)}: {_first_line(error)}"
        ) from error
    facts: Any = body.pretrained_cfg
    model = ViT(body, architecture, facts["mean"], facts["std"])
    if checkpoint is not None:
        load_weights(body, Path(checkpoint))
    return model.eval()


def blank_vit(architecture: Architecture) -> ViT:
    """A model whose weights are about to be filled in: torch's random state stays as it was."""
    with torch.random.fork_rng():
        return open_vit(architecture)


def fetch_weights(name: str) -> Path:
    """The pretrained weights of a timm name as a safetensors file from the hub, fetched once and checked.

    timm itself would fall back on pickled files; this asks for nothing but safetensors. The hub names a file by its
    SHA-256, which is compared with the content.

    Raises:
        UserError: timm names no such weights, the hub cannot be reached, or the content is not what it says.
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
    named = path.resolve().name
    with path.open("rb") as content:
        if len(named) == 64 and hashlib.file_digest(content, "sha256").hexdigest() != named:
            raise UserError(
                f"pretrained weights of {name!r} in {str(path)!r} are damaged; delete the file and try again"
            )
    return path


def load_weights(body: nn.Module, path: Path) -> None:
    """Fill a timm model from a safetensors file; names and shapes must fit exactly.

    Raises:
        UserError: the file is missing, no safetensors file, truncated, or lists what does not fit.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} is not there; give the path of a safetensors file")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {str(path)!r} is no whole safetensors file ({_first_line(error)}); pickled checkpoints"
            " are never opened: convert them with safetensors.torch.save_file"
        ) from error
    own = body.state_dict()
    faults = {
        "missing": [k for k in own if k not in weights],
        "unknown": [k for k in weights if k not in own],
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
    body.load_state_dict(weights)


def save_vit(model: ViT, path: Path, **facts: str) -> None:
    """Write the weights as safetensors; `facts` join the metadata (say there what the model carries)."""
    weights = {k: v.detach().cpu().contiguous() for k, v in model.body.state_dict().items()}
    save_file(weights, path, {"architecture": json.dumps(asdict(model.architecture)), **facts})


def read_vit(path: Path) -> ViT:
    """The model in a file that `save_vit` wrote.

    Raises:
        UserError: the file is missing, damaged, or was not written by `save_vit`.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is no whole safetensors file ({_first_line(error)})") from error
    if "architecture" not in facts:
        raise UserError(
            f"{str(path)!r} does not say how to build its model; name the network in [model] and give"
            " the file as its checkpoint"
        )
    model = blank_vit(Architecture(**json.loads(facts["architecture"])))
    load_weights(model.body, path)
    return model


def _refuse_family(name: str) -> None:
    if not timm.is_model(name):
        raise unknown("model", name, timm.list_models())
    family = timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
    if family not in PLAIN_ATTENTION:
        raise UserError(
            f"model {name!r} ({family}) has no plain token attention, so vitrap cannot use it as surrogate"
            " or victim yet; take one of the families vit, deit, deit3, beit or eva"
        )


def _unreachable(name: str, error: Exception) -> str:
    return (
        f"pretrained weights of {name!r} cannot be fetched from the hub ({type(error).__name__}); connect to the"
        " network once (they then stay in the hub's cache, which HF_HOME moves), or leave out model.pretrained"
    )


def _refuse_overrides(architecture: Architecture) -> None:
    """Only arguments of the network itself: nothing that opens files, and nothing that the data decide."""
    family = timm.model_entrypoint(architecture.name).__module__.rsplit(".", 1)[-1]
    arguments = inspect.signature({"beit": Beit, "eva": Eva}.get(family, VisionTransformer).__init__).parameters
    known = set(arguments) - {"self", "num_classes", "in_chans", "device", "dtype"}
    for key, value in architecture.overrides.items():
        if key not in known:
            raise unknown("key", f"model.{key}", [f"model.{k}" for k in known])
        if key == "img_size" and value != architecture.size:
            raise UserError(f"model.img_size = {value!r} is not the images' size {architecture.size}; set data.size")


def _refuse_grid(architecture: Architecture) -> None:
    patch = architecture.overrides.get("patch_size")
    if patch is None:  # every plain ViT of timm's says its patch in its name, or takes 16
        found = [p for p in architecture.name.split("_") if p.startswith("patch")]
        patch = int(found[0].removeprefix("patch")) if found and found[0][5:].isdigit() else 16
    if not isinstance(patch, int) or isinstance(patch, bool) or patch < 1 or architecture.size % patch:
        raise UserError(
            f"patch_size = {patch!r} does not divide the image size {architecture.size}; choose a divisor"
            " as model.patch_size, or another data.size"
        )


def _shown(architecture: Architecture) -> str:
    return ", ".join(f"{k} = {v!r}" for k, v in architecture.overrides.items()) or f"size {architecture.size}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
