"""Brightness and saturation in the sense of HSV, and matching their means."""

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
    """Scale each image's saturation so that its mean is the reference's; hue and brightness stay.

    One factor an image; saturations are cut off at 1, so the means agree up to what is cut off.
    """
    own = saturation(images)
    factor = _ratio(saturation(reference), own)
    # S' = f S is V - f (V - x) in each channel; a pixel takes no factor that would push its S above 1
    value = brightness(images)
    return value - (value - images) * factor.minimum(1 / own.clamp(min=1e-8))


def match_brightness(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Scale each image so that its mean HSV value is the reference's; hue and saturation stay.

    One factor an image; values are cut off at 1, so the means agree up to what is cut off.
    """
    value = brightness(images)
    factor = _ratio(brightness(reference), value)
    return images * factor.minimum(1 / value.clamp(min=1e-8))


def _ratio(wanted: Float[Tensor, "b 1 h w"], own: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 1 1"]:
    """Ratio of two means an image; 1 where an image has none of the quantity to scale."""
    wanted = wanted.mean((2, 3), keepdim=True)
    own = own.mean((2, 3), keepdim=True)
    return (wanted / own.clamp(min=1e-8)).where(own > 1e-8, wanted.new_ones(()))
