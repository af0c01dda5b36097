"""Reads published figures (`claims/*.toml`), and finds the runs that may be compared with each.

A claim and a run are never merged into one figure.
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitrap.experiment.record import BuiltNetwork, OwnNetwork, Record
from vitrap.metrics.values import Rate
from vitrap.report.page.summary import Run, text

FOLDER = Path(__file__).parents[1] / "claims"
SIZES = {"tiny": "t", "small": "s", "base": "b", "large": "l", "huge": "h"}
UNKNOWN = "not known here"


@dataclass(frozen=True)
class Claim:
    """A published figure; the header of claims/ageb.toml explains the keys."""

    measure: str
    value: float
    unit: str
    data: str
    model: str
    setting: str
    source: str
    where: str
    note: str


@dataclass(frozen=True)
class Paper:
    """A paper on an attack, and the figures that it published."""

    attack: str
    paper: str
    arxiv: str
    code: str
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class ComparableRun:
    """A run that may be compared with a claim: its rate and model, and in what it differs from the claim."""

    run: Run
    rate: Rate
    model: str
    unlike: str


def read_papers(folder: Path = FOLDER) -> tuple[Paper, ...]:
    """The papers of all files of claims, sorted by the file's name."""
    tables = [tomllib.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.toml"))]
    return tuple(
        Paper(t["attack"], t["paper"], t["arxiv"], t["code"], tuple(Claim(**claim) for claim in t["claim"]))
        for t in tables
    )


def comparable_runs(claim: Claim, attack: str, runs: Sequence[Run]) -> tuple[ComparableRun, ...]:
    """The runs of the same attack on the same data that have the claim's measure."""
    names = {normalised(part) for part in re.split("[,:]", claim.data)}
    return tuple(
        ComparableRun(run, rate, model_of(run.record), "; ".join(unlike(claim, run.record)))
        for run in runs
        if run.record.spec["attack"]["name"] == attack
        and normalised(run.data) in names
        and isinstance(rate := getattr(run.victim, claim.measure, None), Rate)
    )


def normalised(name: str) -> str:
    """The name of a data set or a model in lower case without punctuation, for comparison.

    >>> normalised("CIFAR-10"), normalised("ViT-b")
    ('cifar10', 'vitb')
    """
    return re.sub("[^a-z0-9]", "", name.lower())


def unlike(claim: Claim, record: Record) -> list[str]:
    """In what a run differs from a claim, or cannot be compared with it."""
    found = []
    if UNKNOWN in claim.model:
        found.append("the claim's model is not known")
    elif normalised(claim.model) != _class(record):
        found.append("model differs")
    setting = record.spec["attack"].get("setting")
    if isinstance(setting, str) and setting not in claim.setting:
        found.append(f"setting differs: {setting}")
    elif UNKNOWN in claim.setting:
        found.append("the claim's setting is not known")
    else:
        found.append("settings not compared further")
    if normalised(claim.data) != normalised(record.spec["data"]["name"]):
        found.append("which data the claim is for is not known")
    if limit := record.spec["data"].get("limit"):
        found.append(f"trained on {text(limit)} images")
    return found


def _class(record: Record) -> str:
    """The model's name as papers have it, such as "vitb"; "" where the model is changed or has no such name."""
    network = _network(record)
    if isinstance(network, OwnNetwork) or network.overrides:
        return ""
    family, _, size = network.name.partition("_")
    return family + SIZES.get(size.partition("_")[0], "?")


def _network(record: Record) -> BuiltNetwork | OwnNetwork:
    """The victim's network as it was built or, where an older record does not say, as the spec describes it."""
    built = record.models.get("victim")
    if built is not None:
        return built
    asked = record.spec.get("model", {})
    return BuiltNetwork(
        name=text(asked.get("name", "network not recorded")),
        size=0,
        n_classes=0,
        overrides={key: value for key, value in asked.items() if key not in ("name", "pretrained", "checkpoint")},
        pretrained=bool(asked.get("pretrained")),
        checkpoint=bool(asked.get("checkpoint")),
    )


def model_of(record: Record) -> str:
    """The victim's network in a line: name, overrides, where its weights started."""
    network = _network(record)
    if isinstance(network, OwnNetwork):
        return network.module
    changed = [f"{key} {text(value)}" for key, value in network.overrides.items()]
    pretrained = "pretrained" if network.pretrained else "from scratch"
    start = "from a checkpoint" if network.checkpoint else pretrained
    return ", ".join([network.name, *changed, start])
