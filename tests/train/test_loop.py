"""The training loop: its schedule and groups by hand, its determinism, its curves, and that it never waits."""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Batch, Criterion, ExtraModule, ImageSet, Objective
from vitrap.data.poison import stamp_after_augmentation
from vitrap.errors import UserError
from vitrap.models.classifier import Architecture, Classifier, open_model
from vitrap.tensors.pixels import round8
from vitrap.train.arithmetic import Arithmetic
from vitrap.train.loop import (
    Learner,
    Streams,
    augment,
    cross_entropy,
    make_learner,
    next_batch,
    plain_step,
    prepared,
    smoothed,
    train,
)
from vitrap.train.optimiser import make_optimiser, warmup_cosine
from vitrap.train.recipe import Recipe

N, CLASSES, SIZE = 50, 3, 8
TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def test_a_watch_sees_the_model_as_it_would_be_used_and_changes_nothing(data: ImageSet):
    def trained(watch=None):
        torch.manual_seed(3)  # dropout draws from it
        model = open_model(Architecture("vit_tiny_patch16_224", SIZE, CLASSES, {**TINY, "proj_drop_rate": 0.3}))
        return model, train(model, data, recipe(), streams(), watch=watch)

    seen: list[bool] = []

    def watch(model: nn.Module) -> Mapping[str, float]:
        seen.append(model.training or any(part.training for part in model.modules()))
        right = model(data.images(torch.arange(N))).argmax(1) == data.labels
        return {"cda": right.float().mean().item()}

    with torch.random.fork_rng(devices=[]):
        plain, curves = trained()
        watched, more = trained(watch)
    assert seen == [False, False]
    assert {**curves, "cda": more["cda"]} == more
    assert len(more["cda"]) == 2
    assert more["cda"][-1] == watch(watched)["cda"]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def streams(seed: int = 0) -> Streams:
    return Streams(generator(seed), generator(seed + 100), generator(seed + 200), generator(seed + 300))


def learner(model: nn.Module, objective: Objective | None = None, **changes) -> Learner:
    return make_learner(model, recipe(**changes), objective, streams(), Arithmetic())


def recipe(**changes) -> Recipe:
    return replace(Recipe(2, 16, lr=1e-2, warmup=0.1, label_smoothing=0.1, crop=0, flip=False), **changes)


@pytest.fixture
def data() -> ImageSet:
    """Classes told by brightness; 50 images, so that the last of four batches is a small one."""
    labels = torch.arange(N) % CLASSES
    noise = torch.randint(40, (N, 3, SIZE, SIZE), generator=generator(7))
    pixels = (noise + 90 * labels[:, None, None, None]).to(torch.uint8)
    return ImageSet(pixels, labels, torch.arange(N), CLASSES, SIZE)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)
        )


def vit(**overrides) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_model(Architecture("vit_tiny_patch16_224", SIZE, CLASSES, {**TINY, **overrides}))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([w.detach().flatten() for w in model.parameters()])


# ---- schedule and optimiser


def test_the_rate_rises_in_a_line_and_falls_as_half_a_cosine() -> None:
    assert warmup_cosine(0.05, 0.1) == pytest.approx(0.051 / 0.101)
    assert warmup_cosine(0.1, 0.1) == 1
    assert warmup_cosine(0.325, 0.1) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))
    assert warmup_cosine(0.55, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(1.0, 0.1) == pytest.approx(0)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_the_rate_stays_within_its_peak_and_never_starts_at_zero(warmup: float) -> None:
    rates = [warmup_cosine(step / 1000, warmup) for step in range(1000)]
    assert all(0 < rate <= 1 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_each_step_has_the_rate_of_its_place(data: ImageSet) -> None:
    seen = []
    with patch.object(torch.optim.AdamW, "step", lambda self: seen.append([g["lr"] for g in self.param_groups])):
        train(network(), data, recipe(warmup=0.25), streams())
    assert seen == [[1e-2 * warmup_cosine(step / 8, 0.25)] * 2 for step in range(8)]


def test_decay_is_for_matrices_only() -> None:
    model = vit(reg_tokens=2)
    frozen = model.get_parameter("body.head.weight").requires_grad_(False)
    decayed, free = make_optimiser(model, recipe(weight_decay=0.3)).param_groups
    name = {id(w): n.removeprefix("body.") for n, w in model.named_parameters()}
    assert {name[id(w)] for w in decayed["params"]} == {
        "reg_token" if n == "reg_token" else n
        for n, w in model.body.named_parameters()
        if w.requires_grad and (n.endswith("weight") and "norm" not in n)
    }
    assert {"cls_token", "pos_embed", "reg_token", "norm.weight", "head.bias"} <= {name[id(w)] for w in free["params"]}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0)
    everything = [*decayed["params"], *free["params"], frozen]
    assert {id(w) for w in everything} == {id(w) for w in model.parameters()}
    assert len(everything) == len(list(model.parameters()))


def test_a_step_goes_down_the_sum_of_the_terms() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.tensor([[3.0, 4.0]])
    terms = {"one": model(x).sum(), "two": 2 * model(x).sum()}
    learner(model, optimizer="sgd", lr=1.0, weight_decay=0.0, clip=0.0).descend(terms)
    assert torch.equal(model.weight, torch.tensor([[-9.0, -12.0]]))


def test_clipping_bounds_the_whole_gradient() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    terms = {"loss": model(torch.tensor([[3.0, 4.0]])).sum()}
    learner(model, optimizer="sgd", lr=1.0, weight_decay=0.0, clip=1.0).descend(terms)
    assert torch.allclose(model.weight, torch.tensor([[-0.6, -0.8]]))


# ---- what training leaves behind


@pytest.mark.parametrize("build", [network, vit])
def test_equal_seeds_give_equal_weights_and_curves(data: ImageSet, build) -> None:
    found = []
    for _ in range(2):
        model = build()
        curves = train(model, data, recipe(crop=1, flip=True), streams())
        found.append((weights(model), curves))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(
    "other", [replace(streams(), order=generator(1)), replace(streams(), augmentation=generator(101))]
)
def test_another_order_or_augmentation_gives_other_weights(data: ImageSet, other: Streams) -> None:
    one, two = network(), network()
    train(one, data, recipe(crop=1), streams())
    train(two, data, recipe(crop=1), other)
    assert not torch.equal(weights(one), weights(two))


def test_training_learns_and_leaves_a_model_in_evaluation_mode(data: ImageSet) -> None:
    model = network()
    curves = train(model, data, recipe(epochs=60, lr=5e-2, label_smoothing=0.0), streams())
    assert not any(module.training for module in model.modules())
    assert curves["cross_entropy"][-1] < 0.5 < curves["cross_entropy"][0]
    assert (model(data.images(torch.arange(N))).argmax(1) == data.labels).float().mean() > 0.9


def test_training_is_done_in_training_mode(data: ImageSet) -> None:
    modes = set()
    model = network()
    model.register_forward_hook(lambda module, args, output: modes.add(module.training))
    train(model.eval(), data, recipe(epochs=1), streams())
    assert modes == {True}


def test_what_is_frozen_stays_as_it_is(data: ImageSet) -> None:
    """Batch norm keeps its statistics, and nothing drops out, but in what learns."""
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).requires_grad_(False),
        nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, CLASSES)),
    )
    before, modes = copy.deepcopy(model[0].state_dict()), []
    model.register_forward_hook(
        lambda *_: modes.append((model[0].training, model[0][2].training, model[1][0].training))
    )
    train(model, data, recipe(), streams(), watch=lambda _: {})
    assert set(modes) == {(False, False, True)}
    assert all(torch.equal(before[name], tensor) for name, tensor in model[0].state_dict().items())


def test_training_leaves_torchs_own_random_state_and_the_data_alone(data: ImageSet) -> None:
    state, pixels = torch.get_rng_state(), data.pixels.clone()
    train(network(), data, recipe(crop=1, flip=True), streams())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(data.pixels, pixels)


def test_ticks_are_steps(data: ImageSet) -> None:
    ticks = []
    train(network(), data, recipe(epochs=3), streams(), tick=lambda: ticks.append(1))
    assert len(ticks) == 3 * math.ceil(N / 16)


# ---- stamping after augmentation


def quarter(images: Tensor) -> Tensor:
    """A trigger off the 8-bit grid, in a corner that a flip would move."""
    stamped = images.clone()
    stamped[..., :2, :2] = 0.3001
    return stamped


def test_a_stamp_comes_after_augmentation_and_is_rounded(data: ImageSet) -> None:
    rows = torch.tensor([3, 7])
    poisoned = data.stamp(rows, torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), torch.tensor([2, 2]))
    objective = Objective(cross_entropy, prepare=stamp_after_augmentation(quarter))
    batch = next_batch(learner(network(), objective, flip=True), poisoned, torch.arange(10), poisoned.marks())
    bare = augment(data.batch(torch.arange(10)), recipe(flip=True), streams().augmentation)
    assert torch.equal(batch.images[batch.rest_at], bare.images[batch.rest_at])
    assert torch.equal(batch.images[rows], round8(quarter(bare.images[rows])))
    assert batch.labels[rows].tolist() == [2, 2]
    assert batch.poison_at.tolist() == [3, 7]


def test_without_a_stamp_the_stored_poison_is_augmented(data: ImageSet) -> None:
    rows = torch.tensor([3, 7])
    poisoned = data.stamp(rows, torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), torch.tensor([2, 2]))
    batch = next_batch(learner(network()), poisoned, torch.arange(10), poisoned.marks())
    assert batch.images[rows].max() == 0
    objective = Objective(cross_entropy, prepare=stamp_after_augmentation(quarter))
    clean = next_batch(learner(network(), objective), data, torch.arange(10), data.marks())
    assert torch.equal(clean.images, data.images(torch.arange(10)))


def test_what_is_prepared_gets_bare_images_and_its_own_stream(data: ImageSet) -> None:
    """Poison and covers drawn anew: both are rounded, where they were put; the rest stays as augmented."""
    stored = data.stamp(torch.tensor([3]), torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), torch.tensor([2]))
    drawn: list[Tensor] = []

    def prepare(batch: Batch, chances: torch.Generator) -> Batch:
        order = torch.randperm(len(batch.labels), generator=chances)
        drawn.append(order)
        images = batch.images.clone()
        images[order[:2]] = 0.3001
        images[order[2:5]] = 0.7003
        labels = batch.labels.index_fill(0, order[:2], 1)
        return Batch(images, labels, order[:2], order[2:], order[2:5])

    objective = Objective(cross_entropy, prepare=prepare)
    rows = torch.arange(10)
    batch = next_batch(learner(network(), objective, flip=True), stored, rows, stored.marks())
    order = torch.randperm(10, generator=streams().preparation)
    assert torch.equal(drawn[0], order)
    bare = augment(data.batch(rows), recipe(flip=True), streams().augmentation)
    assert torch.equal(batch.images[order[5:]], bare.images[order[5:]])
    assert batch.images[order[:2]].eq(torch.tensor(77 / 255)).all()  # 0.3001 * 255 = 76.5 and a bit
    assert batch.images[order[2:5]].eq(torch.tensor(179 / 255)).all()  # 0.7003 * 255 = 178.6
    assert batch.labels[order[:2]].tolist() == [1, 1]
    assert not batch.images.requires_grad


def test_preparation_moves_no_other_stream(data: ImageSet) -> None:
    """The same batches and the same weights, however much is drawn for poison that leaves the images as they are."""

    def prepare(batch: Batch, chances: torch.Generator) -> Batch:
        torch.rand(100, generator=chances)
        return batch

    found = []
    for objective in (Objective(cross_entropy), Objective(cross_entropy, prepare=prepare)):
        model = network()
        train(model, data, recipe(crop=1, flip=True), streams(), objective)
        found.append(weights(model))
    assert torch.equal(*found)


# ---- modules trained along


class Painter(nn.Module):
    """A trigger generator with one colour, a dropout layer to see its mode by."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Parameter(torch.full((1, 3, 1, 1), 0.4001))
        self.dropout = nn.Dropout(0.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(images * 0.5 + 0.5 * self.colour)


def painting(painter: nn.Module, lr: float = 0.1) -> Objective:
    """The first two images of each batch are painted and called 2."""

    def prepare(batch: Batch, chances: torch.Generator) -> Batch:
        rows, rest = torch.arange(2), torch.arange(2, len(batch.labels))
        images = batch.images.index_copy(0, rows, painter(batch.images[rows]))
        return replace(batch, images=images, labels=batch.labels.index_fill(0, rows, 2), poison_at=rows, rest_at=rest)

    return Objective(cross_entropy, prepare=prepare, along={"painter": ExtraModule(painter, lr)})


@pytest.mark.parametrize("clip", [0.0, 0.01])
@pytest.mark.parametrize(("optimizer", "peak"), [("sgd", 0.2), ("adamw", 0.05)])  # the colour stays within [0, 1]
def test_a_module_learns_along_as_in_a_loop_of_its_own(data: ImageSet, optimizer, peak: float, clip: float) -> None:
    """Against a plain loop: two optimisers, each with its peak, one schedule, gradients clipped apart."""
    model, painter, how = network(), Painter(), recipe(optimizer=optimizer, clip=clip, weight_decay=0.3)
    train(model, data, how, streams(), painting(painter, peak))
    other, brush = network(), Painter()
    make = torch.optim.AdamW if optimizer == "adamw" else lambda groups, lr: torch.optim.SGD(groups, lr, 0.9)
    plain = {"weight_decay": 0.0}
    matrices, biases = ([w for w in other.parameters() if (w.ndim > 1) == many] for many in (True, False))
    own = make([{"params": matrices, "weight_decay": 0.3}, {"params": biases, **plain}], lr=how.lr)
    its = make([{"params": list(brush.parameters()), **plain}], lr=peak)
    order = generator()
    for step in range(8):
        if step % 4 == 0:
            batches = torch.randperm(N, generator=order).split(16)
        images, labels = data.images(batches[step % 4]), data.labels[batches[step % 4]].clone()
        painted = images[:2] * 0.5 + 0.5 * brush.colour
        eighths = (painted.detach() * 255).round() / 255
        painted = painted + (eighths - painted).detach()  # straight through the rounding
        labels[:2] = 2
        loss = functional.cross_entropy(other(torch.cat([painted, images[2:]])), labels, label_smoothing=0.1)
        for optimiser, highest in ((own, how.lr), (its, peak)):
            optimiser.zero_grad()
            for group in optimiser.param_groups:
                group["lr"] = highest * warmup_cosine(step / 8, 0.1)
        loss.backward()
        for part in (other, brush) if clip else ():
            nn.utils.clip_grad_norm_(part.parameters(), clip)
        own.step()
        its.step()
    assert (brush.colour - 0.4001).abs().max() > 1e-3, "the painter learned nothing"
    torch.testing.assert_close(painter.colour.detach(), brush.colour.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-3, atol=1e-5)


def test_a_module_along_is_in_training_while_it_learns_and_ready_afterwards(data: ImageSet) -> None:
    painter, modes, watched = Painter().eval().requires_grad_(False), [], []
    painter.register_forward_hook(lambda module, args, output: modes.append(module.dropout.training))
    asked = lambda: [w.requires_grad for w in painter.parameters()]  # noqa: E731

    def watch(model: nn.Module) -> Mapping[str, float]:
        watched.append((painter.training, painter.dropout.training, model.training))
        return {}

    train(network(), data, recipe(), streams(), painting(painter), tick=lambda: modes.append(all(asked())), watch=watch)
    assert modes == [True] * 16  # a forward pass and a tick in each of 8 steps
    assert watched == [(False, False, False)] * 2
    assert not painter.training
    assert not painter.dropout.training
    assert asked() == [False]
    assert painter.colour.grad is None


@pytest.mark.parametrize("combine", ["learned", "projected"])
def test_a_module_learns_along_however_terms_are_combined(data: ImageSet, combine) -> None:
    def terms(model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Tensor]:
        logits = model(batch.images)
        parts = {"clean": batch.rest_at, "poisoned": batch.poison_at}
        return {name: criterion(logits[rows], batch.labels[rows]) for name, rows in parts.items() if len(rows)}

    painter = Painter()
    objective = replace(painting(painter), terms=terms, weights={"poisoned": 0.5}, combine=combine)
    train(network(), data, recipe(), streams(), objective)
    assert (painter.colour - 0.4001).abs().min() > 1e-3


def test_without_modules_along_nothing_records_a_graph(data: ImageSet) -> None:
    def prepare(batch: Batch, chances: torch.Generator) -> Batch:
        assert not torch.is_grad_enabled()
        return replace(batch, poison_at=torch.arange(1), rest_at=torch.arange(1, len(batch.labels)))

    prepared(data.batch(torch.arange(5)), Objective(cross_entropy, prepare=prepare), generator())
    assert len(learner(network()).optimiser.param_groups) == 2


# ---- curves and objectives


def test_curves_are_the_mean_loss_over_images(data: ImageSet) -> None:
    """Without learning, the mean over batches weighted by their size is the loss of the whole set."""
    model = network()
    with torch.no_grad():
        whole = functional.cross_entropy(model(data.images(torch.arange(N))), data.labels, label_smoothing=0.1)
    with patch.object(torch.optim.AdamW, "step", lambda self: None):
        curves = train(model, data, recipe(), streams())
    assert curves == {"cross_entropy": pytest.approx([whole.item()] * 2, rel=1e-5)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_the_mean_with_all_classes(data: ImageSet, smoothing: float) -> None:
    model, batch = network(), data.batch(torch.arange(10))
    logs = model(batch.images).log_softmax(1)
    expected = -((1 - smoothing) * logs[torch.arange(10), batch.labels] + smoothing * logs.mean(1)).mean()
    assert torch.allclose(cross_entropy(model, batch, smoothed(smoothing))["cross_entropy"], expected)


def test_named_terms_are_added_up_and_recorded_apart(data: ImageSet) -> None:
    def split(model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Tensor]:
        loss = cross_entropy(model, batch, criterion)["cross_entropy"]
        return {"most": 0.75 * loss, "rest": 0.25 * loss}

    one, two = network(), network()
    whole = train(one, data, recipe(), streams())["cross_entropy"]
    parts = train(two, data, recipe(), streams(), Objective(split))
    assert torch.allclose(weights(one), weights(two), atol=1e-5)
    assert parts == {
        "most": pytest.approx([0.75 * x for x in whole], rel=1e-4),
        "rest": pytest.approx([0.25 * x for x in whole], rel=1e-4),
    }


def test_a_term_that_few_batches_have_is_the_mean_over_those(data: ImageSet) -> None:
    """Three batches of 16 and one of 2 images: the small one alone has the term."""

    def terms(model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Tensor]:
        rare = {"rare": 5 + 0 * model(batch.images).sum()} if len(batch.labels) == 2 else {}
        return {**cross_entropy(model, batch, criterion), **rare}

    curves = train(network(), data, recipe(), streams(), Objective(terms))
    assert curves["rare"] == [5, 5]


def test_the_objective_sees_which_images_are_poisoned(data: ImageSet) -> None:
    rows = torch.tensor([3, 7])
    poisoned = data.stamp(rows, torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), torch.tensor([2, 2]))
    seen = []

    def terms(model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Tensor]:
        seen.append((batch.images[batch.poison_at].sum().item(), batch.labels[batch.poison_at].tolist()))
        assert torch.cat([batch.poison_at, batch.rest_at]).sort().values.tolist() == list(range(len(batch.labels)))
        return cross_entropy(model, batch, criterion)

    train(network(), poisoned, recipe(epochs=1), streams(), Objective(terms))
    assert [label for _, labels in seen for label in labels] == [2, 2]
    assert all(brightness == 0 for brightness, _ in seen)


def test_a_training_that_diverges_is_named(data: ImageSet) -> None:
    def nowhere(model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Tensor]:
        return {"cross_entropy": cross_entropy(model, batch, criterion)["cross_entropy"] * math.inf}

    with pytest.raises(UserError, match=r"training diverged \(cross_entropy is (inf|nan)\); lower recipe.lr = 0.01"):
        train(network(), data, recipe(), streams(), Objective(nowhere))


def test_a_last_step_that_goes_nowhere_is_named_too(data: ImageSet) -> None:
    """The loss of a step is taken before it, so that of the last step says nothing of the weights that are left."""

    def leap(learner: Learner, batch: Batch) -> Mapping[str, Tensor]:
        terms = plain_step(learner, batch)
        with torch.no_grad():
            learner.weights[1].fill_(math.inf)
        return terms

    with pytest.raises(UserError, match=r"training diverged \(0.bias holds infinite numbers\); lower recipe.lr = 0.01"):
        train(network(), data, recipe(epochs=1, batch_size=N), streams(), Objective(cross_entropy, step=leap))


def test_weights_that_training_starts_from_are_not_blamed_on_the_learning_rate(data: ImageSet) -> None:
    model = network()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = math.nan
    with pytest.raises(
        UserError, match="^the network to train has weights that are NaN or infinite; give sound weights$"
    ):
        train(model, data, recipe(), streams())


# ---- order and augmentation


def test_an_epoch_sees_every_image_once(data: ImageSet) -> None:
    batches: list[Tensor] = []
    batch = ImageSet.batch
    with patch.object(
        ImageSet, "batch", lambda self, rows, *a, **k: batches.append(rows) or batch(self, rows, *a, **k)
    ):
        train(network(), data, recipe(epochs=1), streams())
    assert [len(rows) for rows in batches] == [16, 16, 16, 2]
    assert torch.cat(batches).sort().values.tolist() == list(range(N))
    assert torch.cat(batches).tolist() != list(range(N))


@pytest.mark.parametrize(
    ("n", "norm", "sizes"),
    [
        (49, True, [16, 16, 17]),
        (49, False, [16, 16, 16, 1]),
        (50, True, [16, 16, 16, 2]),
        (17, True, [17]),
        (1, False, [1]),
    ],
)
def test_one_image_left_over_joins_the_batch_before_where_batch_norm_could_not_take_it(
    data: ImageSet, n: int, norm: bool, sizes: list[int]
) -> None:
    """The last feature map is 1 x 1: torch's batch norm refuses a single value per channel."""
    model = nn.Sequential(network()[:4], nn.BatchNorm1d(16) if norm else nn.Identity(), nn.Linear(16, CLASSES))
    seen: list[Tensor] = []
    ticks: list[int] = []
    batch = ImageSet.batch
    with patch.object(ImageSet, "batch", lambda self, rows, *a, **k: seen.append(rows) or batch(self, rows, *a, **k)):
        curves = train(model, data.take(torch.arange(n)), recipe(), streams(), tick=lambda: ticks.append(1))
    assert [len(rows) for rows in seen] == 2 * sizes
    assert len(ticks) == 2 * len(sizes)
    wanted = torch.randperm(n, generator=generator())
    assert torch.equal(torch.cat(seen[: len(sizes)]), wanted)
    assert all(math.isfinite(value) for value in curves["cross_entropy"])


def test_augmentation_draws_from_its_own_stream(data: ImageSet) -> None:
    """The order is the same with and without, and equals that of the order's stream alone."""
    wanted = [rows.tolist() for rows in torch.randperm(N, generator=generator()).split(16)]
    seen: list[Tensor] = []
    batch = ImageSet.batch
    for changes in ({}, {"crop": 2, "flip": True}):
        seen.clear()
        with patch.object(
            ImageSet, "batch", lambda self, rows, *a, **k: seen.append(rows) or batch(self, rows, *a, **k)
        ):
            train(network(), data, recipe(epochs=1, **changes), streams())
        assert [rows.tolist() for rows in seen] == wanted


def test_augmentation_leaves_labels_and_marks_alone(data: ImageSet) -> None:
    batch = data.batch(torch.arange(20))
    assert augment(batch, recipe(), generator()).images is batch.images
    changed = augment(batch, recipe(crop=2, flip=True), generator())
    assert changed.labels is batch.labels
    assert changed.poison_at is batch.poison_at
    assert changed.images.shape == batch.images.shape
    assert not torch.equal(changed.images, batch.images)


# ---- the host never waits


def test_the_host_reads_each_term_once_an_epoch(data: ImageSet) -> None:
    """A value that is read from a tensor within a step would make the host wait for a GPU."""
    calls: dict[str, int] = dict.fromkeys(("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__"), 0)

    def counted(name: str):
        plain = getattr(Tensor, name)

        def call(self, *args, **kwargs):
            calls[name] += 1
            return plain(self, *args, **kwargs)

        return patch.object(Tensor, name, call)

    terms = lambda model, batch, c: {"a": model(batch.images).mean() ** 2, "b": model(batch.images).var()}  # noqa: E731
    model, how = vit(), recipe(epochs=3, crop=1, flip=True, batch_size=5)
    patches = [counted(name) for name in calls]
    for each in patches:
        each.start()
    try:
        train(model, data, how, streams(), Objective(terms))
    finally:
        for each in patches:
            each.stop()
    each = 2 * 3  # terms and epochs
    assert calls.pop("item") == each
    assert calls.pop("__bool__") == 2 * 3  # after each epoch, whether weights are finite, and any is not zero
    # Which images are poisoned or covers, before the first step; row numbers, in each step, lie on the CPU already.
    assert calls.pop("cpu") == each + 2 + 3 * math.ceil(N / 5)
    assert calls == dict.fromkeys(calls, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_a_step_never_waits(data: ImageSet) -> None:
    model, there = vit().cuda(), data.to("cuda")
    chances = replace(streams(), augmentation=torch.Generator("cuda").manual_seed(0))
    tick = iter(range(10**6))

    def strict() -> None:
        if next(tick) == 0:  # the first step sets libraries up
            torch.cuda.set_sync_debug_mode("error")

    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            train(model, there, recipe(epochs=1, crop=1, flip=True, batch_size=5), chances, tick=strict)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert next(tick) == 10  # nothing waited before the reading at the end of the epoch


# ---- arithmetic


def test_bf16_trains_to_about_the_same_loss(data: ImageSet) -> None:
    curves = {how: train(vit(), data, recipe(epochs=4, precision=how), streams()) for how in ("fp32", "bf16")}
    exact, rough = (curves[how]["cross_entropy"] for how in ("fp32", "bf16"))
    assert rough == pytest.approx(exact, rel=0.05)
    assert rough != exact


def test_a_training_within_an_autocast_is_refused(data: ImageSet) -> None:
    """An autocast keeps the weights that it has cast until the outermost one ends: a training would see old ones."""
    model = network()
    before = weights(model)
    with (
        pytest.raises(UserError, match=r"within torch.autocast .*; train outside"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        train(model, data, recipe(precision="bf16"), streams())
    assert torch.equal(weights(model), before)


def test_bf16_sees_the_weights_of_each_step(data: ImageSet) -> None:
    """Against a plain loop in which nothing of an earlier step can be left."""
    model, other, how = vit(), vit(), recipe(precision="bf16", epochs=1, lr=3e-2, warmup=0.0)
    train(model, data, how, streams(), arithmetic=Arithmetic("bf16", "fused"))
    optimiser = make_optimiser(other.train(), how)
    for step, rows in enumerate(torch.randperm(N, generator=streams().order).split(16)):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = functional.cross_entropy(other(data.images(rows)), data.labels[rows], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), how.clip)
        for group in optimiser.param_groups:
            group["lr"] = how.lr * warmup_cosine(step / 4, 0.0)
        optimiser.step()
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-4, atol=1e-6)


def test_a_compiled_training_comes_to_about_the_same(data: ImageSet) -> None:
    """The last batch of an epoch is smaller, and a watch looks at the model in between."""
    found = []
    for compiled in (False, True):
        with patch.object(torch, "compile", wraps=torch.compile) as compiling:
            curves = train(network(), data, recipe(), streams(), arithmetic=Arithmetic(compiled=compiled))
        assert compiling.call_count == compiled
        found.append(curves["cross_entropy"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_an_objective_of_its_own_is_not_compiled(data: ImageSet) -> None:
    with patch.object(torch, "compile", side_effect=AssertionError):
        train(vit(), data, recipe(), streams(), Objective(cross_entropy), arithmetic=Arithmetic(compiled=True))
