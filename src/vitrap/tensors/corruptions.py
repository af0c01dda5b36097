"""The common corruptions of ImageNet-C, for batches of images.

Hendrycks, Dietterich: "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019,
https://arxiv.org/abs/1903.12261; code: https://github.com/hendrycks/robustness, and the package imagecorruptions for
images of any size (https://github.com/bethgelab/imagecorruptions). Severities are those of the code.

Each function here draws what is random once, and returns a `Corruption`, which then treats all images alike.

What differs from the code:

    - frost is left out: it overlays photographs
    - glass blur: all pixels take a neighbour's colour at once, not one after the other
    - motion blur goes on where it is longer than the image, by repeating the edge, as ImageMagick does
    - elastic transform follows imagecorruptions, since the first code is made for 224 px
    - JPEG is computed here as libjpeg does, with halved colours; a coefficient midway between two steps may be rounded
      the other way
    - images are rounded to 8 bits only by the caller; the package cuts fractions off
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, cos, pi, radians, sin

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor
from torch.nn import functional

Images = Float[Tensor, "b c h w"]
Side = Float[Tensor, "out side"]
"""A linear change along one side of an image, as a matrix: rows of weights."""
Corruption = Callable[[Images], Images]
"""Images in [0, 1] to as many corrupted ones, which may exceed that range."""


@dataclass(frozen=True)
class Canvas:
    """The images to corrupt, and where what is random comes from.

    Attributes:
        channels, size: of the images, which are square.
        generator: a random stream on the CPU.
        device: where the images are.
    """

    channels: int
    size: int
    generator: Generator
    device: torch.device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator).to(self.device)

    def angle(self, low: float, high: float) -> float:
        """A uniform number between two bounds."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()


def gaussian_noise(canvas: Canvas, scale: float) -> Corruption:
    """Normal noise of standard deviation `scale` on each value."""
    noise = scale * canvas.normal(canvas.channels, canvas.size, canvas.size)
    return lambda images: images + noise


def shot_noise(canvas: Canvas, photons: float) -> Corruption:
    """Poisson noise: white is `photons` photons on average."""
    level = canvas.uniform(canvas.channels, canvas.size, canvas.size)
    most = int(photons + 6 * photons**0.5 + 10)  # no level that 24 bits can tell from 1 is beyond
    return lambda images: poisson_quantile(photons * images, level, most) / photons


def impulse_noise(canvas: Canvas, share: float) -> Corruption:
    """A share of the values becomes 0 or 1, with equal chances."""
    level = canvas.uniform(canvas.channels, canvas.size, canvas.size)
    salt = (level < share / 2).float()
    return lambda images: torch.where(level < share, salt, images)


def defocus_blur(canvas: Canvas, radius: float, alias: float) -> Corruption:
    """The mean over a disk, whose edge is smoothed by a Gaussian of `alias` pixels."""
    kernel = disk(radius, alias).to(canvas.device)
    rows = mirrored(canvas.size, len(kernel) // 2).to(canvas.device)

    def blur(images: Images) -> Images:
        padded = images[:, :, rows][..., rows].flatten(0, 1)[:, None]
        return functional.conv2d(padded, kernel[None, None]).view_as(images)

    return blur


def glass_blur(canvas: Canvas, sigma: float, reach: int, times: int) -> Corruption:
    """Blur, move colours within `reach` pixels as many times, blur again."""
    size = canvas.size
    window = smoothing(size, sigma).to(canvas.device)
    place = torch.arange(size)
    inside = (place > reach) & (place <= size - reach)
    taken = torch.arange(size * size).view(size, size)
    for _ in range(times):
        down, right = torch.randint(-reach, reach, (2, size, size), generator=canvas.generator) * (
            inside[:, None] & inside
        )
        taken = taken[place[:, None] + down, place + right]
    index = taken.flatten().to(canvas.device)

    def blur(images: Images) -> Images:
        blurred = window @ images @ window.mT
        return window @ blurred.flatten(2)[..., index].view_as(images) @ window.mT

    return blur


def motion_blur(canvas: Canvas, radius: int, sigma: float) -> Corruption:
    """The camera moves in a direction up to 45 degrees off the horizontal."""
    angle = canvas.angle(-45, 45)
    return lambda images: smear(images, radius, sigma, angle)


def zoom_blur(canvas: Canvas, largest: float, step: float) -> Corruption:
    """The mean of the image and of its magnifications from 1 to about `largest`."""
    factors = [1 + i * step for i in range(round((largest - 1) / step) + 1)]
    sides = [magnifying(canvas.size, factor).to(canvas.device) for factor in factors]

    def blur(images: Images) -> Images:
        return (images + sum(side @ images @ side.mT for side in sides)) / (len(sides) + 1)

    return blur


def snow(
    canvas: Canvas, flakes: tuple[float, float, float, float], radius: int, sigma: float, keep: float
) -> Corruption:
    """Flakes that fall, over a whitened image; `flakes` are mean, deviation, magnification and threshold of noise."""
    mean, deviation, factor, threshold = flakes
    side = magnifying(canvas.size, factor).to(canvas.device)
    layer = side @ (mean + deviation * canvas.normal(1, 1, canvas.size, canvas.size)) @ side.mT
    layer = layer.where(layer >= threshold, layer.new_zeros(())).clamp(0, 1)
    layer = smear(layer, radius, sigma, canvas.angle(-135, -45))
    layer = layer + layer.rot90(2, (2, 3))

    def fall(images: Images) -> Images:
        white = images.maximum(1.5 * grey(images) + 0.5)
        return keep * images + (1 - keep) * white + layer

    return fall


def fog(canvas: Canvas, amount: float, decay: float) -> Corruption:
    """Clouds of a fractal shape, brighter the greater `amount`, and smoother the greater `decay`."""
    side = 1 << (canvas.size - 1).bit_length()
    clouds = amount * plasma(max(2, side), decay, canvas)[: canvas.size, : canvas.size].to(canvas.device)

    def veil(images: Images) -> Images:
        most = images.amax((1, 2, 3), keepdim=True)
        return (images + clouds) * most / (most + amount)

    return veil


def brightness(canvas: Canvas, amount: float) -> Corruption:
    """HSV value plus `amount`, at most 1; hue and saturation stay."""

    def brighten(images: Images) -> Images:
        value = images.amax(1, keepdim=True)
        wanted = (value + amount).clamp(max=1)
        return torch.where(value > 0, images * (wanted / value.clamp(min=1e-8)), wanted)

    return brighten


def contrast(canvas: Canvas, factor: float) -> Corruption:
    """The difference from each channel's mean, times `factor`."""

    def flatten(images: Images) -> Images:
        return torch.lerp(images.mean((2, 3), keepdim=True), images, factor)

    return flatten


def elastic_transform(canvas: Canvas, alpha: float) -> Corruption:
    """Pixels are read from places that a smooth random field moves them to."""
    size = canvas.size
    window = smoothing(size, 0.01 * size).to(canvas.device)
    moved = alpha * 0.005 * size * (window @ (2 * canvas.uniform(2, size, size) - 1) @ window.mT)
    place = torch.arange(size, device=canvas.device)
    # `grid_sample` takes column, then row, both from -1 to 1 between the outer edges.
    found = torch.stack([place + moved[0], place[:, None] + moved[1]], -1)
    grid = (2 * found + 1) / size - 1

    def bend(images: Images) -> Images:
        many = grid.expand(len(images), -1, -1, -1)
        return functional.grid_sample(images, many, padding_mode="reflection", align_corners=False)

    return bend


def pixelate(canvas: Canvas, factor: float) -> Corruption:
    """Shrink to `factor` of the size by means, and enlarge again by repetition."""
    side = pixelating(canvas.size, max(1, int(canvas.size * factor))).to(canvas.device)
    return lambda images: side @ images @ side.mT


def jpeg_compression(canvas: Canvas, quality: int) -> Corruption:
    """What JPEG of a quality from 1 to 100 makes of the images."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    tables = ((torch.tensor(table).view(8, 8) * scale + 50) / 100 for table in (LUMA, CHROMA))
    luma, chroma = (table.floor().clamp(1, 255).to(canvas.device) for table in tables)
    waves = cosines().to(canvas.device)

    def compress(images: Images) -> Images:
        size = images.shape[-1]
        padded = functional.pad(255 * images, (0, -size % 16, 0, -size % 16), mode="replicate")
        if images.shape[1] != 3:
            return quantise(padded, luma, waves)[..., :size, :size] / 255
        bright = grey(padded)
        blue = (padded[:, 2:] - bright) / 1.772 + 128
        red = (padded[:, :1] - bright) / 1.402 + 128
        halved = functional.avg_pool2d(torch.cat([blue, red], 1), 2)
        bright = quantise(bright.round(), luma, waves)
        colours = functional.interpolate(quantise(halved.round(), chroma, waves), scale_factor=2.0, mode="bilinear")
        blue, red = (colours - 128).split(1, 1)
        green = bright - (0.114 * 1.772 * blue + 0.299 * 1.402 * red) / 0.587
        return torch.cat([bright + 1.402 * red, green, bright + 1.772 * blue], 1)[..., :size, :size] / 255

    return compress


SEVERITIES: dict[Callable[..., Corruption], list[tuple[object, ...]]] = {
    gaussian_noise: [(0.08,), (0.12,), (0.18,), (0.26,), (0.38,)],
    shot_noise: [(60,), (25,), (12,), (5,), (3,)],
    impulse_noise: [(0.03,), (0.06,), (0.09,), (0.17,), (0.27,)],
    defocus_blur: [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    glass_blur: [(0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
    motion_blur: [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
    zoom_blur: [(1.11, 0.01), (1.15, 0.01), (1.2, 0.02), (1.24, 0.02), (1.3, 0.03)],
    snow: [
        ((0.1, 0.3, 3, 0.5), 10, 4, 0.8),
        ((0.2, 0.3, 2, 0.5), 12, 4, 0.7),
        ((0.55, 0.3, 4, 0.9), 12, 8, 0.7),
        ((0.55, 0.3, 4.5, 0.85), 12, 8, 0.65),
        ((0.55, 0.3, 2.5, 0.85), 12, 12, 0.55),
    ],
    fog: [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    brightness: [(0.1,), (0.2,), (0.3,), (0.4,), (0.5,)],
    contrast: [(0.4,), (0.3,), (0.2,), (0.1,), (0.05,)],
    elastic_transform: [(12.5,), (16.25,), (21.25,), (25,), (30,)],
    pixelate: [(0.6,), (0.5,), (0.4,), (0.3,), (0.25,)],
    jpeg_compression: [(25,), (18,), (15,), (10,), (7,)],
}
"""The five severities of each corruption, made for images of 224 px; the code uses them at every size."""


# The parts


def poisson_quantile(mean: Float[Tensor, "*b"], level: Float[Tensor, "*n"], most: int) -> Float[Tensor, "*b"]:
    """The least count, at most `most`, whose cumulative probability is above `level` in a Poisson distribution.

    >>> poisson_quantile(torch.tensor([0.0, 2.0, 2.0]), torch.tensor([0.5, 0.1, 0.5]), 9).tolist()
    [0.0, 0.0, 2.0]
    """
    chance = (-mean).exp()
    below = chance.clone()
    count = torch.zeros_like(mean)
    for number in range(1, most + 1):
        count += level >= below
        chance *= mean / number
        below += chance
    return count


def disk(radius: float, alias: float) -> Float[Tensor, "side side"]:
    """Equal weights within `radius`, smoothed by a Gaussian of standard deviation `alias` over 3 or 5 pixels."""
    reach, width = (8, 1) if radius <= 8 else (int(radius), 2)
    place = torch.arange(-reach, reach + 1)
    inside = (place[:, None].square() + place.square() <= radius**2).float()
    window = (-(torch.arange(-width, width + 1) / alias).square() / 2).softmax(0)
    rows = mirrored(len(place), width)
    padded = (inside / inside.sum())[rows][:, rows]
    return functional.conv2d(padded[None, None], torch.outer(window, window)[None, None])[0, 0]


def mirrored(size: int, margin: int) -> Int64[Tensor, " padded"]:
    """Which pixel stands at each place of a side that is longer by a margin at both ends, mirrored at the outer pixels.

    >>> mirrored(3, 3).tolist()
    [1, 2, 1, 0, 1, 2, 1, 0, 1]
    """
    period = max(1, 2 * size - 2)
    place = torch.arange(-margin, size + margin) % period
    return place.minimum(period - place)


def smoothing(size: int, sigma: float) -> Side:
    """A Gaussian of `sigma` pixels along a side, cut off at 4 sigma; beyond the edge the outer pixel is repeated."""
    reach = int(4 * sigma + 0.5)
    offset = torch.arange(-reach, reach + 1)
    window = (-(offset / sigma).square() / 2).softmax(0)
    place = (torch.arange(size)[:, None] + offset).clamp(0, size - 1)
    return torch.zeros(size, size).scatter_add_(1, place, window.expand(size, -1))


def magnifying(size: int, factor: float) -> Side:
    """Enlarge the middle of a side by a factor, by linear interpolation between its outer pixels, and cut to size."""
    kept = ceil(size / factor)
    enlarged = round(kept * factor)
    row = torch.arange(size) + (enlarged - size) // 2
    place = (size - kept) // 2 + row * (kept - 1) / max(1, enlarged - 1)
    return (1 - (place[:, None] - torch.arange(size)).abs()).clamp(min=0)


def pixelating(size: int, small: int) -> Side:
    """Means of the pixels whose middle is in each of `small` equal parts, each repeated over its part."""
    middle = (2 * torch.arange(size) + 1) * small
    edge = 2 * torch.arange(small)[:, None] * size
    member = ((middle > edge) & (middle <= edge + 2 * size)).float()
    return (member / member.sum(1, keepdim=True))[middle // (2 * size)]


def smear(images: Images, radius: int, sigma: float, angle: float) -> Images:
    """The mean of images that move in a direction, with weights that fall as one half of a Gaussian."""
    steps = range(2 * radius + 1)
    weights = (-(torch.arange(len(steps)) / sigma).square() / 2).softmax(0).tolist()
    down = [-ceil(i * sin(radians(angle)) - 0.5) for i in steps]
    right = [-ceil(i * cos(radians(angle)) - 0.5) for i in steps]
    margin = 2 * radius + 1
    padded = functional.pad(images, (margin, margin, margin, margin), mode="replicate")
    height, width = images.shape[-2:]
    total = torch.zeros_like(images)
    for weight, y, x in zip(weights, down, right, strict=True):
        total.add_(padded[..., margin - y : margin - y + height, margin - x : margin - x + width], alpha=weight)
    return total


def plasma(side: int, decay: float, canvas: Canvas) -> Float[Tensor, "side side"]:
    """A fractal of the diamond-square algorithm, from 0 to 1; `side` is a power of 2, and the map wraps around.

    New points are the mean of their four neighbours and noise, which each finer step divides by `decay`.
    """
    heights = torch.zeros(side, side, dtype=torch.float64)
    step = side
    noise = 1.0

    def between(neighbours: Tensor) -> Tensor:
        drawn = torch.rand(neighbours.shape, generator=canvas.generator, dtype=torch.float64)
        return neighbours / 4 + noise * (2 * drawn - 1)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        across = corners + corners.roll(-1, 0)
        heights[half::step, half::step] = between(across + across.roll(-1, 1))
        middles = heights[half::step, half::step]
        heights[::step, half::step] = between(middles + middles.roll(1, 0) + corners + corners.roll(-1, 1))
        heights[half::step, ::step] = between(middles + middles.roll(1, 1) + corners + corners.roll(-1, 0))
        step = half
        noise /= decay
    heights -= heights.min()
    return (heights / heights.max()).float()


def grey(images: Images) -> Float[Tensor, "b 1 h w"]:
    """The brightness of each pixel as in television and JPEG; the mean of the channels where they are not three."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def cosines() -> Float[Tensor, "8 8"]:
    """The orthonormal discrete cosine transform (DCT-II) of 8 values."""
    place = torch.arange(8)
    waves = (pi / 8 * (place + 0.5) * place[:, None]).cos() / 2
    waves[0] /= 2**0.5
    return waves


def quantise(planes: Images, table: Float[Tensor, "8 8"], waves: Float[Tensor, "8 8"]) -> Images:
    """Round the cosine coefficients of blocks of 8 x 8 values from 0 to 255 to multiples of those in the table."""
    blocks = planes.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    coefficients = (waves @ (blocks - 128) @ waves.mT / table).round() * table
    restored = (waves.mT @ coefficients @ waves + 128).round().clamp(0, 255)
    return restored.transpose(3, 4).flatten(4, 5).flatten(2, 3)


LUMA = [
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29,
    51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120,
    101, 72, 92, 95, 98, 112, 100, 103, 99,
]  # fmt: skip
CHROMA = [
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99,
    *[99] * 36,
]  # fmt: skip
"""The steps that JPEG rounds coefficients to at quality 50, of brightness and of colours (ITU-T T.81, annex K)."""
