"""How well two networks agree about an image: overlap of masks, rank correlation of maps."""

import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor


def overlap(ours: Bool[Tensor, "b h w"], theirs: Bool[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Pixels in both masks over pixels in either, of each image (Jaccard's index); 1 where both masks are empty.

    Two masks at random that each hold a share p of the pixels come to about p / (2 - p).
    """
    both = (ours & theirs).sum((1, 2))
    either = (ours | theirs).sum((1, 2))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def rank_correlation(ours: Float[Tensor, "b h w"], theirs: Float[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Spearman's rank correlation of two maps, -1 to 1, of each image; ties have their mean rank.

    NaN where a map is the same everywhere.
    """
    ranks = (torch.from_numpy(rankdata(maps.flatten(1).cpu().numpy(), axis=1)) for maps in (ours, theirs))
    one, other = (rank - rank.mean(1, keepdim=True) for rank in ranks)
    return ((one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))).float()
