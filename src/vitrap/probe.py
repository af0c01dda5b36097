"""Whether a network can be used: its weights, and what it answers to a few images.

Every network that comes from outside is looked at here before any work: one from a file, one that is handed in from
Python, one that a defender suspects.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrap.errors import UserError

PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
"""The types that weights may have in a file, with their names; in a network they are fp32."""


def weight_fault(weights: Mapping[str, Any]) -> str:
    """What is wrong with a network's weights, in words that name a tensor; "" where nothing is.

    All numbers must be finite, but for -inf in a tensor whose name ends in "mask", as attention masks have it. A bias,
    a layer scale or a new head may be zero throughout; weight matrices (tensors of two dimensions or more) may not be
    so all together, for then the network computes nothing.

    Args:
        weights: as in `state_dict()`; values that are no tensors of `PRECISIONS` are passed over.

    >>> weight_fault({"fc.weight": torch.ones(1, 2), "fc.bias": torch.tensor([float("nan")])})
    'fc.bias holds NaN'
    >>> weight_fault({"fc.weight": torch.zeros(1, 2), "fc.bias": torch.ones(1)})
    'fc.weight holds zeros alone, as do all weight matrices'
    """
    tensors = {k: t for k, t in weights.items() if isinstance(t, Tensor) and t.dtype in PRECISIONS}
    matrices = [name for name, tensor in tensors.items() if tensor.ndim > 1]
    sound = {k: (t.isfinite() | (t.isneginf() & k.endswith("mask"))).all() for k, t in tensors.items()}
    # One look at the device for all tensors: each look waits for it.
    if sound and not torch.stack([*sound.values()]).all():
        name = next(name for name, each in sound.items() if not each)
        return f"{name} holds {'NaN' if tensors[name].isnan().any() else 'infinite numbers'}"
    if matrices and not torch.stack([tensors[name].any() for name in matrices]).any():
        return f"{matrices[0]} holds zeros alone, as do all weight matrices"
    return ""


def check_weights(weights: Mapping[str, Any], owner: str) -> None:
    """Refuse weights with a fault.

    Args:
        weights: as for `weight_fault`.
        owner: whose they are, for the message.

    Raises:
        UserError: see `weight_fault`.
    """
    if fault := weight_fault(weights):
        raise UserError(f"{owner} cannot be used: {fault}; give sound weights")


def check_type(value: Any, kind: type[Any], owner: str) -> None:
    """Refuse a value that is no instance of `kind`; `owner` is what the message calls it.

    >>> check_type(lambda images: images, nn.Module, "suspect.model")
    Traceback (most recent call last):
        ...
    vitrap.errors.UserError: suspect.model is of type function; give one of type Module
    """
    if not isinstance(value, kind):
        raise UserError(f"{owner} is of type {type(value).__name__}; give one of type {kind.__name__}")


@torch.no_grad()
def check_network(
    model: nn.Module, images: Float[Tensor, "b c h w"], n_classes: int, owner: str, *, untrained: bool = False
) -> None:
    """Classify a few images, and refuse a network that does not return a finite logit for each class.

    Args:
        model: a function of images in [0, 1], in evaluation mode.
        images: one image or more; their negatives are classified, too.
        n_classes: number of classes.
        owner: what the message calls the network.
        untrained: whether it is yet to be trained. It may then have a head of zeros; if not, a network that answers
            alike to all images and has weight matrices of zeros is refused.

    Raises:
        UserError: the model is no module, its weights are not of fp32 or have a fault, it fails on the images, or it
            answers with something else.
    """
    check_type(model, nn.Module, owner)
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype != torch.float32:
            kind = PRECISIONS.get(weight.dtype, str(weight.dtype))
            raise UserError(f"{owner} has weights of {kind} ({name}), and images are fp32; call its float() first")
    try:
        logits = model(torch.cat([images, 1 - images]))
    except Exception as error:  # a network from outside may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        shape = " x ".join(map(str, images.shape[1:]))
        raise UserError(f"{owner} fails on images of {shape}: {reason}; take another network or size") from error
    check_weights(model.state_dict(), owner)
    if fault := _answer_fault(logits, 2 * len(images), n_classes):
        raise UserError(f"{owner} {fault}")
    dead = [k for k, t in model.state_dict().items() if isinstance(t, Tensor) and t.ndim > 1 and not t.any()]
    if dead and not untrained and (logits == logits[0]).all():
        raise UserError(f"{owner} answers alike to all images, with zeros alone in {', '.join(dead[:4])}; train it")


def _answer_fault(logits: Any, n: int, n_classes: int) -> str:
    """What is wrong with a network's answer to `n` images, and the remedy; "" where nothing is."""
    if not isinstance(logits, Tensor):
        return f"answers with a {type(logits).__name__}, not a tensor; wrap it in a module that returns its logits"
    if not logits.is_floating_point():
        return f"answers with {str(logits.dtype).removeprefix('torch.')}; have it return its logits"
    if logits.shape != (n, n_classes):
        shape = tuple(logits.shape)
        return f"answers to {n} images with shape {shape}, wanted ({n}, {n_classes}): one logit for each class"
    if not logits.isfinite().all():
        return "answers with NaN or infinite logits, though its weights are finite; see what it computes of images"
    shares = logits.float()
    if ((shares > 0) & (shares < 1)).all() and (shares.sum(1) - 1).abs().max() < 1e-3:
        return "answers with probabilities, which sum to 1; take off its softmax, so that it returns logits"
    return ""
