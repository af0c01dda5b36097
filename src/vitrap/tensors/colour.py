"""Brightness and saturation as HSV defines them, and scaling an image until its mean matches another image's."""

from jaxtyping import Float
from torch import Tensor


def brightness(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """HSV value: the greatest channel."""
    return images.amax(1, keepdim=True)


def saturation(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """HSV saturation: (greatest - least channel) / greatest, 0 where a pixel is black."""
    value = brightness(images)
    return (value - images.amin(1, keepdim=True)) / value.clamp(min=1e-8)


def match_saturation(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Scale the saturation of each image so that its mean is the reference's; hue and brightness stay.

    There is one factor per image. Saturations are clipped at 1, so the means agree up to what is clipped.
    """
    own = saturation(images)
    factor = _ratio(saturation(reference), own)
    # S' = f S means x' = V - f (V - x) in each channel; f is lowered where it would push a pixel's S above 1.
    value = brightness(images)
    return value - (value - images) * factor.minimum(1 / own.clamp(min=1e-8))


def match_brightness(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Scale each image so that its mean HSV value is the reference's; hue and saturation stay.

    There is one factor per image. Values are clipped at 1, so the means agree up to what is clipped.
    """
    value = brightness(images)
    factor = _ratio(brightness(reference), value)
    return images * factor.minimum(1 / value.clamp(min=1e-8))


def _ratio(wanted: Float[Tensor, "b 1 h w"], own: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 1 1"]:
    """The ratio of the two means, for each image; 1 where an image has nothing to scale."""
    wanted = wanted.mean((2, 3), keepdim=True)
    own = own.mean((2, 3), keepdim=True)
    return (wanted / own.clamp(min=1e-8)).where(own > 1e-8, wanted.new_ones(()))
