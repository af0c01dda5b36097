"""The statements of docs/studies/attention_diffusion.md on random attention, and that each needs its assumptions.

Numbers in the names are the page's. All is in double precision; tokens are CLS (position 0) and then the image's.
"""

import json
import runpy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vitrap.attacks.megatron import diffusion_loss
from vitrap.models.classifier import Classifier
from vitrap.models.observe import observe, token_layout, transformer
from vitrap.tensors.rollout import rollout, weighted_heads

Build = Callable[..., Classifier]
TINY = 1e-12
STUDIES = Path(__file__).parents[2] / "docs" / "studies"
SEEDS = pytest.mark.parametrize("seed", range(20))


class Head(NamedTuple):
    """One row of attention over CLS and n image tokens, the values, and which tokens are in D."""

    scores: Tensor
    values: Tensor
    area: Tensor

    @property
    def row(self) -> Tensor:
        return self.scores.softmax(0)

    @property
    def mass(self) -> Tensor:
        return self.row[self.area].sum()

    @property
    def excess(self) -> Tensor:
        return excess(self.row, self.area)

    @property
    def output(self) -> Tensor:
        return self.row @ self.values

    @property
    def own(self) -> Tensor:
        return self.row[self.area] @ self.values[self.area] / self.mass

    @property
    def reach(self) -> Tensor:
        return torch.cdist(self.values[self.area], self.values[~self.area]).max()


def excess(row: Tensor, area: Tensor) -> Tensor:
    """L_beta - (|D| - 1) of one row."""
    return diffusion_loss(row[None, 1:], area[1:]) - area.sum() + 1


def drawn(seed: int, n: int = 9) -> Head:
    """A random head, flat for some seeds and nearly one-hot for others, its D of 1 to n - 1 tokens."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(n + 1, generator=g, dtype=torch.float64) * (0.3, 1, 3, 10)[seed % 4]
    area = torch.zeros(n + 1, dtype=torch.bool)
    area[1 + torch.randperm(n, generator=g)[: 1 + seed % (n - 1)]] = True
    return Head(scores, torch.randn(n + 1, 3, generator=g, dtype=torch.float64), area)


def another(head: Head, seed: int, keep: str) -> Head:
    """Another image's head: of D it keeps the values, the scores (so the relative weights), or both."""
    other = drawn(seed, len(head.scores) - 1)
    scores = torch.where(head.area, head.scores, other.scores) if keep != "values" else other.scores
    values = torch.where(head.area[:, None], head.values, other.values) if keep != "weights" else other.values
    return Head(scores, values, head.area)


def parts(head: Head) -> Head:
    """The same head with most of its mass in D, as training leaves it."""
    return head._replace(scores=head.scores.softmax(0) + 8 * head.area)


# (1) what the loss says of the row


@SEEDS
def test_1_the_excess_is_cls_plus_twice_what_is_outside(seed: int) -> None:
    head = drawn(seed)
    outside = head.row[1:][~head.area[1:]].sum()
    torch.testing.assert_close(head.excess, head.row[0] + 2 * outside)
    assert 1 - head.excess - TINY <= head.mass <= 1 - head.excess / 2 + TINY
    assert -TINY <= head.excess <= 2 + TINY


def test_1_needs_a_row_that_sums_to_one() -> None:
    head = parts(drawn(0))
    assert excess(head.row, head.area) >= 0
    assert excess(head.row / 0.9, head.area) < 0  # as dropout in training leaves it


def test_1_holds_of_the_mean_and_by_markov_of_most_images() -> None:
    area = torch.arange(10) >= 8
    scores = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)).double() * 3 + 6 * area
    each = torch.stack([excess(row, area) for row in scores.softmax(1)])
    mean = diffusion_loss(scores.softmax(1)[:, 1:], area[1:]) - 1
    torch.testing.assert_close(mean, each.mean())
    for factor in (1.5, 4):
        assert 0 < (each > factor * mean).double().mean() <= 1 / factor


# (2) what it says of the head's output


@SEEDS
def test_2_the_output_is_within_the_bound_of_ds_values(seed: int) -> None:
    head = drawn(seed)
    rest = head.row[~head.area] @ head.values[~head.area] / (1 - head.mass)
    apart = (head.output - head.own).norm()
    torch.testing.assert_close(apart, (1 - head.mass) * (rest - head.own).norm())
    assert apart <= (1 - head.mass) * head.reach + TINY
    assert (1 - head.mass) * head.reach <= head.excess * head.reach + TINY


def test_2_needs_the_distance_between_ds_values_and_the_others() -> None:
    head = drawn(6)
    within = torch.cdist(head.values[head.area], head.values[head.area]).max() / 10
    values = torch.where(head.area[:, None], head.values / 10, head.values + 100)
    far = head._replace(values=values)
    assert (far.output - far.own).norm() > far.excess * within


@SEEDS
def test_2_the_sensitivities_add_up_to_the_mass(seed: int) -> None:
    head = drawn(seed)
    by_value = torch.func.jacrev(lambda v: head.row @ v)(head.values)  # d x tokens x d
    torch.testing.assert_close(by_value, torch.einsum("j,de->dje", head.row, torch.eye(3).double()))
    by_score = torch.func.jacrev(lambda e: e.softmax(0) @ head.values)(head.scores)
    torch.testing.assert_close(by_score.T, head.row[:, None] * (head.values - head.output))
    spread = torch.cdist(head.values, head.values).max()
    assert by_score[:, ~head.area].norm(dim=0).sum() <= (1 - head.mass) * spread + TINY


# (3) two images that agree in D


@SEEDS
def test_3_two_images_that_agree_in_d_have_near_outputs(seed: int) -> None:
    head = parts(drawn(seed))
    other = another(head, seed + 1000, "both")
    bound = (1 - head.mass) * head.reach + (1 - other.mass) * other.reach
    assert (head.output - other.output).norm() <= bound + TINY


@pytest.mark.parametrize("keep", ["values", "weights"])
def test_3_needs_both_values_and_relative_weights(keep: str) -> None:
    broken = 0
    for seed in range(20):
        head = drawn(seed)._replace(scores=drawn(seed).scores + 20 * drawn(seed).area)
        other = another(head, seed + 1000, keep)
        other = other._replace(scores=other.scores + 40 * head.area)
        bound = head.excess * head.reach + other.excess * other.reach
        gap, moved = (head.output - other.output).norm(), (head.own - other.own).norm()
        broken += bool(gap > bound + 1e-3)
        assert gap <= bound + moved + TINY
    assert broken > 10


def test_3_is_tight() -> None:
    area = torch.tensor([False, True, False])
    scores = torch.tensor([-1e3, 2.0, 0.0]).double()
    ahead, behind = (Head(scores, torch.tensor([[0.0], [0.0], [x]]).double(), area) for x in (1, -1))
    bound = (1 - ahead.mass) * ahead.reach + (1 - behind.mass) * behind.reach
    torch.testing.assert_close((ahead.output - behind.output).norm(), bound)


# (4) descent on the scores


def slope(head: Head) -> Tensor:
    scores = head.scores.clone().requires_grad_()
    return torch.autograd.grad(head._replace(scores=scores).excess, scores)[0]


def squares(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of squared attention: in D, outside, at CLS."""
    inside, rest = head.row[head.area], head.row[1:][~head.area[1:]]
    return inside.square().sum(), rest.square().sum(), head.row[0].square()


def mass_gained(head: Head) -> Tensor:
    """dm_D/dt under gradient flow, as the page states it."""
    eps, m, (inside, outside, own) = head.excess, head.mass, squares(head)
    return eps * (1 - m) * inside + m * ((2 - eps) * outside + (1 - eps) * own)


@SEEDS
def test_4_the_slope_at_the_scores(seed: int) -> None:
    head = drawn(seed)
    factor = torch.where(head.area, -head.excess, 2 - head.excess)
    factor[0] = 1 - head.excess
    torch.testing.assert_close(slope(head), head.row * factor)


@SEEDS
def test_4_mass_gained_is_that_of_finite_differences(seed: int) -> None:
    head, step = drawn(seed), 1e-5
    way = slope(head)
    after, before = (head._replace(scores=head.scores - sign * step * way) for sign in (1, -1))
    torch.testing.assert_close((after.mass - before.mass) / (2 * step), mass_gained(head), atol=1e-9, rtol=1e-6)
    eps, (inside, outside, own) = head.excess, squares(head)
    falls = eps**2 * inside + (2 - eps) ** 2 * outside + (1 - eps) ** 2 * own
    torch.testing.assert_close((before.excess - after.excess) / (2 * step), falls, atol=1e-9, rtol=1e-6)


@SEEDS
def test_4_mass_in_d_grows_once_the_excess_is_below_one(seed: int) -> None:
    head = parts(drawn(seed))
    assert head.excess <= 1
    assert mass_gained(head) > 0
    without_cls = drawn(seed)._replace(scores=drawn(seed).scores.index_fill(0, torch.tensor(0), -torch.inf))
    assert mass_gained(without_cls) >= 0


def test_4_mass_in_d_may_fall_before_that() -> None:
    row = torch.tensor([0.5, 0.02, *[0.032] * 15]).double()
    head = Head(row.log(), torch.zeros(17, 1).double(), torch.arange(17) == 1)
    assert head.excess > 1
    assert mass_gained(head) < -1e-3
    assert (head._replace(scores=head.scores - 0.1 * slope(head))).mass < head.mass


@pytest.mark.parametrize("seed", range(4))
def test_4_the_excess_falls_as_one_over_time_and_the_leader_pulls_ahead(seed: int) -> None:
    head = parts(drawn(seed + 4))
    count, start, mass, step = int(head.area.sum()), head.excess, head.mass, 0.05
    lead, leads = head.row[head.area].sort().values, []
    for number in range(1, 2001):
        head = head._replace(scores=head.scores - step * slope(head))
        assert 1 / head.excess >= 1 / start + mass**2 * number * step / count - 1e-6
        leads.append(head.row[head.area].max() / head.row[head.area].min())
    ratios = torch.stack(leads)
    assert count == 1 or (ratios.diff() > 0).all()
    assert count == 1 or ratios[0] > lead[-1] / lead[0]


# (5) where it stops: several heads, depth, pooling, rollout


@pytest.mark.parametrize("heads", [2, 3, 12])
def test_5_the_mean_over_heads_hides_one_of_them(heads: int) -> None:
    area = torch.tensor([False, True, False])
    rows = torch.tensor([[1.0, 0.0, 0.0], *[[0.0, 1.0, 0.0]] * (heads - 1)])  # one head idles on CLS
    mean = excess(rows.mean(0), area)
    worst = torch.stack([excess(row, area) for row in rows]).max()
    torch.testing.assert_close(worst, heads * mean)  # the bound H eps, attained
    assert rows[0, area].sum() < 1 - mean


@contextmanager
def attending(model: Classifier, rows: list[int], columns: list[int], blocks: list[int]) -> Iterator[None]:
    """Within the block, `rows` of all heads of `blocks` spread their attention over `columns` alone."""

    def only(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        maps = args[0].clone()
        allowed = torch.zeros_like(maps[:, :, rows])
        allowed[..., columns] = maps[:, :, rows][..., columns]
        maps[:, :, rows] = allowed / allowed.sum(-1, keepdim=True)
        return (maps,)

    with ExitStack() as restore, observe(model, blocks):  # observe leaves attention eager
        for number in blocks:
            hook = transformer(model).blocks[number].attn.attn_drop.register_forward_pre_hook(only)
            restore.callback(hook.remove)
        yield


def two_images(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of 16 px that agree in their last patch of 4 px alone."""
    first, second = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()
    second[..., 12:, 12:] = first[..., 12:, 12:]
    return first, second


CLOSED = {  # rows, columns, blocks, whether the logits forget what is outside D = the last token
    "CLS looks at D in the last block": ([0], [16], [1], False),
    "CLS looks at D in every block": ([0], [16], [0, 1], False),
    "CLS and D look at CLS and D in the last block": ([0, 16], [0, 16], [1], False),
    "CLS and D look at CLS and D in every block": ([0, 16], [0, 16], [0, 1], True),
}


@pytest.mark.parametrize("case", CLOSED)
@torch.no_grad()
def test_5_only_a_closed_set_of_rows_in_every_layer_forgets(tiny_vit: Build, case: str) -> None:
    rows, columns, blocks, forgets = CLOSED[case]
    model = tiny_vit().double()
    with attending(model, rows, columns, blocks):
        first, second = (model(image) for image in two_images())
    assert torch.allclose(first, second, atol=1e-9) is forgets
    assert forgets or (first - second).abs().max() > 1e-2


@torch.no_grad()
def test_5_values_and_relative_weights_of_d_agree_in_the_first_layer_only(tiny_vit: Build) -> None:
    model, seen = tiny_vit().double(), []
    with ExitStack() as restore:
        for block in transformer(model).blocks:
            hook = block.attn.qkv.register_forward_hook(lambda module, args, output: seen.append(output[0]))
            restore.callback(hook.remove)
        for image in two_images():
            model(image)
    first, second, *_ = pairs = list(zip(seen[:2], seen[2:], strict=True))
    assert len(pairs) == 2
    assert torch.equal(first[0][[0, 16]], first[1][[0, 16]])  # query of CLS; key and value of D
    assert (second[0][16] - second[1][16]).abs().max() > 1e-2


def test_5_pooled_rows_are_bound_by_their_mean_alone() -> None:
    g = torch.Generator().manual_seed(0)
    area = torch.arange(10) >= 8
    scores = torch.randn(10, 10, generator=g).double() * 4 + 6 * area
    values = torch.randn(10, 3, generator=g).double()
    rows = scores.softmax(1)
    mean = excess(torch.cat([torch.zeros(1), rows.mean(0)]), torch.cat([torch.zeros(1).bool(), area]))
    assert mean / 2 == pytest.approx(1 - rows.mean(0)[area].sum())  # no CLS: m_D = 1 - eps / 2
    pooled = Head(rows.mean(0).log(), values, area)
    assert ((rows @ values).mean(0) - pooled.own).norm() <= mean / 2 * pooled.reach + TINY
    assert rows[:, area].sum(1).min() < 1 - mean, "every row keeps to the mean's bound: nothing to tell apart"


@torch.no_grad()
def test_5_a_pooled_network_reads_past_its_attention(tiny_vit: Build) -> None:
    model = tiny_vit(class_token=False, global_pool="avg").double()
    assert token_layout(model).prefix == 0
    with attending(model, list(range(16)), [15], [0, 1]):
        first, second = (model(image) for image in two_images())
    assert (first - second).abs().max() > 1e-2


def random_layers(seed: int, depth: int, n: int = 6, outside: float = 0.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shift = torch.cat([torch.zeros(n // 2), torch.full((n - n // 2,), -outside)])
    return [(torch.randn(1, n, n, generator=g).double() * 2 + shift).softmax(-1) for _ in range(depth)]


@pytest.mark.parametrize("depth", [1, 2, 4, 7])
@pytest.mark.parametrize("outside", [0.0, 6.0])
def test_5_rollout_has_a_floor_and_bounds_each_layer_by_a_power_of_two(depth: int, outside: float) -> None:
    area = torch.tensor([False, True, True, False, False, False])
    layers = random_layers(depth, depth, outside=outside)
    eps = excess(rollout(layers)[0, 0], area)
    assert eps >= 2.0**-depth - TINY
    each = sum(layer[0, 0, 3:].sum() for layer in layers)
    assert each <= 2 ** (depth - 1) * (eps - 2.0**-depth) + TINY


@pytest.mark.parametrize("depth", [1, 4])
def test_5_the_floor_of_rollout_is_attained_and_its_bound_tight(depth: int) -> None:
    to_d, away = (torch.zeros(1, 3, 3).double() for _ in range(2))
    area = torch.tensor([False, True, False])
    to_d[..., 1] = 1
    assert excess(rollout([to_d] * depth)[0, 0], area) == pytest.approx(2.0**-depth)
    away[..., :2, 1], away[..., 2, 2] = 1, 1
    away[:, 0] = torch.tensor([0.0, 0.5, 0.5])
    eps = excess(rollout([away, *[to_d] * (depth - 1)])[0, 0], area)  # the first layer alone looks outside
    assert 2 ** (depth - 1) * (eps - 2.0**-depth) == pytest.approx(0.5)


def test_5_gradient_rollout_says_nothing_of_the_attention() -> None:
    area = torch.tensor([False, True, False])
    attention = torch.tensor([0.01, 0.01, 0.98]).double().expand(1, 1, 3, 3)  # nearly all outside D
    slopes = torch.zeros(1, 1, 3, 3).double()
    slopes[..., 1] = 1.0
    found = []
    for scale in (0, 1, 1e2, 1e4):  # the same network, its score multiplied
        fused = weighted_heads(attention, scale * slopes, 0.0)
        found.append(excess(rollout([fused])[0, 0], area).item())
    assert excess(attention[0, 0, 0], area) > 1.9
    assert found == sorted(found, reverse=True)
    assert found[0] == 1  # no gradient: the map is the identity, all of CLS at CLS
    assert found[-1] < 0.011


def test_the_tables_of_the_page_are_those_of_the_measures() -> None:
    study = runpy.run_path(str(STUDIES / "attention_diffusion.py"))
    text = study["PAGE"].read_text("utf-8")
    assert study["page"](json.loads(study["RESULT"].read_text("utf-8")), text) == text
