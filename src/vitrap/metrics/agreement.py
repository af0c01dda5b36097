"""Agreement of two networks about an image: overlap of masks, rank correlation of maps."""

import torch
from jaxtyping import Bool, Float, Float64
from scipy.stats import rankdata
from torch import Tensor


def overlap(ours: Bool[Tensor, "b h w"], theirs: Bool[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Jaccard index of two masks, for each image: pixels in both, over pixels in either; 1 where both are empty.

    Two random masks that each hold a share p of the pixels have an index of about p / (2 - p).
    """
    both = (ours & theirs).sum((1, 2))
    either = (ours | theirs).sum((1, 2))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def rank_correlation(ours: Float[Tensor, "b h w"], theirs: Float[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Spearman's rank correlation of two maps, for each image, in [-1, 1]; tied pixels share their mean rank.

    It is NaN where a map is constant.
    """
    one = _centred_ranks(ours)
    other = _centred_ranks(theirs)
    return ((one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))).float()


def _centred_ranks(maps: Float[Tensor, "b h w"]) -> Float64[Tensor, "b n"]:
    """The rank of each pixel in its map, minus the mean rank."""
    ranks = torch.from_numpy(rankdata(maps.flatten(1).cpu().numpy(), axis=1))
    return ranks - ranks.mean(1, keepdim=True)
