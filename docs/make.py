"""Make the parts of README and docs that no sweep makes: `python docs/make.py`; `--check` only compares.

The tables of attacks and defences quote the registry, the table and the picture of shifts what docs/studies/megatron.py
measured, those of speed and scale what `make bench` and `python -m benchmarks.cost` did. All other tables and figures
are made by `vitrap table` from the specs in specs/studies.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from matplotlib.figure import Figure

from vitrap import registry
from vitrap.contracts import Card
from vitrap.report.study.fill_page import fill

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for what is no part of the package

from benchmarks.cost import AT_MOST, GROWS_WITH, Study, operations, passes  # noqa: E402
from docs.studies import index  # noqa: E402

SHIFTS = ROOT / "results" / "shifts"
LIMITS = ROOT / "results" / "limits" / "pretrained.json"
RECIPES = ROOT / "results" / "choice" / "fine_tuning.json"
COLOURS = {"cross-entropy alone": "C0", "both losses": "C1", "clean label": "C2"}
"""What was trained, by its colour in the picture of shifts."""
GPU, USED = 989e12, 0.4
"""Operations a second of an H200 in dense bf16 (NVIDIA's data sheet), and the share of them that is assumed."""
VIT_B = {"forward": 35.13e9, "weights": 4 * 86.57e6, "pixels": 3 * 224**2}
"""ViT-B/16 at 224 px: a test counts its operations and weights."""
IMAGENET = {"train": 1_153_050, "test": 50_000, "clean": 42_706, "threshold": 42_706, "classes": 1000}
"""ImageNet-1k (1,281,167 + 50,000 images) as a run has it: a tenth held out, in three parts."""
STUDIES = (
    Study("fine-tuned, 10 epochs", n=IMAGENET, epochs=10, **VIT_B),
    Study("from scratch, 300 epochs", n=IMAGENET, epochs=300, **VIT_B),
)


def attacks() -> str:
    """The table of attacks."""
    rows = ["| attack | paper | attacker controls | labels |", "|---|---|---|---|"]
    for name in registry.names("attacks"):
        attack = registry.get("attacks", name)
        paper = paper_of(attack.card)
        for each in registry.variants(attack):
            setting = f", `setting={each.setting}`" if hasattr(each, "setting") else ""
            rows.append(f"| `{name}`{setting} | {paper} | {each.threat} | {each.labels} |")
    return "\n".join(rows)


def defences() -> str:
    """The table of defences."""
    rows = ["| defence | paper | kind | needs beside clean images |", "|---|---|---|---|"]
    for name in registry.names("defences"):
        kind = registry.get("defences", name)
        paper = paper_of(kind.card)
        for each in registry.variants(kind):
            setting = f", `setting={each.setting}`" if hasattr(each, "setting") else ""
            needs = {"training set": each.needs_train, "token attention": each.needs_attention}
            wanted = ", ".join(thing for thing, needed in needs.items() if needed)
            rows.append(f"| `{name}`{setting} | {paper} | {each.kind} | {wanted} |")
    return "\n".join(rows)


def paper_of(card: Card) -> str:
    """A paper's title, linked where it is on arXiv, with venue and year."""
    title = f"[{card.title}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.title
    return f"{title}, {card.venue} {card.year}"


def shifted(network: str) -> dict[str, list[dict[str, Any]]]:
    """ASR by direction and shift of each seed, by what was trained."""
    found = json.loads((SHIFTS / f"{network}.json").read_text(encoding="utf-8"))
    return {name: [seed["asr"] for seed in seeds] for name, seeds in found.items()}


def shifts(network: str) -> str:
    """ASR by shift and direction: mean and standard deviation over seeds, or one seed's with its interval."""
    body, places = [], []
    for name, seeds in shifted(network).items():
        for direction, places in seeds[0].items():
            body.append([name, direction, *(_over_seeds([seed[direction][px] for seed in seeds]) for px in places)])
    head = ["", "direction", *(f"{px} px" for px in places)]
    return _table(head, body)


def _over_seeds(rates: Sequence[Mapping[str, float]]) -> str:
    """A rate in %."""
    values = [100 * rate["value"] for rate in rates]
    if len(values) > 1:
        return f"{mean(values):.1f} ± {stdev(values):.1f}"
    return f"{values[0]:.1f} [{100 * rates[0]['low']:.1f}, {100 * rates[0]['high']:.1f}]"


def draw_shifts(path: Path) -> None:
    """A panel for each network that was measured: means over seeds and directions, with the range over directions."""
    titles = {
        "small": "GTSRB, 32 px, patches of 8 px, from scratch",
        "pretrained": "CIFAR-10, 98 px, patches of 14 px, pretrained",
    }
    measured = [network for network in titles if (SHIFTS / f"{network}.json").exists()]
    figure = Figure(figsize=(2 + 5 * len(measured), 3.8), layout="constrained", dpi=120)
    for axis, network in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
        _draw_shifts(axis, network, titles[network])
    figure.suptitle("MEGATRON's trigger off its place: mean and range of directions")
    figure.savefig(path, metadata={"Software": "vitrap"})


def _draw_shifts(axis: Any, network: str, title: str) -> None:
    for name, seeds in shifted(network).items():
        px = [int(p) for p in seeds[0]["right"]]
        each = {way: [mean(100 * s[way][str(p)]["value"] for s in seeds) for p in px] for way in seeds[0]}
        low, high = ([pick(values) for values in zip(*each.values(), strict=True)] for pick in (min, max))
        means = [mean(values) for values in zip(*each.values(), strict=True)]
        axis.plot(px, means, marker="o", ms=4, label=name, color=COLOURS[name])
        axis.fill_between(px, low, high, color=COLOURS[name], alpha=0.2)
    axis.set(xlabel="shift of the trigger at test, px", ylabel="ASR, %", ylim=(-3, 103))
    axis.set_title(title)
    axis.legend(fontsize=8)


def masks() -> str:
    """How the masks of two networks agree, as docs/studies/pretrained.py measured it."""
    found = json.loads(LIMITS.read_text(encoding="utf-8"))["agreement"]["and"]
    rows = [
        [name, *(_centre(measured[key]) for key in ("overlap", "rank correlation"))] for name, measured in found.items()
    ]
    return _table(["masks of", "pixels in both masks, of those in either", "rank correlation of the gradients"], rows)


def trigger_parts() -> str:
    """ASR where a part of the trigger fires, as docs/studies/pretrained.py measured it."""
    found = json.loads(LIMITS.read_text(encoding="utf-8"))["parts"]
    rows = [[name, *(_over_seeds([rates[role]]) for role in ("victim", "twin"))] for name, rates in found.items()]
    return _table(["at test time", "victim's ASR, %", "base rate, %"], rows)


def recipes() -> str:
    """CDA by recipe, with and without a moving average, as docs/studies/fine_tuning.py measured it."""
    found = json.loads(RECIPES.read_text(encoding="utf-8"))
    rows = [[name, *(_over_seeds([rates[each]]) for each in ("weights", "average"))] for name, rates in found.items()]
    return _table(["recipe", "CDA, %", "CDA of the moving average, %"], rows)


def _centre(measured: Mapping[str, float] | None) -> str:
    return "–" if measured is None else f"{measured['mean']:.2f} ± {measured['sd']:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def speed() -> str:
    """What `make bench` measured, part by part, each on the machine and under the load that it says."""
    found = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    rows, places = [], []
    for part, measured in found.items():
        about = measured["environment"]
        place = f"torch {about['torch']}, {about['threads']} threads of a {about['device']}"
        places += [] if place in places else [place]
        for figure in measured["figures"]:
            ratio, kept = figure["ratio"], {True: "yes", False: "**no**", None: ""}[figure["met"]]
            span = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            taken = f"{median(figure['seconds']['ours']):.3g} s" if "seconds" in figure else _gigabytes(figure["bytes"])
            kind = figure["kind"].partition(",")[0]
            rows.append([part, figure["name"], kind, span, str(ratio["n"]), taken, figure["wanted"] or "", kept,
                         f"{about['load_before']:.1f}"])  # fmt: skip
    head = ["part", "ours over plain", "of", "ratio", "n", "ours", "wanted", "kept", "load"]
    return f"Measured with {'; '.join(places)}.\n\n{_table(head, rows)}"


def _gigabytes(found: Mapping[str, Any]) -> str:
    return f"{median(found['ours']) / 1e9:.3g} GB"


def _records(name: str) -> list[dict[str, Any]]:
    lines = (ROOT / "results" / name / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _counted() -> dict[str, Any]:
    return json.loads((ROOT / "results" / "scale" / "digits.json").read_text(encoding="utf-8"))


def _study_model() -> Study:
    """The study model, with the sets of its records."""
    sizes = json.loads((ROOT / "results" / "scale" / "study.json").read_text(encoding="utf-8"))
    return Study("study model", epochs=12, pixels=3 * 32**2, attacks=4, defences=9, **sizes)


def run_cost() -> str:
    """Seconds, operations and bytes of a run of the study model."""
    runs, study = _records("defences"), _study_model()
    parts = {"victim": study.training, "twin": study.training, "measure": study.measuring}
    rows = []
    for part in ("victim", "twin", "poison", "measure"):
        took = [run["seconds"][part] for run in runs]
        work = f"{parts[part] / 1e12:.2f}" if part in parts else "–"
        rows.append([part, f"{median(took):.3g}", f"{min(took):.3g} to {max(took):.3g}", str(len(took)), work])
    lines = (ROOT / "results" / "defences" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    record = median(len(line.encode()) for line in lines)
    kept = f"On disk: {study.weights / 1e6:.2f} MB a model, and as much a trigger that holds a surrogate; " + (
        f"{record / 1e3:.1f} kB a record with its rows of defences, without indents, curves and memory."
    )
    return _table(["part", "seconds, median", "range", "n", "10¹² operations"], rows) + f"\n\n{kept}"


def cell_cost() -> str:
    """Forward passes and seconds of a cell, by defence, of those that were counted."""
    source, runs, n = _counted(), _records("defences"), _study_model().n
    rows = []
    for name, law in GROWS_WITH.items():
        rows_of = [row["seconds"] for run in runs for row in run["defences"] if row["name"] == name]
        took = [sum(s for part, s in each.items() if part != "retrain") for each in rows_of]
        law = {"": "nothing", "train": "training images", "clean": "clean images"}.get(law, law) + (
            " up to a bound" if name in AT_MOST else ""
        )
        seconds = f"{median(took):.3g}" if took else "not measured"
        rows.append([f"`{name}`", f"{passes(source, name, n):,.0f}", law, seconds, str(len(took))])
    return _table(["defence", "forward passes", "grows with", "seconds on the victim, median", "n"], rows)


def study_cost() -> str:
    """GPU-hours and bytes of the two studies on ImageNet."""
    rows, found = [], [operations(study, _counted()) for study in STUDIES]
    hours = [{part: work / (GPU * USED) / 3600 for part, work in each.items()} for each in found]
    for part in hours[0]:
        rows.append([f"{part}, GPU-hours", *(f"{each[part]:,.0f}" for each in hours)])
    rows.append(["together, GPU-hours", *(f"{sum(each.values()):,.0f}" for each in hours)])
    rows.append(["days on 8 GPUs", *(f"{sum(each.values()) / 8 / 24:,.1f}" for each in hours)])
    rows.append(["10¹⁸ operations", *(f"{sum(each.values()) / 1e18:,.0f}" for each in found)])
    filters = mean(each["kind"] == "filter" for each in _counted()["defences"].values())
    kept = [(s.trainings + s.victims * s.defences * filters) * s.weights for s in STUDIES]
    rows.append(["models on disk, GB", *(f"{each / 1e9:,.0f}" for each in kept)])
    pixels = [(s.n["train"] / 0.9 + s.n["test"]) * s.pixels for s in STUDIES]
    rows.append(["data on each node's disk, GB", *(f"{each / 1e9:,.0f}" for each in pixels)])
    stamped = [s.poison_rate * s.n["train"] * s.pixels for s in STUDIES]
    rows.append(["poisoned images in memory, GB a run", *(f"{each / 1e9:,.1f}" for each in stamped)])
    return _table(["", *(study.name for study in STUDIES)], rows)


PARTS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"attacks": attacks, "defences": defences},
    "docs/studies/README.md": {paper: partial(index.table, paper) for paper in ("ageb", "megatron")},
    "docs/studies/megatron.md": {"shifts": partial(shifts, "small")},
    "docs/studies/pretrained.md": {
        "recipes": recipes,
        "masks": masks,
        "parts": trigger_parts,
        "shifts": partial(shifts, "pretrained"),
    },
    "docs/speed.md": {"speed": speed},
    "docs/scale.md": {"run": run_cost, "cells": cell_cost, "studies": study_cost},
}


def main() -> int:
    """Make every part; exit status 1 where `--check` finds one outdated."""
    check, outdated = "--check" in sys.argv, []
    for page, parts in PARTS.items():
        path = ROOT / page
        old = new = path.read_text(encoding="utf-8")
        for name, make in parts.items():
            new = fill(new, name, make(), page)
        if new != old:
            outdated.append(page)
            if not check:
                path.write_text(new, encoding="utf-8")
    if not check:
        draw_shifts(ROOT / "docs" / "pictures" / "megatron_shifts.png")
    for page in outdated:
        sys.stdout.write(f"{page}: {'outdated, run python docs/make.py' if check else 'made'}\n")
    return 1 if outdated and check else 0


if __name__ == "__main__":
    sys.exit(main())
