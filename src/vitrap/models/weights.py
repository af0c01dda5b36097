"""Weights in safetensors files: reading them, and starting a network from them as timm starts from pretrained weights.

Only what timm's own loading adapts is adapted: the head where the number of classes differs, position embeddings, and
whatever else the family's checkpoint filter resamples or renames. The rest must fit, tensor by tensor.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from vitrap.errors import UserError
from vitrap.probe import PRECISIONS, check_weights
from vitrap.tensor_file import read_tensor_file

PREFIXES = ("module.", "model.", "body.", "_orig_mod.")
"""Prefixes that wrappers put before the names of a network's tensors: DataParallel, trainers, vitrap, torch.compile."""
COUNTS = ("num_batches_tracked", "relative_position_index")
"""Ends of names of tensors that hold whole numbers by nature; timm recomputes the second."""
SHAPES = re.compile(r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)")
"""Torch's message where a tensor's shape does not fit."""
HEADS = ("head", "fc", "classifier")
"""Common names of the layer that gives the logits, in other people's code."""


@dataclass
class Loading:
    """What the loading of a file found.

    Attributes:
        missing: names that the file lacks.
        unknown: names that the network lacks.
        done: whether anything was loaded.
    """

    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    done: bool = False


def read_tensors(path: Path, kind: str = "checkpoint") -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        UserError: the file is missing, no safetensors file, or truncated.
    """
    try:
        return dict(read_tensor_file(path).tensors)
    except OSError as error:
        there = not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        why = f"cannot be read ({error.strerror})" if there else "is not there"
        raise UserError(f"{kind} {str(path)!r} {why}; give the path of a safetensors file") from error
    except UserError as error:
        raise UserError(
            f"{kind} {str(path)!r} {error}; pickled checkpoints are never opened: convert them with"
            " safetensors.torch.save_file"
        ) from error


def shared_prefix(names: Iterable[str], own: Iterable[str]) -> str:
    """The prefix that all `names` share and that can be removed; "" where one of them is already one of `own`.

    >>> shared_prefix(["module.body.fc.bias", "module.body.fc.weight"], ["fc.weight", "fc.bias"])
    'module.body.'
    """
    rest = list(names)
    known = set(own)
    shared = ""
    while rest and not known.intersection(rest):
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in rest)), None)
        if prefix is None:
            break
        rest = [name.removeprefix(prefix) for name in rest]
        shared += prefix
    return shared


def start_from(path: Path, name: str, plain: nn.Module, build: Callable[..., nn.Module]) -> tuple[nn.Module, str]:
    """A timm network that starts from the weights in a file, and a line about what was adapted.

    Args:
        path: a safetensors file.
        name: timm's name of the network, for messages.
        plain: the network with random weights; it stays as it is.
        build: builds the network again, given further arguments of `timm.create_model`.

    Raises:
        UserError: the file is missing or damaged, holds whole numbers or weights with a fault, or does not fit.
    """
    own = plain.state_dict()
    tensors, notes = _clean(read_tensors(path, "model.weights"), own, path)
    check_weights(tensors, f"model.weights {str(path)!r}")
    # timm compares the file's number of classes with the network's, and drops the file's head where they differ.
    heads = _names_of_heads(plain)
    classes = _classes(tensors, heads)
    wanted = int(getattr(plain, "num_classes", 0))
    head = [f"{layer}.{end}" for layer in heads for end in ("weight", "bias")] if classes != wanted else []
    # timm loads the tensors itself, as if they were its pretrained weights; all its other sources are switched off.
    source = {"state_dict": tensors, "file": None, "url": None, "hf_hub_id": None, "custom_load": False}
    with _watched(type(plain)) as loading:
        try:
            body = build(pretrained=True, pretrained_cfg_overlay={**source, "num_classes": classes, "label_offset": 0})
        except (RuntimeError, LookupError, AttributeError, ValueError, TypeError, AssertionError) as error:
            raise _misfit(path, name, loading, head, error) from error
    vars(body)["pretrained_cfg"].pop("state_dict", None)  # it would keep the file's tensors in memory
    if set(loading.missing) - set(head) or loading.unknown or not loading.done:
        raise _misfit(path, name, loading, head, None)
    if head:
        notes.insert(
            0, f"head replaced ({classes} -> {wanted} classes)" if classes else "head fresh: the file has none"
        )
    return body, "; ".join([*notes, *_resampled(tensors, own, plain, head)]) or "taken as they are"


def _clean(tensors: dict[str, Tensor], own: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors without prefix and in fp32, and notes about both."""
    if not tensors:
        raise UserError(f"model.weights {str(path)!r} holds no tensors; give a file with a network's weights")
    whole = [key for key, t in tensors.items() if t.dtype not in PRECISIONS and not key.endswith(COUNTS)]
    if whole:
        kinds = ", ".join(sorted({str(tensors[key].dtype).removeprefix("torch.") for key in whole}))
        raise UserError(
            f"model.weights {str(path)!r} holds tensors of {kinds} ({_some(whole)}), which are no weights to start"
            " from; give a file in fp32, fp16 or bf16"
        )
    prefix = shared_prefix(tensors, own)
    notes = [f"prefix {prefix!r} taken off"] if prefix else []
    kinds = sorted({PRECISIONS[t.dtype] for t in tensors.values() if t.dtype in PRECISIONS} - {"fp32"})
    notes += [f"{kind} -> fp32" for kind in kinds]
    return {key.removeprefix(prefix): t.float() if t.dtype in PRECISIONS else t for key, t in tensors.items()}, notes


def _names_of_heads(body: nn.Module) -> tuple[str, ...]:
    """The names of the layers that give a timm network's logits: a distilled one has two."""
    names = vars(body)["pretrained_cfg"]["classifier"] or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _classes(tensors: Mapping[str, Tensor], heads: tuple[str, ...]) -> int:
    """The number of classes of the file's own head, 0 where it has none."""
    names = [f"{head}.weight" for head in (*heads, *HEADS)]
    return next((len(tensors[name]) for name in names if name in tensors and tensors[name].ndim), 0)


@contextmanager
def _watched(kind: type[nn.Module]) -> Iterator[Loading]:
    """Record what the next loading into a network of class `kind` finds, which timm's builder only logs."""
    loading = Loading()
    watched: list[nn.Module] = []

    def note(module: nn.Module, keys: Any) -> None:
        loading.missing = list(keys.missing_keys)
        loading.unknown = list(keys.unexpected_keys)
        loading.done = True

    with ExitStack() as restore:
        # The network does not exist yet: it is caught when its first part is registered.
        def watch(parent: nn.Module, name: str, child: nn.Module | None) -> None:
            if type(parent) is kind and not any(parent is one for one in watched):
                watched.append(parent)
                restore.callback(parent.register_load_state_dict_post_hook(note).remove)

        restore.callback(register_module_module_registration_hook(watch).remove)
        yield loading


def _misfit(path: Path, name: str, loading: Loading, head: list[str], error: Exception | None) -> UserError:
    """The error that lists what does not fit: names that one side lacks, shapes, or else timm's own message."""
    faults = {
        "missing": [key for key in loading.missing if key not in head],
        "unknown": loading.unknown,
        "of another shape": [f"{key} ({old}) for ({new})" for key, old, new in SHAPES.findall(str(error))],
    }
    listed = [f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in faults.items() if keys]
    reason = "; ".join(listed) or (first_line(error) if error else "timm loaded nothing of it")
    return UserError(
        f"model.weights {str(path)!r} does not fit model {name!r}: {reason};"
        " [model] must describe the network that the weights come from, but for classes and image size"
    )


def _resampled(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], body: nn.Module, replaced: list[str]
) -> list[str]:
    """Notes about the tensors that timm resampled or renamed."""
    changed = [key for key in own if key in tensors and key not in replaced and own[key].shape != tensors[key].shape]
    notes = []
    for key in changed:
        old = _grid(key, tensors[key].shape, body)
        new = _grid(key, own[key].shape, body)
        what = {"pos_embed": "position embeddings", "patch_embed.proj.weight": "patch embedding"}.get(key, key)
        notes.append(f"{what} {old} -> {new}")
    if len(notes) > 3:
        notes = [*notes[:2], f"{len(notes) - 2} more tensors resampled"]
    renamed = sum(key not in tensors for key in own if key not in replaced)
    return [*notes, f"{renamed} tensors under other names"] if renamed else notes


def _grid(key: str, shape: torch.Size, body: nn.Module) -> str:
    """A tensor's shape in words: position embeddings by their grid, a patch by its sides."""
    if key == "patch_embed.proj.weight" and len(shape) == 4:
        return f"{shape[2]}x{shape[3]} px"
    if key == "pos_embed" and len(shape) == 3:
        prefix = 0 if getattr(body, "no_embed_class", False) else int(getattr(body, "num_prefix_tokens", 0))
        for tokens in (shape[1] - prefix, shape[1]):
            if (side := math.isqrt(max(tokens, 0))) ** 2 == tokens:
                return f"{side}x{side}"
    return "x".join(map(str, shape))


def _some(keys: list[str]) -> str:
    """The first few of some names."""
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
