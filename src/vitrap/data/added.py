"""A trigger that adds one pattern to every image; for attacks to build on."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from vitrap.contracts import Images
from vitrap.images import misshapen


@dataclass(frozen=True)
class Added:
    """The trigger: x' = x + pattern, clipped.

    Attributes:
        pattern: what is added to every image.
    """

    pattern: Float[Tensor, "c h w"]

    def __call__(self, images: Images) -> Images:
        """Images with the pattern.

        Raises:
            UserError: the images are of another shape than the pattern.
        """
        if images.shape[1:] != self.pattern.shape:
            raise misshapen(images, "b x " + " x ".join(map(str, self.pattern.shape)))
        return (images + self.pattern.to(images.device)).clamp(0, 1)
