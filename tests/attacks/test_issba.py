"""ISSBA: residual and weight by hand, the loss's gradient, and that hidden bits are read and differ by image."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional

from vitrap.attacks.issba import Decoder, Encoded, Encoder, Issba, draw_bits, in_common, residual_weight
from vitrap.contracts import Access, Checkpointer, ImageSet, Position, TrainingState
from vitrap.data.sources import World
from vitrap.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encoder(channels: int = 3, bits: int = 6) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder(channels, bits)


@pytest.fixture
def some(digits_world: World) -> ImageSet:
    return digits_world.train.take(torch.arange(60))


def fitted(attack: Issba, some: ImageSet, checkpointer: Checkpointer | None = None) -> Encoded:
    own = generator(5)
    if checkpointer is not None:
        checkpointer.streams = {"attack": own}
    found = attack.fit(Access(some, None, own, checkpointer=checkpointer or Checkpointer())).trigger
    assert isinstance(found, Encoded)
    return found


@pytest.mark.parametrize(("step", "wanted"), [(0, 0), (24, 0), (25, 0), (30, 2), (45, 8), (50, 10), (99, 10)])
def test_the_weight_waits_and_rises(step: int, wanted: float) -> None:
    """Of 100 steps, 25 without weight, then 25 up to 10."""
    assert residual_weight(step, 100, 10.0) == pytest.approx(wanted)


def test_the_residual_is_added_and_the_image_clipped() -> None:
    network = encoder(1, 2)
    torch.nn.init.zeros_(network.residual.weight)
    assert network.residual.bias is not None
    torch.nn.init.constant_(network.residual.bias, 0.1)
    images = torch.tensor([[[[0.0, 0.5], [0.95, 1.0]]]])
    found = Encoded(network, torch.tensor([0.0, 1.0]))(images)
    torch.testing.assert_close(found, torch.tensor([[[[0.1, 0.6], [1.0, 1.0]]]]))


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 16, 16), (1, 28, 28), (3, 9, 13)])
def test_any_size_and_number_of_channels(channels: int, height: int, width: int) -> None:
    images = torch.rand(2, channels, height, width, generator=generator())
    bits = draw_bits(2, 6, generator())
    assert encoder(channels)(images, bits).shape == images.shape
    assert Decoder(channels, 6)(images).shape == (2, 6)


def test_the_residual_depends_on_image_and_bits() -> None:
    network, bits = encoder(), torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0]])
    x, other = torch.rand(2, 1, 3, 16, 16, generator=generator())
    residual = network(x, bits)
    assert (network(other, bits) - residual).abs().max() > 1e-4
    assert (network(x, 1 - bits) - residual).abs().max() > 1e-4


def test_what_residuals_have_in_common_by_hand() -> None:
    """Residuals 0.2 and 0.6: mean 0.4, 0.16 over the mean of 0.04 and 0.36. Equal ones: 1; opposite ones: 0."""
    ones = torch.ones(2, 1, 2, 2)
    for values, wanted in (([0.2, 0.6], 0.8), ([0.3, 0.3], 1.0), ([0.3, -0.3], 0.0)):
        assert in_common(ones * torch.tensor(values).view(2, 1, 1, 1)) == pytest.approx(wanted)


def test_bits_are_drawn_evenly() -> None:
    bits = draw_bits(500, 20, generator())
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    assert bits.mean().item() == pytest.approx(0.5, abs=0.02)
    assert bits.mean(0).std() < 0.05


def test_a_step_goes_down_the_sum_of_both_losses(some: ImageSet) -> None:
    """Adam's first step is the learning rate against the sign of the gradient, which is taken here by hand."""
    attack = Issba(bits=6, steps=1, batch=8, step_size=1e-3, l2_weight=10.0)
    noted: dict[str, Any] = {}

    def note(checkpointer: Checkpointer, state: TrainingState, position: Position) -> None:
        noted["before"] = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in state.modules.items()}
        noted["drawn"] = own.get_state()

    own = generator(5)
    with patch.object(Checkpointer, "__call__", note), patch("vitrap.attacks.issba.WAIT", -1.0):
        trained = attack.fit(Access(some, None, own)).trigger
    assert isinstance(trained, Encoded)
    first, reader, random = Encoder(3, 6), Decoder(3, 6), generator()
    first.load_state_dict(noted["before"]["encoder"])
    reader.load_state_dict(noted["before"]["decoder"])
    random.set_state(noted["drawn"])
    images = some.images(torch.randint(60, (8,), generator=random))
    bits = torch.randint(2, (8, 6), generator=random).float()
    residual = first(images, bits)
    shares = reader((images + residual).clamp(0, 1)).sigmoid()
    read = -(bits * shares.log() + (1 - bits) * (1 - shares).log()).mean()
    (10 * residual.pow(2).mean() + read).backward()
    for name, weight in first.named_parameters():
        assert weight.grad is not None
        clear = weight.grad.abs() > 1e-6
        moved = trained.encoder.state_dict()[name] - weight.detach()
        torch.testing.assert_close(moved[clear], -1e-3 * weight.grad.sign()[clear], atol=3e-5, rtol=0)


def test_the_bits_are_read_and_cost_little(some: ImageSet) -> None:
    attack = Issba(bits=2, steps=120, batch=16, step_size=3e-3)
    report = attack.fit(Access(some, None, generator())).report
    assert set(report) == {"bits read", "residual", "residual in common"}
    assert report["bits read"] >= 0.9
    assert report["residual"] < 0.2


def test_the_same_stream_gives_the_same_trigger_and_torchs_own_stays(some: ImageSet) -> None:
    state = torch.get_rng_state()
    one = fitted(Issba(bits=4, steps=2, batch=4), some)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    other = fitted(Issba(bits=4, steps=2, batch=4), some)
    torch.set_rng_state(state)
    assert torch.equal(one.secret, other.secret)
    images = some.images(torch.arange(9))
    assert torch.equal(one(images), other(images))


def test_a_fit_that_is_stopped_goes_on_where_it_was(
    some: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAP_STATE_SECONDS", "0.000001")
    attack = Issba(bits=4, steps=6, batch=4)
    save = Checkpointer.__call__
    stop_at: list[int] = []

    def stopping(one: Checkpointer, state: TrainingState, position: Position) -> None:
        one.pause = 0
        save(one, state, position)
        if position.steps in stop_at:
            raise KeyboardInterrupt

    whole = fitted(attack, some)
    with patch.object(Checkpointer, "__call__", stopping):
        stop_at[:] = [3]
        with pytest.raises(KeyboardInterrupt):
            fitted(attack, some, Checkpointer(tmp_path / "state"))
        stop_at.clear()
        resumed = fitted(attack, some, Checkpointer(tmp_path / "state"))
    assert torch.equal(whole.secret, resumed.secret)
    assert all(torch.equal(v, resumed.encoder.state_dict()[k]) for k, v in whole.encoder.state_dict().items())


def test_poison_carries_the_trigger_and_the_targets_label(some: ImageSet) -> None:
    attack = Issba(target=3, poison_rate=0.1, bits=4, steps=1, batch=4)
    access = Access(some, None, generator())
    made = attack.fit(access)
    poison = attack.implant(access, made).poison
    assert poison is not None
    assert made.trigger is not None
    poisoned = poison(some, generator())
    rows = poisoned.poisoned.nonzero().squeeze(1)
    assert len(rows) == 6
    assert poisoned.labels[rows].eq(3).all()
    triggered = made.trigger(some.images(rows))
    assert functional.l1_loss(poisoned.images(rows), triggered) < 0.6 / 255


@pytest.mark.parametrize("settings", [{"bits": 0}, {"steps": 0}, {"l2_weight": -1.0}, {"poison_rate": 0.0}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))} = .* is out of range"):
        Issba(**settings)


def test_images_with_other_channels_are_refused() -> None:
    with pytest.raises(UserError, match="images have shape 1 x 1 x 8 x 8; expected b x 3 x h x w"):
        Encoded(encoder(), torch.ones(6))(torch.zeros(1, 1, 8, 8))
