"""Figures as published, and the runs that may be set beside them. A claim and a run are never merged."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrap.report.page.summary import Run, attempt, text

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
    rate: Mapping[str, Any]
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
        Beside(run, run.victim[claim.measure], model_of(run.record), "; ".join(unlike(claim, run.record)))
        for run in runs
        if run.record["spec"]["attack"]["name"] == attack
        and plain(run.data) in names
        and isinstance(run.victim.get(claim.measure), Mapping)
    )


def plain(name: str) -> str:
    """A name by which data sets and models are compared.

    >>> plain("CIFAR-10"), plain("ViT-b")
    ('cifar10', 'vitb')
    """
    return re.sub("[^a-z0-9]", "", name.lower())


def unlike(claim: Claim, record: Mapping[str, Any]) -> list[str]:
    """What of a run is not the claim's, or cannot be compared."""
    found = []
    if UNKNOWN in claim.model:
        found.append("the claim's model is not known")
    elif plain(claim.model) != _class(record):
        found.append("model differs")
    setting = record["spec"]["attack"].get("setting")
    if isinstance(setting, str) and setting not in claim.setting:
        found.append(f"setting differs: {setting}")
    elif UNKNOWN in claim.setting:
        found.append("the claim's setting is not known")
    else:
        found.append("settings not compared further")
    if plain(claim.data) != plain(text(record["spec"]["data"]["name"])):
        found.append("which data the claim is for is not known")
    if record["spec"]["data"].get("limit"):
        found.append(f"trained on {text(record['spec']['data']['limit'])} images")
    return found


def _class(record: Mapping[str, Any]) -> str:
    """The model as a paper would call it, "" where it is changed or of no such name."""
    network = _network(record)
    family, _, size = text(network.get("name", "")).partition("_")
    return "" if network.get("overrides") else family + SIZES.get(size.partition("_")[0], "?")


def _network(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The victim's network as it was built, or where the record has not kept that, as the spec asks for it."""
    built = attempt(lambda: record["models"]["victim"])
    asked = record["spec"].get("model")
    if isinstance(built, Mapping) and built:
        return built
    asked = asked if isinstance(asked, Mapping) else {}
    plain_keys = ("name", "pretrained", "checkpoint")
    return {key: asked[key] for key in plain_keys if key in asked} | {
        "overrides": {key: value for key, value in asked.items() if key not in plain_keys}
    }


def model_of(record: Mapping[str, Any]) -> str:
    """The victim's network in a line: name, what is changed of it, where its weights started."""
    network = _network(record)
    if "module" in network:
        return text(network["module"])
    changed = network.get("overrides")
    parts = [f"{key} {text(value)}" for key, value in changed.items()] if isinstance(changed, Mapping) else []
    if network.get("checkpoint"):
        parts.append("from a checkpoint")
    elif "pretrained" in network:
        parts.append("pretrained" if network["pretrained"] else "from scratch")
    return ", ".join([text(network.get("name", "network not recorded")), *parts])
