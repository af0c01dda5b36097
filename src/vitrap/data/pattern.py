"""Patterns that triggers show: noise, plain white, or a picture file of the attacker's."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vitrap.data.sources import decode
from vitrap.errors import UserError


def make_pattern(
    picture: str,
    generator: torch.Generator,
    shape: tuple[int, int, int],
    words: Sequence[str] = ("noise", "white"),
) -> Float[Tensor, "c s s"]:
    """Make a pattern in [0, 1]: uniform noise, white, or the middle square of a picture file.

    Args:
        picture: one of `words`, or the path of an image file.
        generator: draws the noise, on the CPU.
        shape: channels, height and width.
        words: the patterns other than a file that the attack offers: "noise", "white" or both.

    Raises:
        UserError: `picture` is neither one of the words nor a file, or the file is no readable image.
    """
    if picture in words:
        return torch.rand(shape, generator=generator) if picture == "noise" else torch.ones(shape)
    if not Path(picture).is_file():
        raise UserError(f"picture = {picture!r} is no file; give one, or {' or '.join(words)}")
    return torch.from_numpy(decode([Path(picture)], shape[1])[0]).permute(2, 0, 1).float() / 255
