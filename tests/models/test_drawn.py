"""Networks whose first weights are drawn from a random stream."""

from functools import partial

import torch
from torch import nn

from vitrap.models.drawn import drawn


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_weights_come_from_the_stream_and_torchs_own_state_stays() -> None:
    build, stream, state = partial(nn.Linear, 3, 2), generator(), torch.get_rng_state()
    first, second = drawn(build, stream), drawn(build, stream)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(drawn(build, generator()).weight, first.weight)
    torch.set_rng_state(state)
    assert not torch.equal(second.weight, first.weight)
    assert not torch.equal(drawn(build, generator(1)).weight, first.weight)
