"""A network of the package's own, in a file of its own."""

import torch
from torch import nn

from vitrap.contracts import Images


class Pattern(nn.Module):
    """A picture with weights."""

    def __init__(self, side: int, channels: int = 3) -> None:
        super().__init__()
        self.arguments = {"side": side, "channels": channels}
        self.raw = nn.Parameter(torch.randn(channels, side, side))

    def forward(self, images: Images) -> Images:
        """Images with half of the picture on them."""
        return 0.5 * images + 0.5 * self.raw.sigmoid()
