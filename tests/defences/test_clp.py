"""CLP: bounds against numpy's SVD, the public code's rule on a small CNN, and what is left alone on ViTs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitrap.contracts import Defence, ImageSet, Suspect
from vitrap.data.sources import World
from vitrap.defences.clp import Clp, NormalisedLayer, channel_bounds, normalised_layers, outliers
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier

Build = Callable[..., Classifier]


@pytest.fixture
def clean(digits_world: World) -> ImageSet:
    return digits_world.clean.take(torch.arange(8))


def suspect(model: nn.Module, clean: ImageSet) -> Suspect:
    return Suspect(model, clean, 10, torch.Generator().manual_seed(0))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cnn() -> Any:
    """Two convolutions, the first with BatchNorm behind it, and a head; the bounds of its channels differ."""
    first = nn.Conv2d(3, 20, 3)
    norm = nn.BatchNorm2d(20)
    second = nn.Conv2d(20, 15, 3)
    head = nn.Linear(15, 10)
    model = nn.Sequential(first, norm, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    for seed, weight in enumerate(model.parameters()):
        weight.data = drawn(*weight.shape, seed=seed)
    norm.weight.data = 0.1 * drawn(20, seed=8) - 1
    assert norm.running_var is not None
    norm.running_var.copy_(0.5 + torch.rand(20, generator=torch.Generator().manual_seed(9)))
    first.weight.data[4] *= 30
    second.weight.data[7] *= 30
    return model.eval().requires_grad_(False)


# ---- step 1


def test_the_bound_of_a_convolution_is_its_spectral_norm_times_batch_norm() -> None:
    conv, norm, *_ = cnn()
    found = channel_bounds(NormalisedLayer("", conv, None, norm))
    wanted = [
        np.linalg.svd(conv.weight[k].numpy().reshape(3, 9))[1].max()
        * abs(norm.weight[k].item() / np.sqrt(norm.running_var[k].item() + 1e-5))
        for k in range(20)
    ]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5)


def test_the_bound_of_a_linear_layer_is_its_row_times_layer_norm() -> None:
    layer, norm = nn.Linear(6, 4), nn.LayerNorm(6)
    norm.weight.data = drawn(6)
    wanted = np.linalg.norm(layer.weight.detach().numpy() * norm.weight.detach().numpy(), axis=1)
    np.testing.assert_allclose(channel_bounds(NormalisedLayer("", layer, norm, None)).numpy(), wanted, rtol=1e-5)


def test_layer_norm_s_spread_cancels_out() -> None:
    bounds = drawn(40).abs()
    bounds[3] = 20.0
    assert outliers(bounds, 2.5).nonzero().tolist() == [[3]]
    for spread in (0.01, 100.0):
        assert torch.equal(outliers(bounds / spread, 2.5), outliers(bounds, 2.5))


# ---- step 2


def test_outliers_by_hand() -> None:
    bounds = torch.tensor([1.0, 2.0, 3.0, 10.0])  # mean 4, standard deviation sqrt(50 / 3) = 4.08
    assert outliers(bounds, 1.46).tolist() == [False, False, False, True]
    assert not outliers(bounds, 1.48).any()
    assert outliers(bounds, 0.0).tolist() == [False, False, False, True]
    assert not outliers(torch.tensor([3.0]), 0.0).any()


def test_on_a_cnn_it_prunes_what_the_public_code_does(clean: ImageSet) -> None:
    """There: gamma and beta of outlying channels become 0, and all else stays; without BatchNorm, weights and bias."""
    model = cnn()
    found: Any = Clp().apply(suspect(model, clean))
    assert found.layer == "0, 3"
    assert found.report == {"pruned channels": 2, "channels": 35, "layers": 2}
    wanted: Any = cnn()
    wanted[1].weight[4] = 0
    wanted[1].bias[4] = 0
    wanted[3].weight[7] = 0
    wanted[3].bias[7] = 0
    for name, weight in wanted.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], weight), name


# ---- ViTs


def layers_of(model: nn.Module, clean: ImageSet) -> dict[str, tuple[str | None, str | None]]:
    """Each layer with channels, and the names of the normalisation before and after it."""
    names = {module: name for name, module in model.named_modules()}
    found = normalised_layers(suspect(model, clean), model)
    return {
        layer.name: (
            None if layer.before is None else names[layer.before],
            None if layer.after is None else names[layer.after],
        )
        for layer in found
    }


def test_a_vit_s_layers_and_the_layer_norms_that_feed_them(tiny_vit: Build, clean: ImageSet) -> None:
    wanted: dict[str, tuple[str | None, str | None]] = {"body.patch_embed.proj": (None, None)}
    for block in ("body.blocks.0", "body.blocks.1"):
        wanted[f"{block}.attn.proj"] = (None, None)
        wanted[f"{block}.mlp.fc1"] = (f"{block}.norm2", None)
        wanted[f"{block}.mlp.fc2"] = (None, None)
    assert layers_of(tiny_vit(), clean) == wanted
    assert layers_of(tiny_vit("deit_tiny_distilled_patch16_224"), clean) == wanted


def test_other_families(tiny_vit: Build, clean: ImageSet) -> None:
    for name in ("beit_base_patch16_224", "eva02_tiny_patch14_224"):
        found = layers_of(tiny_vit(name), clean)
        assert found["body.blocks.1.mlp.fc1"] == ("body.blocks.1.norm2", None)
        assert not [layer for layer in found if "qkv" in layer or "head" in layer]
    found = layers_of(cnn(), clean)
    assert found == {"0": (None, "1"), "3": (None, None)}


def test_a_sensitive_neuron_is_switched_off_and_the_rest_stays(tiny_vit: Build, clean: ImageSet) -> None:
    model = tiny_vit()
    body: Any = model.body
    with torch.no_grad():  # the bounds of each layer are 0.9 and 1.1 in turn, so that nothing else is an outlier
        for block in body.blocks:
            block.norm2.weight.fill_(1.0)
            for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                layer.weight /= layer.weight.norm(dim=1, keepdim=True)
                layer.weight[::2] *= 0.9
                layer.weight[1::2] *= 1.1
        body.patch_embed.proj.weight[::2] = 0.9
        body.patch_embed.proj.weight[1::2] = 1.1
        body.blocks[0].mlp.fc1.weight[5] *= 9
    found: Any = Clp().apply(suspect(model, clean))
    assert found.layer == "body.blocks.0.mlp.fc1"
    after = dict(found.model.named_parameters())
    for name, before in model.named_parameters():
        wanted = before.detach().clone()
        if "blocks.0.mlp.fc1" in name:
            wanted[5] = 0
        assert torch.equal(after[name], wanted), name


def test_u_counts(tiny_vit: Build, clean: ImageSet) -> None:
    counts = [Clp(u=u).apply(suspect(tiny_vit(), clean)).report["pruned channels"] for u in (0.0, 1.0, 2.0, 8.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 0


def test_a_network_of_a_head_alone_is_refused(clean: ImageSet) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16**2, 10)).eval()
    with pytest.raises(UserError, match="clp prunes channels .* has none beside its head"):
        Clp().apply(suspect(model, clean))


def test_it_is_a_defence() -> None:
    assert isinstance(Clp(), Defence)
    assert (Clp.kind, Clp().u) == ("repair", 3.0)
