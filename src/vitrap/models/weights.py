"""Weights in safetensors files: read as they are, or brought to a network as timm brings its pretrained weights.

What is adapted is what timm's own loading adapts: the head where the number of classes differs, position embeddings
and whatever else the family's filter of checkpoints resamples or renames. The rest must fit, tensor by tensor.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from vitrap.errors import UserError

PREFIXES = ("module.", "model.", "body.", "_orig_mod.")
"""What wraps a network puts before the names of its tensors: parallel training, a trainer, vitrap, a compilation."""
TAKEN = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
COUNTS = ("num_batches_tracked", "relative_position_index")
"""Ends of names of tensors that are whole numbers by nature; timm makes the second anew."""
SHAPES = re.compile(r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)")
"""How torch says that a tensor's shape does not fit."""
HEADS = ("head", "fc", "classifier")
"""What other people's code calls the layer that gives the logits."""


@dataclass
class Loading:
    """What a loading found: names that the file lacks, names that the network lacks."""

    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    done: bool = False


def read_tensors(path: Path, kind: str = "checkpoint") -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        UserError: the file is missing, no safetensors file, or truncated.
    """
    if not path.is_file():
        raise UserError(f"{kind} {str(path)!r} is not there; give the path of a safetensors file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{kind} {str(path)!r} is no whole safetensors file ({first_line(error)}); pickled checkpoints"
            " are never opened: convert them with safetensors.torch.save_file"
        ) from error


def shared_prefix(names: Iterable[str], own: Iterable[str]) -> str:
    """What stands before all `names` and can be taken off, "" where one of them is among the network's `own`.

    >>> shared_prefix(["module.body.fc.bias", "module.body.fc.weight"], ["fc.weight", "fc.bias"])
    'module.body.'
    """
    left = list(names)
    known = set(own)
    found = ""
    while left and not known.intersection(left):
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in left)), None)
        if prefix is None:
            break
        left, found = [name.removeprefix(prefix) for name in left], found + prefix
    return found


def start_from(path: Path, name: str, plain: nn.Module, build: Callable[..., nn.Module]) -> tuple[nn.Module, str]:
    """A timm network that starts from a file's weights, and what was adapted, in one line.

    Args:
        path: a safetensors file.
        name: timm's name of the network, for what is said.
        plain: the network with fresh weights, which stays as it is.
        build: builds it again, with the arguments of `timm.create_model` that it is handed.

    Raises:
        UserError: the file is missing, damaged, of whole numbers, or does not fit.
    """
    own = plain.state_dict()
    tensors, notes = _clean(read_tensors(path, "model.weights"), own, path)
    # timm compares the file's number of classes with the network's, and drops the file's head where they differ.
    heads = _names_of_heads(plain)
    classes = _classes(tensors, heads)
    wanted = int(getattr(plain, "num_classes", 0))
    head = [f"{layer}.{end}" for layer in heads for end in ("weight", "bias")] if classes != wanted else []
    # Its own loading from here on; no other source of weights is left to it.
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
    """The file's tensors without prefix and in fp32, and what was done to them."""
    if not tensors:
        raise UserError(f"model.weights {str(path)!r} holds no tensors; give a file with a network's weights")
    whole = [key for key, t in tensors.items() if t.dtype not in TAKEN and not key.endswith(COUNTS)]
    if whole:
        kinds = ", ".join(sorted({str(tensors[key].dtype).removeprefix("torch.") for key in whole}))
        raise UserError(
            f"model.weights {str(path)!r} holds tensors of {kinds} ({_some(whole)}), which are no weights to start"
            " from; give a file in fp32, fp16 or bf16"
        )
    prefix = shared_prefix(tensors, own)
    notes = [f"prefix {prefix!r} taken off"] if prefix else []
    kinds = sorted({TAKEN[t.dtype] for t in tensors.values() if t.dtype in TAKEN} - {"fp32"})
    notes += [f"{kind} -> fp32" for kind in kinds]
    return {key.removeprefix(prefix): t.float() if t.dtype in TAKEN else t for key, t in tensors.items()}, notes


def _names_of_heads(body: nn.Module) -> tuple[str, ...]:
    """The names of the layers that give a timm network's logits: a distilled one has two."""
    names = vars(body)["pretrained_cfg"]["classifier"] or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _classes(tensors: Mapping[str, Tensor], heads: tuple[str, ...]) -> int:
    """How many classes the file's own head tells apart, 0 where it has none."""
    names = [f"{head}.weight" for head in (*heads, *HEADS)]
    return next((len(tensors[name]) for name in names if name in tensors and tensors[name].ndim), 0)


@contextmanager
def _watched(kind: type[nn.Module]) -> Iterator[Loading]:
    """Notes what the next loading into a network of that class finds: timm's builder only logs it."""
    loading = Loading()
    watched: list[nn.Module] = []

    def note(module: nn.Module, keys: Any) -> None:
        loading.missing = list(keys.missing_keys)
        loading.unknown = list(keys.unexpected_keys)
        loading.done = True

    with ExitStack() as restore:

        def watch(parent: nn.Module, name: str, child: nn.Module | None) -> None:
            if type(parent) is kind and not any(parent is one for one in watched):
                watched.append(parent)
                restore.callback(parent.register_load_state_dict_post_hook(note).remove)

        restore.callback(register_module_module_registration_hook(watch).remove)
        yield loading


def _misfit(path: Path, name: str, loading: Loading, head: list[str], error: Exception | None) -> UserError:
    """What does not fit: names that one side lacks, shapes, or else what timm says."""
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
    """What timm changed in shape or name, in words."""
    changed = [key for key in own if key in tensors and key not in replaced and own[key].shape != tensors[key].shape]
    notes = []
    for key in changed:
        old, new = (_grid(key, t.shape, body) for t in (tensors[key], own[key]))
        what = {"pos_embed": "position embeddings", "patch_embed.proj.weight": "patch embedding"}.get(key, key)
        notes.append(f"{what} {old} -> {new}")
    renamed = sum(key not in tensors for key in own if key not in replaced)
    notes = notes if len(notes) <= 3 else [*notes[:2], f"{len(notes) - 2} more tensors resampled"]
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
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
