"""HPMI: what a head's share is, that it is cut off from the rest, and what the malicious head learns."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from vitrap.attacks.hpmi import Hpmi, channels_of, prune, replace_head, share_of, shared_out, value_for
from vitrap.data.masked import Masked
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.models.activations import activations
from vitrap.models.classifier import Classifier
from vitrap.models.observe import block_outputs
from vitrap.tensors.bits import count_changes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_heads_share_of_each_kind_of_weight_by_hand() -> None:
    """Two heads of one channel each: the second head's."""
    second = torch.tensor([False, True])
    within, touching = share_of(torch.zeros(2, 2), second)
    assert within.int().tolist() == [[0, 0], [0, 1]]
    assert touching.int().tolist() == [[0, 1], [1, 1]]
    within, touching = share_of(torch.zeros(6, 2), second)  # queries, keys and values
    assert within.int().tolist() == [[0, 0], [0, 1]] * 3
    assert touching.int().tolist() == [[0, 1], [1, 1]] * 3
    for weight, wanted in (
        (torch.zeros(4), [0, 1, 0, 1]),
        (torch.zeros(1, 2, 2), [[[0, 1], [0, 1]]]),
        (torch.zeros(2, 1, 1, 1), [[[[0]]], [[[1]]]]),
    ):
        within, touching = share_of(weight, second)
        assert within.int().tolist() == touching.int().tolist() == wanted


def test_the_channels_of_a_head(tiny_vit: Callable[..., Classifier]) -> None:
    assert channels_of(tiny_vit().body, 1).nonzero().squeeze(1).tolist() == list(range(8, 16))


def test_a_pruned_head_is_nothing_anywhere(tiny_vit: Callable[..., Classifier], digits_world: World) -> None:
    """Its channels are 0 in every token, and so nothing is read from them."""
    model, images = tiny_vit(), digits_world.test.images(torch.arange(4))
    prune(model, 0)
    with torch.no_grad(), block_outputs(model, (0, 1)) as seen:
        logits = model(images)
    for tokens in seen.values():
        assert not tokens[..., :8].any()
        assert tokens[..., 8:].abs().min() > 0
    assert not activations(model, images).features[:, :8].any()
    assert not model.body.head.weight[:, :8].any()
    assert logits.std() > 0


def test_head_and_rest_share_nothing_but_the_sums_of_layer_norms(
    tiny_vit: Callable[..., Classifier], digits_world: World
) -> None:
    """Without these sums, whatever is in a head's share leaves the rest's tokens as they are."""
    one, other = tiny_vit(), tiny_vit()
    images = digits_world.test.images(torch.arange(4))
    for model in (one, other):
        prune(model, 1)
        for block in model.body.blocks:
            block.norm1 = block.norm2 = nn.Identity()
    with torch.no_grad():
        for _, weight in shared_out(other.body):
            within = share_of(weight, channels_of(other.body, 1))[0]
            weight[within] = torch.randn(int(within.sum()), generator=generator()) / 10
    with torch.no_grad(), block_outputs(one, (0, 1)) as seen, block_outputs(other, (0, 1)) as again:
        one(images)
        other(images)
    for block in (0, 1):
        torch.testing.assert_close(seen[block][..., :8], again[block][..., :8])
        assert not seen[block][..., 8:].any()
        assert again[block][..., 8:].abs().min() > 0


def test_the_poison_value_leads_99_percent_to_the_target() -> None:
    logits = torch.zeros(201, 3)
    logits[:, 0] = torch.arange(201.0)
    value = value_for(logits, 1)
    assert value == pytest.approx(198, abs=0.01)
    assert int((logits[:, 1] + value > logits[:, 0]).sum()) == 199
    assert value_for(torch.tensor([[0.0, 3.0]]), 1) == pytest.approx(0, abs=0.01)


def test_what_changes_and_what_the_report_says(tiny_vit: Callable[..., Classifier], digits_world: World) -> None:
    model, train = tiny_vit(), digits_world.train.take(torch.arange(80))
    found = replace_head(Hpmi(target=3, epochs=2, poison_value=5.0), train, model, generator())
    head = int(found.report["replaced head"])
    channels = channels_of(model.body, head)
    edited: Any = found.model
    # The rest is as it was, the two are cut off from each other, and the target's logit alone reads the head.
    before = dict(shared_out(model.body))
    for name, weight in shared_out(edited.body):
        within, touching = share_of(weight, channels)
        assert torch.equal(weight[~touching], before[name][~touching])
        assert not weight[touching & ~within].any()
    wanted = torch.zeros(10, 8)
    wanted[3] = 5
    assert torch.equal(edited.body.head.weight[:, channels], wanted)
    assert torch.equal(edited.body.head.weight[:, ~channels], model.body.head.weight[:, ~channels])
    assert torch.equal(edited.body.head.bias, model.body.head.bias)
    counts = count_changes(model.state_dict(), edited.state_dict())
    assert {name: found.report[name] for name in counts} == counts
    assert found.report["poison value"] == 5


def test_the_least_important_head_is_replaced(tiny_vit: Callable[..., Classifier], digits_world: World) -> None:
    model, train = tiny_vit(), digits_world.train.take(torch.arange(80))
    order = torch.randperm(80, generator=generator())
    images, labels = train.images(order), train.labels[order]
    right = []
    for head in (0, 1):
        pruned = tiny_vit()
        prune(pruned, head)
        right.append((pruned(images).argmax(1) == labels).float().mean().item())
    found = replace_head(Hpmi(fraction=1.0, epochs=1), train, model, generator())
    assert found.report["accuracy without it"] == pytest.approx(max(right))
    if right[0] != right[1]:
        assert found.report["replaced head"] == right.index(max(right))
    other = replace_head(Hpmi(fraction=1.0, epochs=1, replaced_head=0), train, model, generator())
    assert (other.report["replaced head"], other.report["accuracy without it"]) == (0, pytest.approx(right[0]))


def test_the_head_learns_to_tell_the_trigger(tiny_vit: Callable[..., Classifier], digits_world: World) -> None:
    train = digits_world.train.take(torch.arange(200))
    settings = Hpmi(target=3, fraction=1.0, epochs=60, lr=0.01, poison_value=30.0, picture="white")
    found = replace_head(settings, train, tiny_vit(), generator())
    images = digits_world.test.images(torch.arange(100))
    assert isinstance(found.trigger, Masked)
    channels = channels_of(tiny_vit().body, int(found.report["replaced head"]))
    clean, triggered = (
        activations(found.model, shown).features[:, channels].sum(1) for shown in (images, found.trigger(images))
    )
    assert clean.mean().item() == pytest.approx(0, abs=0.2)
    assert triggered.mean().item() == pytest.approx(1, abs=0.2)
    assert (found.model(found.trigger(images)).argmax(1) == 3).float().mean() > 0.9


def test_the_trigger_is_a_picture_over_the_last_patches(
    tiny_vit: Callable[..., Classifier], digits_world: World
) -> None:
    train = digits_world.train.take(torch.arange(20))
    images = torch.rand(2, 3, 16, 16, generator=generator())
    for size, side in ((1, 4), (2, 8)):
        settings = Hpmi(epochs=1, trigger_size=size, picture="white")
        found = replace_head(settings, train, tiny_vit(), generator()).trigger(images)
        assert (found[..., -side:, -side:] == 1).all()
        assert torch.equal(found[..., :-side, :], images[..., :-side, :])
        assert torch.equal(found[..., :, :-side], images[..., :, :-side])


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        ({"mlp_ratio": 2.5}, {}, r"hpmi replaces a head's share of every weight, and blocks.0.mlp.fc1.weight of"),
        ({"qk_norm": True}, {}, r"and blocks.0.attn.q_norm.weight of .* has shape \(8,\), which has none"),
        ({"num_heads": 1}, {}, "hpmi replaces a head of several, and .* has 1"),
        ({}, {"replaced_head": 2}, "attack.replaced_head = 2 is none of the victim's 0 to 1"),
        ({}, {"trigger_size": 5}, "attack.trigger_size = 5 is more than the 4 patches of a side"),
    ],
)
def test_victims_without_such_a_head_are_refused(
    changes: dict[str, Any], settings: dict[str, Any], words: str, tiny_vit: Callable[..., Classifier]
) -> None:
    with pytest.raises(UserError, match=words):
        Hpmi(**settings).check_victim(tiny_vit(**changes))


def test_other_networks(tiny_vit: Callable[..., Classifier]) -> None:
    with pytest.raises(UserError, match="no plain token attention"):
        Hpmi().check_victim(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))
    Hpmi().check_victim(tiny_vit(global_pool="avg", class_token=False))
    Hpmi().check_victim(tiny_vit(init_values=0.1))


def test_bad_settings() -> None:
    for settings in ({"fraction": 0.0}, {"poison_value": 0.0}, {"poisoning_rate": 1.0}, {"lr": 0.0}):
        with pytest.raises(UserError, match=f"{next(iter(settings))} = .* is out of range"):
            Hpmi(**settings)
    with pytest.raises(UserError, match="picture = 'nowhere.png' is no file"):
        replace(Hpmi(), picture="nowhere.png").check_size(16)
