"""Tables and pictures of docs/studies/megatron.md, from the records in results/; docs/make.py puts them there."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitrap.metrics.interval import Rate, difference

ROOT = Path(__file__).parents[1]
LOSSES = {
    "ce": "cross-entropy alone",
    "latent": "+ latent",
    "diffusion": "+ diffusion",
    "both": "+ both",
    "none": "random",
}
HEADLINES = ("gtsrb", "cifar10", "cifar100-12k", "tiny-imagenet-20")
Record = dict[str, Any]
Measure = Callable[[Record], float]


def rows(*parts: str) -> list[Record]:
    """The study's records of some parts; none before it was run."""
    path = ROOT / "results" / "megatron" / "records.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["part"] in parts]


def victim(key: str) -> Measure:
    """A rate of the record, in percent."""
    return lambda record: 100 * record["victim"][key]["value"]


def loss_of_cda(record: Record) -> float:
    """By how many points the victim's clean accuracy lies above its twin's."""
    return victim("cda")(record) - victim("cda_clean_model")(record)


def attention(record: Record, who: str = "victim") -> float:
    """The share of the last block's attention that D gets in the victim or the twin."""
    return list(record["attack"][who].values())[-1]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds, or the one value."""
    if not values:
        return "not run"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def interval(rate: Record) -> str:
    """A rate in percent with its interval."""
    return f"{100 * rate['value']:.2f} [{100 * rate['low']:.2f}, {100 * rate['high']:.2f}]"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Cells as Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def headlines() -> str:
    """The four data sets, with the difference of clean accuracies and its interval."""
    body = []
    for name in HEADLINES:
        record = json.loads((ROOT / "results" / f"megatron_{name}.json").read_text(encoding="utf-8"))
        v, a = record["victim"], record["attack"]
        apart = difference(Rate(**v["cda"]), Rate(**v["cda_clean_model"]))
        inside = [f"{list(a[who].values())[-1]:.2f}" for who in ("victim", "clean_model")]
        body.append([
            name, *(interval(v[key]) for key in ("asr", "asr_clean_model", "cda", "cda_clean_model")),
            f"{100 * apart[0]:.2f} [{100 * apart[1]:.2f}, {100 * apart[2]:.2f}]",
            f"{a['victim']['tokens in D']} / {a['victim']['tokens']}", " / ".join(inside),
        ])  # fmt: skip
    head = [
        "data",
        "ASR",
        "twin's ASR",
        "CDA",
        "twin's CDA",
        "CDA less twin's",
        "D / tokens",
        "attention in D: victim / twin",
    ]
    return table(head, body)


def pivot(part: str, measure: Measure, digits: int = 1, unit: str = "", losses: Sequence[str] = tuple(LOSSES)) -> str:
    """One measure by row and losses."""
    found = rows(part)
    shown = [name for name in losses if any(r["losses"] == name for r in found)]
    places = sorted({r["row"] for r in found}, key=float, reverse=True)
    body = []
    for place in places:
        cells = [[measure(r) for r in found if (r["row"], r["losses"]) == (place, name)] for name in shown]
        body.append([f"{place}{unit}", *(spread(cell, digits) for cell in cells)])
    return table([part if not unit else "", *(LOSSES[name] for name in shown)], body)


def long(*parts: str) -> str:
    """All measures, one row a setting."""
    found = rows(*parts)
    groups = sorted({(r["part"], r["row"], r["losses"]) for r in found}, key=order)
    body = []
    for key in groups:
        same = [r for r in found if (r["part"], r["row"], r["losses"]) == key]
        measures = ["asr", "asr_clean_model", "cda", "cda_clean_model"]
        cells = [
            interval(same[0]["victim"][m]) if len(same) == 1 else spread([victim(m)(r) for r in same]) for m in measures
        ]
        psnr = spread([r["victim"]["stealth"]["psnr_db"]["mean"] for r in same])
        name = key[1] if len(parts) == 1 else f"{key[0]} {key[1]}"
        inside = " / ".join(spread([attention(r, who) for r in same], 2) for who in ("victim", "clean_model"))
        body.append([name, LOSSES[key[2]], str(len(same)), *cells, psnr, inside])
    head = [
        "",
        "losses",
        "seeds",
        "ASR",
        "twin's ASR",
        "CDA",
        "twin's CDA",
        "PSNR, dB",
        "attention in D: victim / twin",
    ]
    return table(head, body)


def order(key: tuple[str, str, str]) -> tuple[str, float, str, str]:
    """Parts by name, rows by number where they are numbers."""
    part, row, losses = key
    number = float(row) if row.replace(".", "").isdigit() else 0.0
    return (part, -number, row, losses)


SHIFTED = {("rate", "ce"): "cross-entropy alone", ("rate", "both"): "both losses", ("clean", "both"): "clean label"}


def shifted() -> dict[str, list[Record]]:
    """ASR by direction and shift of each seed, by what was trained."""
    found = [r for r in rows("rate", "clean") if "shifts" in r]
    groups = {name: [r["shifts"] for r in found if (r["part"], r["losses"]) == key] for key, name in SHIFTED.items()}
    return {name: group for name, group in groups.items() if group}


def shifts() -> str:
    """ASR by shift and direction, means over seeds."""
    body, head = [], ["", "direction"]
    for name, seeds in shifted().items():
        for direction, rates in seeds[0].items():
            body.append([name, direction, *(spread([100 * s[direction][px]["value"] for s in seeds]) for px in rates)])
            head = ["", "direction", *(f"{px} px" for px in rates)]
    return table(head, body)


def draw(path: Path) -> None:
    """ASR by poison rate, and by shift at test."""
    figure = Figure(figsize=(10, 3.8), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    found = rows("rate")
    for name in ("ce", "latent", "diffusion", "both"):
        points = [(float(r["row"]), victim("asr")(r)) for r in found if r["losses"] == name]
        rates = sorted({x for x, _ in points})
        lines = left.plot(rates, [mean(y for x, y in points if x == rate) for rate in rates], label=LOSSES[name])
        left.plot(*zip(*points, strict=True), "o", ms=4, alpha=0.6, color=lines[0].get_color())
    left.set(xscale="log", xlabel="poison rate, % of the training set", ylabel="ASR, %", ylim=(-3, 103))
    left.set_xticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    left.minorticks_off()
    left.set_title("Each loss on and off: points are seeds, lines means", fontsize=11)
    left.legend(fontsize=8)
    draw_shifts(right)
    figure.savefig(path, metadata={"Software": "vitrap"})


def draw_shifts(axis: Axes) -> None:
    """Means over seeds and directions, with the range over directions."""
    for name, seeds in shifted().items():
        px = [int(p) for p in seeds[0]["right"]]
        each = {way: [mean(100 * s[way][str(p)]["value"] for s in seeds) for p in px] for way in seeds[0]}
        low, high = ([pick(values) for values in zip(*each.values(), strict=True)] for pick in (min, max))
        line = axis.plot(px, [mean(v) for v in zip(*each.values(), strict=True)], marker="o", ms=4, label=name)
        axis.fill_between(px, low, high, color=line[0].get_color(), alpha=0.2)
    axis.set(xlabel="shift of the trigger at test, px", ylabel="ASR, %", ylim=(-3, 103))
    axis.set_title("Trigger off its place: mean and range of directions", fontsize=11)
    axis.legend(fontsize=8)
