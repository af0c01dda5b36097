"""`facts.json` of a stage: what is known of a fitted trigger, a trained model or a defended twin beside its weights."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vitrap.errors import UserError
from vitrap.experiment.record import to_table
from vitrap.files import read_bytes, write_json
from vitrap.formats import Table, adapter

FACTS = "facts.json"
Facts = TypeVar("Facts")


@dataclass(frozen=True)
class TriggerFacts:
    """Of a trigger's stage.

    Attributes:
        report: what the attack says of its `fit`.
        seconds: how long `fit` took.
    """

    report: Table
    seconds: float


@dataclass(frozen=True)
class ModelFacts:
    """Of the stage of a trained model; of a model trained on clean images, what concerns poison is 0 or empty.

    Attributes:
        seconds: how long its training took, and the edit of its weights.
        curves: values after each epoch, by name; each list has as many as there were epochs.
        n_curves: how many images CDA and ASR are measured on in these curves.
        poison_seconds: how long it took to poison the training set.
        n_poisoned: number of poisoned training images.
        n_covers: number of training images that carry a trigger and keep their label.
        report: what the attack says of its `fit` and of its edit.
    """

    seconds: float
    curves: dict[str, list[float]]
    n_curves: dict[str, int] = field(default_factory=dict[str, int])
    poison_seconds: float = 0.0
    n_poisoned: int = 0
    n_covers: int = 0
    report: Table = field(default_factory=dict[str, Any])


def write_facts(folder: Path, facts: Any) -> None:
    """Write the facts of a stage, a dataclass, into its folder."""
    write_json(folder / FACTS, to_table(facts))


def read_facts(folder: Path, kind: type[Facts]) -> Facts:
    """The facts of a stage, as `write_facts` wrote them.

    Args:
        folder: the stage's folder.
        kind: the dataclass that was written.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return adapter(kind).validate_json(read_bytes(folder / FACTS), strict=True)
    except (OSError, ValidationError) as error:
        raise UserError(f"stage {str(folder)!r} is damaged; remove its folder, and it is made anew") from error
