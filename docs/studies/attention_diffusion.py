"""How far the attention diffusion loss reaches, layer by layer: `python docs/studies/attention_diffusion.py`.

Small ViTs learn the embedded digits, then learn on with cross-entropy and L_beta of triggered images, one arm for each
map that the loss can see. Measured on the test set: mass in D, the page's bounds beside what they bound, and what
changes when everything outside D is swapped for another image. Writes results/theory/attention_diffusion.json, the
picture, and the tables of attention_diffusion.md. About 4 minutes on one core; `--tables` makes the last two alone.
"""

import copy
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor, nn

import vitrap
from vitrap.attacks.badnets import Patch
from vitrap.attacks.megatron import diffusion_loss
from vitrap.contracts import AllToOne, Batch, Criterion, Images, Objective
from vitrap.data.poison import choose_rows, poison_set
from vitrap.experiment.streams import ambient, stream, training_streams
from vitrap.models.attention import blocks_needed, token_attention
from vitrap.models.classifier import Architecture, open_model
from vitrap.models.observe import head_attention, observe, token_layout, transformer
from vitrap.train.loop import train
from vitrap.train.recipe import Recipe

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "results" / "theory" / "attention_diffusion.json"
PAGE = Path(__file__).with_suffix(".md")
SEEDS = (0, 1, 2)
TARGET, SIDE, PATCH, DEPTH, HEADS = 0, 16, 4, 4, 4
NETWORK = {"patch_size": PATCH, "depth": DEPTH, "embed_dim": 64, "num_heads": HEADS}
POOLED = {"class_token": False, "global_pool": "avg"}
FIRST, SECOND = Recipe(epochs=15, batch_size=64, lr=2e-3), Recipe(epochs=8, batch_size=64)
TRIGGER = Patch(size=2, margin=1, value=1.0)  # within the last token
RATE = 0.5  # of the training images carry it while the network learns on
SLACK = 1e-4  # of comparisons, for fp32


@dataclass(frozen=True)
class Arm:
    """One way to learn on: what L_beta sees; how head, labels of triggered images, and D are."""

    sees: Literal["nothing", "last", "rollout", "gradient", "every layer"]
    pooled: bool = False
    labels: Literal["dirty", "clean"] = "dirty"
    width: int = 1  # D is the square of so many tokens a side in the lower right corner

    @property
    def inside(self) -> Bool[Tensor, " n"]:
        """The image tokens in D."""
        last = torch.arange(SIDE // PATCH) >= SIDE // PATCH - self.width
        return (last[:, None] & last).flatten()


ARMS = {
    "nothing": Arm("nothing"),
    "last layer": Arm("last"),
    "rollout": Arm("rollout"),
    "gradient rollout": Arm("gradient"),
    "last layer, D of 4 tokens": Arm("last", width=2),
    "last layer, pooled": Arm("last", pooled=True),
    "nothing, true labels": Arm("nothing", labels="clean"),
    "last layer, true labels": Arm("last", labels="clean"),
    "every layer, true labels": Arm("every layer", labels="clean"),
}
SHOWN = ("nothing", "last layer", "rollout", "last layer, true labels", "every layer, true labels")


@dataclass(frozen=True)
class Seen:
    """A forward pass: logits, and of each layer the read tokens' mean row and the values, head by head."""

    logits: Float[Tensor, "b k"]
    rows: list[Float[Tensor, "b heads tokens"]]
    values: list[Float[Tensor, "b heads tokens dim"]]
    maps: Mapping[str, Float[Tensor, "b n"]]


def objective(arm: Arm) -> Objective:
    """Cross-entropy, and L_beta of the triggered images."""

    def terms(model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Float[Tensor, ""]]:
        layout, sees = token_layout(model), arm.sees
        with observe(model, blocks_needed("last" if sees in ("nothing", "last") else "rollout", DEPTH)) as maps:
            logits = model(batch.images)
        losses = {"cross_entropy": criterion(logits, batch.labels)}
        if sees == "nothing" or not len(batch.poison_at):
            return losses
        if sees == "every layer":
            found = [head_attention(layer, layout).flatten(1) for layer in maps.values()]
        else:
            found = [token_attention(maps, layout, sees, logits[:, TARGET].sum(), discard=0.9)]
        by_layer = [diffusion_loss(a[batch.poison_at], arm.inside) for a in found]
        return losses | {"diffusion": torch.stack(by_layer).sum()}

    return Objective(terms)


@torch.no_grad()
def look(model: nn.Module, images: Images) -> Seen:
    """All that is measured of a forward pass."""
    layout, joint = token_layout(model), []  # query, key and value of every head, layer by layer
    with ExitStack() as restore, observe(model, range(DEPTH)) as layers:
        for block in transformer(model).blocks:
            hook = block.attn.qkv.register_forward_hook(lambda module, args, output: joint.append(output))
            restore.callback(hook.remove)
        logits = model(images)
    rows = [layer[:, :, list(layout.head_tokens)].mean(2) for layer in layers.values()]
    values = [layer.unflatten(-1, (3, HEADS, -1))[:, :, 2].transpose(1, 2) for layer in joint]
    return Seen(logits, rows, values, {k: token_attention(layers, layout, k) for k in ("last", "rollout")})


@torch.no_grad()
def blind(model: nn.Module, images: Images) -> Float[Tensor, "b k"]:
    """The logits when what the last attention adds is its mean over all images."""
    attention = transformer(model).blocks[-1].attn
    hook = attention.register_forward_hook(lambda module, args, output: output.mean(0, keepdim=True).expand_as(output))
    try:
        return model(images)
    finally:
        hook.remove()


def layer_figures(seen: Seen, swapped: Seen, layer: int, inside: Bool[Tensor, " n"]) -> dict[str, float]:
    """The page's quantities at one layer, means over images and heads, and what the swap changes."""
    a, v, b, w = seen.rows[layer], seen.values[layer], swapped.rows[layer], swapped.values[layer]
    area = torch.cat([torch.zeros(a.shape[-1] - len(inside), dtype=torch.bool), inside])
    mass, others = a[..., area].sum(-1), b[..., area].sum(-1)
    excess = 1 - mass + a[..., -len(inside) :][..., ~inside].sum(-1)
    reach, reaches = (torch.cdist(x[:, :, area], x[:, :, ~area]).amax((-1, -2)) for x in (v, w))
    output, changed = (torch.einsum("bhj,bhjd->bhd", x, y) for x, y in ((a, v), (b, w)))
    own, now = (torch.einsum("bhj,bhjd->bhd", x[..., area], y[:, :, area]) for x, y in ((a, v), (b, w)))
    own, now = own / mass[..., None], now / others[..., None]
    apart, gap, moved = ((x - y).norm(dim=-1) for x, y in ((output, own), (output, changed), (own, now)))
    if_same = (1 - mass) * reach + (1 - others) * reaches
    assert (apart <= (1 - mass) * reach + SLACK).all(), "statement 2 does not hold"
    assert (gap <= if_same + moved + SLACK).all(), "statement 3 does not hold"
    found = {"mass": mass, "excess": excess, "leader": a[..., area].amax(-1) / mass, "apart": apart}
    found |= {"exact_bound": (1 - mass) * reach, "bound": excess * reach, "broken": (gap > if_same + SLACK).float()}
    sizes = {"change": gap.norm() / output.norm(), "change_in_d": moved.norm() / output.norm()}
    sizes["worst_head"] = excess.mean(0).max()
    return {key: figure.mean().item() for key, figure in (found | sizes).items()}


def measure(model: nn.Module, world: vitrap.World, arm: Arm) -> dict[str, Any]:
    """All figures of an arm on the test set; outside D an image is swapped for one of another digit."""
    images, labels, inside = world.test.images(torch.arange(len(world.test))), world.test.labels, arm.inside
    order = labels.argsort(stable=True)
    partner = torch.empty_like(order).scatter(0, order, order.roll(len(order) // 2))
    assert (labels[partner] != labels).all(), "an image's partner shows the same digit"
    triggered, edge = TRIGGER(images), SIDE - PATCH * arm.width
    mixed = images[partner].clone()
    mixed[..., edge:, edge:] = triggered[..., edge:, edge:]
    seen, swapped = look(model, triggered), look(model, mixed)
    logits, others = (x.logits - x.logits.mean(1, keepdim=True) for x in (seen, swapped))
    counts = labels != TARGET
    answers = {
        "accuracy": look(model, images).logits.argmax(1) == labels,
        "to_target": logits[counts].argmax(1) == TARGET,
        "true": logits.argmax(1) == labels,
        "true_blind": blind(model, triggered).argmax(1) == labels,
        "follows": others.argmax(1) == labels[partner],
    }
    network = {key: 100 * answer.float().mean().item() for key, answer in answers.items()}
    network["change"] = ((logits - others).norm() / logits.norm()).item()
    for through, attention in seen.maps.items():
        network[f"excess_{through}"] = (diffusion_loss(attention, inside) - inside.sum() + 1).item()
    return {"network": network, "layers": [layer_figures(seen, swapped, i, inside) for i in range(DEPTH)]}


def one_seed(world: vitrap.World, seed: int) -> dict[str, Any]:
    """Train a network with a class token and one that pools, then every arm from there."""
    bases, found, goal = {}, {}, AllToOne(TARGET)
    for pooled in (False, True):
        overrides = {**NETWORK, **(POOLED if pooled else {})}
        with ambient(seed, "weights"):
            bases[pooled] = open_model(Architecture("vit_tiny_patch16_224", SIDE, world.train.n_classes, overrides))
        train(bases[pooled], world.train, FIRST, training_streams(seed, world.train.device))
    rows = choose_rows(world.train.labels, RATE, goal, "dirty", stream(seed, "poison"))
    for name, arm in ARMS.items():
        model = copy.deepcopy(bases[arm.pooled])
        poisoned = poison_set(world.train, rows, TRIGGER, goal, arm.labels)
        curves = train(model, poisoned, SECOND, training_streams(seed, world.train.device), objective(arm))
        found[name] = measure(model, world, arm)
        if "diffusion" in curves:
            mean = curves["diffusion"][-1] / (DEPTH if arm.sees == "every layer" else 1)
            found[name]["network"]["excess_seen"] = mean - arm.width**2 + 1
    return found


def spread(values: Sequence[Any]) -> Any:
    """The tree that each of `values` is, with mean, standard deviation and the values at its leaves."""
    if isinstance(values[0], Mapping):
        return {key: spread([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], list):
        return [spread(entries) for entries in zip(*values, strict=True)]
    mean, deviation, *each = (float(f"{x:.4g}") for x in (statistics.mean(values), statistics.stdev(values), *values))
    return {"mean": mean, "sd": deviation, "values": each}


def table(head: Sequence[str], rows: Sequence[tuple[str, Mapping[str, Any]]], digits: Mapping[str, int]) -> str:
    """Mean and standard deviation of the figures that `digits` names, in markdown."""
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for name, figures in rows:
        shown = ((figures.get(key), n) for key, n in digits.items())
        lines.append(" | ".join([name, *(f"{f['mean']:.{n}f} ± {f['sd']:.{n}f}" if f else "" for f, n in shown)]))
    return "\n".join(f"| {line} |" for line in lines)


def page(found: Mapping[str, Any], text: str) -> str:
    """The page with both tables made anew."""
    arms = found["arms"]
    digits = {"mass": 3, "excess": 3, "worst_head": 3, "apart": 3, "exact_bound": 3, "bound": 3}
    digits |= {"change": 2, "change_in_d": 2, "broken": 2}
    head = ["$L_\\beta$ sees, layer", "$m_D$", "$\\varepsilon$", "worst head", "$\\lVert o-o_D\\rVert$", "$(1-m_D)R$"]
    head += ["$\\varepsilon R$", "change of $o$", "of $o_D$", "(3) broken"]
    rows = [(f"{name}, {i}", layer) for name in SHOWN for i, layer in enumerate(arms[name]["layers"], 1)]
    made = {"layers": table(head, rows, digits)}
    digits = {"excess_seen": 2, "excess_last": 2, "excess_rollout": 2, "accuracy": 1, "to_target": 1}
    digits |= {"true": 1, "true_blind": 1, "follows": 1, "change": 2}
    head = ["$L_\\beta$ sees", "$\\varepsilon$ of that", "last layer", "rollout", "clean", "target", "own", "blind"]
    rows = [(name, arm["network"]) for name, arm in arms.items()]
    made["networks"] = table([*head, "swapped", "change"], rows, digits)
    for name, part in made.items():
        text, count = re.subn(rf"(?s)(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", lambda _, p=part: f"{p}\n", text)
        assert count == 1, f"the part {name!r} has no marks"
    return text


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Mass in D, bound and measure, and the change under the swap, by layer."""
    figure, depth = Figure(figsize=(11, 4), layout="constrained", dpi=120), range(1, DEPTH + 1)
    left, middle, right = axes = figure.subplots(1, 3)
    for axis, key in ((left, "mass"), (right, "change")):
        for name, marker in zip(SHOWN, "osD^v", strict=True):
            means, deviations = ([x[key][k] for x in found["arms"][name]["layers"]] for k in ("mean", "sd"))
            axis.errorbar(depth, means, deviations, marker=marker, capsize=2, label=name)
    for key, style, label in (
        ("bound", ":", "ε R"),
        ("exact_bound", "--", "(1 - m_D) R"),
        ("apart", "-o", "‖o - o_D‖"),
    ):
        middle.semilogy(
            depth, [x[key]["mean"] for x in found["arms"]["last layer"]["layers"]], f"k{style}", label=label
        )
    left.set(ylabel="attention to D, mean over heads", title="Mass in D", ylim=(0, 1.03))
    middle.set(ylabel="distance of value vectors", title="Statement 2; L_β sees the last layer")
    right.set(ylabel="change of a head's output / its size", title="Everything outside D swapped", ylim=(0, None))
    middle.legend(fontsize=8)
    for axis in axes:
        axis.set(xlabel="layer", xticks=depth)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(SHOWN), title="L_β sees")
    figure.savefig(path, metadata={"Software": "vitrap"})


def main() -> None:
    """Measure, unless only tables and picture are wanted; write."""
    if "--tables" not in sys.argv:
        torch.set_num_threads(1)
        world = vitrap.open_data("digits")
        setting = {"images": len(world.test), "seeds": SEEDS, "network": NETWORK, "rate": RATE}
        setting |= {"first": asdict(FIRST), "second": asdict(SECOND)}
        found = {"setting": setting, "arms": spread([one_seed(world, seed) for seed in SEEDS])}
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    draw(found, ROOT / "docs" / "pictures" / "attention_diffusion.png")
    PAGE.write_text(page(found, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
