"""Make the parts of README and docs that no sweep makes: `python docs/make.py`; `--check` only compares.

The tables of attacks and defences quote the registry, the table and the picture of shifts what docs/studies/megatron.py
measured. All other tables and figures are made by `vitrap table` from the specs in specs/studies.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from vitrap import registry
from vitrap.report.study.make import fill

ROOT = Path(__file__).parents[1]


def attacks() -> str:
    """The table of attacks."""
    rows = ["| attack | paper | attacker controls | labels |", "|---|---|---|---|"]
    for name in registry.names("attacks"):
        attack = registry.get("attacks", name)
        card = attack.card
        paper = f"[{card.title}](https://arxiv.org/abs/{card.arxiv}), {card.venue} {card.year}"
        for each in registry.settings(attack):
            setting = f", `setting={each.setting}`" if hasattr(each, "setting") else ""
            rows.append(f"| `{name}`{setting} | {paper} | {each.threat} | {each.labels} |")
    return "\n".join(rows)


def defences() -> str:
    """The table of defences."""
    rows = ["| defence | paper | kind | needs beside clean images |", "|---|---|---|---|"]
    for name in registry.names("defences"):
        kind = registry.get("defences", name)
        card = kind.card
        paper = f"[{card.title}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.title
        needs = {"training set": kind.needs_train, "token attention": kind.needs_attention}
        wanted = ", ".join(thing for thing, needed in needs.items() if needed)
        rows.append(f"| `{name}` | {paper}, {card.venue} {card.year} | {kind.kind} | {wanted} |")
    return "\n".join(rows)


def shifted() -> dict[str, list[dict[str, Any]]]:
    """ASR by direction and shift of each seed, by what was trained."""
    found = json.loads((ROOT / "results" / "shifts" / "megatron.json").read_text(encoding="utf-8"))
    return {name: [seed["asr"] for seed in seeds] for name, seeds in found.items()}


def shifts() -> str:
    """ASR by shift and direction, mean and standard deviation over seeds."""
    body, places = [], []
    for name, seeds in shifted().items():
        for direction, places in seeds[0].items():
            rates = [[100 * seed[direction][px]["value"] for seed in seeds] for px in places]
            body.append([name, direction, *(f"{mean(values):.1f} ± {stdev(values):.1f}" for values in rates)])
    head = ["", "direction", *(f"{px} px" for px in places)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


def draw_shifts(path: Path) -> None:
    """Means over seeds and directions, with the range over directions."""
    figure = Figure(figsize=(7, 3.8), layout="constrained", dpi=120)
    axis = figure.subplots()
    for name, seeds in shifted().items():
        px = [int(p) for p in seeds[0]["right"]]
        each = {way: [mean(100 * s[way][str(p)]["value"] for s in seeds) for p in px] for way in seeds[0]}
        low, high = ([pick(values) for values in zip(*each.values(), strict=True)] for pick in (min, max))
        line = axis.plot(px, [mean(v) for v in zip(*each.values(), strict=True)], marker="o", ms=4, label=name)
        axis.fill_between(px, low, high, color=line[0].get_color(), alpha=0.2)
    axis.set(xlabel="shift of the trigger at test, px", ylabel="ASR, %", ylim=(-3, 103))
    axis.set_title("Trigger off its place: mean and range of directions")
    axis.legend(fontsize=8)
    figure.savefig(path, metadata={"Software": "vitrap"})


PARTS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"attacks": attacks, "defences": defences},
    "docs/studies/megatron.md": {"shifts": shifts},
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
