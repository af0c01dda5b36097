"""Looking at attention: what is seen is the attention, where tokens stand, and nothing of the model stays changed."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vitrap.errors import UserError
from vitrap.models.classifier import Architecture, Classifier, open_model
from vitrap.models.observe import eager_attention, observe, token_layout, transformer

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit, registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "vit, average, no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "vit, average, class token": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "vit, average with prefix": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    "vit, average, registers": (
        "vit_tiny_patch16_224",
        {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
    ),
    "vit, attention pool": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "map"}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beitv2": ("beitv2_base_patch16_224", {}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
}
LAYOUTS = {  # tokens before the image's, and the rows read: the class token's or the image's sixteen
    "vit": (1, (0,)),
    "vit, registers": (4, (0,)),
    "vit, average, no class token": (0, tuple(range(16))),
    "vit, average, class token": (1, tuple(range(1, 17))),
    "vit, average with prefix": (1, tuple(range(17))),
    "vit, average, registers": (2, tuple(range(2, 18))),
    "vit, attention pool": (0, tuple(range(16))),
    "deit, distilled": (2, (0, 1)),
    "deit3": (1, (0,)),
    "beit": (1, tuple(range(1, 17))),
    "beitv2": (1, tuple(range(1, 17))),
    "eva": (1, tuple(range(1, 17))),
    "eva02": (1, tuple(range(1, 17))),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
Build = Callable[..., Classifier]


def opened(tiny_vit: Build, family: str) -> Classifier:
    name, overrides = FAMILIES[family]
    return tiny_vit(name, n_classes=5, **overrides)


def drawn(seed: int = 0, n: int = 2, size: int = 16) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def state(model: nn.Module) -> dict[str, Any]:
    """All that observing could leave behind."""
    return {
        "fused": [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "requires_grad": [w.requires_grad for w in model.parameters()],
        "grad": [w.grad is None for w in model.parameters()],
        "training": [m.training for m in model.modules()],
        "weights": [w.sum().item() for w in model.parameters()],
    }


@each_family
@torch.no_grad()
def test_what_is_seen_is_the_softmax_of_scaled_products(
    tiny_vit: Build, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed from what the fused path hands to torch: queries, keys and additive bias of each block."""
    handed = []
    fused = nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        handed.append((q, k, attn_mask))
        return fused(q, k, v, attn_mask=attn_mask, **rest)

    model, images = opened(tiny_vit, family), drawn()
    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "scaled_dot_product_attention", spy)
        model(images)
    with observe(model, (0, 1, -1)) as seen:
        model(images)
    assert set(seen) == {0, 1, -1}
    prefix, _ = LAYOUTS[family]
    for number, (q, k, bias) in enumerate(handed[:2]):
        maps = seen[number]
        assert maps.shape == (2, 2, prefix + 16, prefix + 16)
        scores = q @ k.mT / q.shape[-1] ** 0.5 + (0 if bias is None else bias)
        torch.testing.assert_close(maps, scores.softmax(-1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, prefix + 16))
        assert maps.std() > 0.01, "flat attention shows nothing"
    assert torch.equal(seen[-1], seen[1])


@torch.no_grad()
def test_the_last_attention_of_a_vit_by_hand(tiny_vit: Build) -> None:
    model, images, entered = tiny_vit(), drawn(), []
    attention = model.body.blocks[-1].attn
    hook = attention.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with observe(model) as seen:
        model(images)
    hook.remove()
    weight, bias = attention.qkv.weight, attention.qkv.bias
    for head in range(2):
        q, k = (entered[0] @ weight[16 * part + 8 * head :][:8].T + bias[16 * part + 8 * head :][:8] for part in (0, 1))
        torch.testing.assert_close(seen[-1][:, head], (q @ k.mT / 8**0.5).softmax(-1), atol=1e-5, rtol=1e-4)


@each_family
def test_the_head_reads_exactly_the_rows_that_the_layout_names(tiny_vit: Build, family: str) -> None:
    """By the gradient at the last block's output, and by overwriting one token of it at a time."""
    model, layout = opened(tiny_vit, family), token_layout(opened(tiny_vit, family))
    assert (layout.prefix, layout.grid, layout.head_tokens) == (LAYOUTS[family][0], (4, 4), LAYOUTS[family][1])
    kept: list[Tensor] = []
    with _after_last_block(model, lambda tokens: kept.append(tokens.detach().requires_grad_()) or kept[-1]):
        logits = model(drawn())
    slopes = torch.autograd.grad((logits * torch.arange(1.0, 6)).sum(), kept[0])[0].abs().amax((0, 2))
    assert tuple(slopes.nonzero().squeeze(1).tolist()) == layout.head_tokens
    noise = torch.randn(kept[0].shape, generator=torch.Generator().manual_seed(1))
    changing = []
    for token in range(kept[0].shape[1]):

        def overwrite(tokens: Tensor, token: int = token) -> Tensor:
            return torch.where((torch.arange(tokens.shape[1]) == token)[:, None], noise, tokens)

        with torch.no_grad(), _after_last_block(model, overwrite):
            if (model(drawn()) - logits).abs().max() > 1e-4:
                changing.append(token)
    assert tuple(changing) == layout.head_tokens


def _after_last_block(model: Classifier, change: Callable[[Tensor], Tensor]) -> Any:
    """As a context, what leaves the last block is put through `change`."""
    return model.body.blocks[-1].register_forward_hook(lambda module, args, out: change(out))


@pytest.mark.parametrize("family", ["vit, registers", "deit, distilled", "beit", "eva02"])
@torch.no_grad()
def test_image_tokens_stand_behind_the_prefix_row_by_row(tiny_vit: Build, family: str) -> None:
    """A change within one patch enters the first block at that patch's token alone."""
    model, entered = opened(tiny_vit, family), []
    layout = token_layout(model)
    model.body.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    images = drawn(n=1)
    model(images)
    for row, column in [(0, 0), (0, 3), (2, 1), (3, 3)]:
        changed = images.clone()
        changed[..., 4 * row + 1, 4 * column + 2] += 0.5
        model(changed)
        moved = (entered[-1] != entered[0]).any(-1).nonzero()[:, 1].tolist()
        assert moved == [layout.prefix + 4 * row + column]


@each_family
@pytest.mark.parametrize("as_leaf", [False, True])
def test_observing_changes_no_output_and_leaves_no_trace(tiny_vit: Build, family: str, as_leaf: bool) -> None:
    model, images = opened(tiny_vit, family), drawn()
    next(model.parameters()).requires_grad_(False)
    before, wanted = state(model), model(images)
    assert any(before["fused"]), "fused attention is off from the start: nothing to restore"
    with observe(model, (0, -1), as_leaf=as_leaf):
        torch.testing.assert_close(model(images), wanted, atol=1e-5, rtol=1e-4)
        assert state(model) != before
    assert state(model) == before
    assert torch.equal(model(images), wanted)


@pytest.mark.parametrize("as_leaf", [False, True])
@pytest.mark.parametrize("blocks", [(-1,), (0, 1), (1, -1)])
def test_everything_is_restored_after_an_exception(tiny_vit: Build, as_leaf: bool, blocks: tuple[int, ...]) -> None:
    model = tiny_vit()
    before = state(model)
    with pytest.raises(KeyError, match="within"), observe(model, blocks, as_leaf=as_leaf):
        raise KeyError("within")
    assert state(model) == before
    with pytest.raises(IndexError), observe(model, (0, 7), as_leaf=as_leaf):
        pass
    assert state(model) == before


def test_only_the_chosen_blocks_leave_the_fused_path(tiny_vit: Build) -> None:
    model = tiny_vit(depth=3)
    fused = [block.attn for block in model.body.blocks]
    with observe(model, (1,)) as seen:
        assert [a.fused_attn for a in fused] == [True, False, True]
        model(drawn())
    assert list(seen) == [1]


def test_each_pass_leaves_its_own_attention(tiny_vit: Build) -> None:
    model = tiny_vit()
    with observe(model) as seen:
        model(drawn(0))
        first = seen[-1]
        model(drawn(1))
        assert not torch.equal(seen[-1], first)
    with observe(model) as alone:
        model(drawn(1))
    assert torch.equal(alone[-1], seen[-1])


@each_family
def test_a_leaf_blocks_the_way_to_weights_and_pixels(tiny_vit: Build, family: str) -> None:
    model, images = opened(tiny_vit, family), drawn().requires_grad_()
    with observe(model, (-1,), as_leaf=True) as seen:
        logits = model(images)
        assert seen[-1].is_leaf
        assert seen[-1].requires_grad
        logits.square().sum().backward()
    assert seen[-1].grad is not None
    assert seen[-1].grad.abs().sum() > 0
    assert all(w.grad is None for w in model.parameters())


def test_the_gradient_at_a_leaf_is_the_gradient_within_the_whole_graph(tiny_vit: Build) -> None:
    model = tiny_vit()
    slopes = []
    for as_leaf in (True, False):
        with observe(model, (-1,), as_leaf=as_leaf) as seen:
            loss = model(drawn()).logsumexp(1).sum()
            slopes.append(torch.autograd.grad(loss, seen[-1])[0])
    assert slopes[0].abs().max() > 1e-4
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-6, rtol=1e-4)


def test_without_a_leaf_the_graph_reaches_pixels_and_weights(tiny_vit: Build) -> None:
    model, images = tiny_vit(), drawn().requires_grad_()
    with observe(model) as seen:
        model(images)
    seen[-1].square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert model.body.blocks[-1].attn.qkv.weight.grad is not None


def test_a_model_may_wrap_its_vit(tiny_vit: Build) -> None:
    model = tiny_vit()
    wrapped = nn.Sequential(nn.Identity(), model)
    assert transformer(wrapped) is model.body
    assert token_layout(wrapped) == token_layout(model)


def test_eager_attention_is_off_again_afterwards(tiny_vit: Build) -> None:
    model = tiny_vit()
    before = state(model)
    with eager_attention(model):
        assert not any(state(model)["fused"])
    assert state(model) == before
    with eager_attention(model, wanted=False):
        assert state(model) == before
    with pytest.raises(KeyError), eager_attention(model):
        raise KeyError
    assert state(model) == before


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(1, 2)
    ),
    "cait": lambda: timm.create_model(
        "cait_xxs24_224", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, depth_token_only=1
    ),
    "xcit": lambda: timm.create_model(
        "xcit_nano_12_p16_224", img_size=32, embed_dim=16, depth=1, num_heads=2, cls_attn_layers=1
    ),
    "resnet": lambda: timm.create_model("resnet10t", num_classes=3),
    "no network of layers": nn.Identity,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_families_without_plain_attention_are_refused(kind: str) -> None:
    model = REFUSED[kind]()
    before = state(model)
    message = f"model {type(model).__name__} has no plain token attention to look at; take one of the families vit"
    for look in (transformer, token_layout, lambda m: observe(m).__enter__()):
        with pytest.raises(UserError, match=message):
            look(model)
    assert state(model) == before


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vit_small_patch16_18x2_224", {}),  # two attentions side by side in a block
        ("vit_pwee_patch16_reg1_gap_256", {}),  # attention and MLP in one
        ("vit_dlittle_patch16_reg1_gap_256", {}),  # differential attention: no softmax row that sums to 1
        ("vit_tiny_patch16_224", {"depth": 0}),
    ],
)
def test_plain_names_with_other_blocks_are_refused_too(name: str, overrides: dict[str, Any]) -> None:
    shape = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, **overrides}
    with torch.random.fork_rng(devices=[]):
        model = open_model(Architecture(name, 16, 3, shape))
    with pytest.raises(UserError, match="no plain token attention"):
        token_layout(model)
