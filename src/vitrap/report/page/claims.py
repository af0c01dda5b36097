"""Figures as published, and the runs that may be set beside them. A claim and a run are never merged."""

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
    """A published figure; the keys stand in the header of ageb.toml."""

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
    """What is published of an attack."""

    attack: str
    paper: str
    arxiv: str
    code: str
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class Beside:
    """A run beside a claim: its model, and what is not the claim's."""

    run: Run
    rate: Rate
    model: str
    unlike: str


def read_papers(folder: Path = FOLDER) -> tuple[Paper, ...]:
    """Every file of claims, by the attack's name."""
    tables = [tomllib.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.toml"))]
    return tuple(
        Paper(t["attack"], t["paper"], t["arxiv"], t["code"], tuple(Claim(**claim) for claim in t["claim"]))
        for t in tables
    )


def beside(claim: Claim, attack: str, runs: Sequence[Run]) -> tuple[Beside, ...]:
    """Runs of the same attack on the same data that have the claim's measure."""
    names = {plain(part) for part in re.split("[,:]", claim.data)}
    return tuple(
        Beside(run, rate, model_of(run.record), "; ".join(unlike(claim, run.record)))
        for run in runs
        if run.record.spec["attack"]["name"] == attack
        and plain(run.data) in names
        and isinstance(rate := getattr(run.victim, claim.measure, None), Rate)
    )


def plain(name: str) -> str:
    """A name by which data sets and models are compared.

    >>> plain("CIFAR-10"), plain("ViT-b")
    ('cifar10', 'vitb')
    """
    return re.sub("[^a-z0-9]", "", name.lower())


def unlike(claim: Claim, record: Record) -> list[str]:
    """What of a run is not the claim's, or cannot be compared."""
    found = []
    if UNKNOWN in claim.model:
        found.append("the claim's model is not known")
    elif plain(claim.model) != _class(record):
        found.append("model differs")
    setting = record.spec["attack"].get("setting")
    if isinstance(setting, str) and setting not in claim.setting:
        found.append(f"setting differs: {setting}")
    elif UNKNOWN in claim.setting:
        found.append("the claim's setting is not known")
    else:
        found.append("settings not compared further")
    if plain(claim.data) != plain(record.spec["data"]["name"]):
        found.append("which data the claim is for is not known")
    if limit := record.spec["data"].get("limit"):
        found.append(f"trained on {text(limit)} images")
    return found


def _class(record: Record) -> str:
    """The model as a paper would call it, "" where it is changed or of no such name."""
    network = _network(record)
    if isinstance(network, OwnNetwork) or network.overrides:
        return ""
    family, _, size = network.name.partition("_")
    return family + SIZES.get(size.partition("_")[0], "?")


def _network(record: Record) -> BuiltNetwork | OwnNetwork:
    """The victim's network as it was built, or where the record has not kept that, as the spec asks for it."""
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
    """The victim's network in a line: name, what is changed of it, where its weights started."""
    network = _network(record)
    if isinstance(network, OwnNetwork):
        return network.module
    changed = [f"{key} {text(value)}" for key, value in network.overrides.items()]
    pretrained = "pretrained" if network.pretrained else "from scratch"
    start = "from a checkpoint" if network.checkpoint else pretrained
    return ", ".join([network.name, *changed, start])
