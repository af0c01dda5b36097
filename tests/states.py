"""The states that trainings keep, as tests look for them, and a mark that shows which of them was gone on from."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vitrap.experiment.store import STATE

OFTEN = {"VITRAP_STATE_SECONDS": "0.000001"}
"""For a process's environment: a state as often as its share of the time allows."""


def states(out: Path, kind: str = "*") -> list[Path]:
    """The states below a folder of runs."""
    return sorted(out.glob(f"stages/.{kind}-*-draft/{STATE}"))


def mark(state: Path) -> None:
    """Put a curve of its own into a state: who goes on from it has that curve in the end."""
    with safe_open(state, "pt") as file:
        about: dict[str, Any] = file.metadata()
    facts = json.loads(about["state"])
    facts["curves"]["mark"] = [7.0]
    save_file(load_file(state), state, {**about, "state": json.dumps(facts)})


def marked(out: Path) -> list[str]:
    """The stages that came of a marked state."""
    found = {file.parent.name: json.loads(file.read_text()) for file in out.glob("stages/*/facts.json")}
    return [name for name, facts in found.items() if "mark" in facts.get("curves", {})]
