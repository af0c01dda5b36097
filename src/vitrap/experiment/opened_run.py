"""`open_run`: loads a finished run, its victim, its trigger and its record, to try them out."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import nn

from vitrap.contracts import Trigger
from vitrap.experiment.checksums import MODEL, check_run
from vitrap.experiment.record import Record
from vitrap.experiment.records import read_record
from vitrap.experiment.spec import parse_spec
from vitrap.experiment.trigger_file import TRIGGER, read_trigger, try_out
from vitrap.models.classifier import Classifier, load_weights, read_model
from vitrap.probe import check_type


@dataclass(frozen=True)
class OpenedRun:
    """A finished run as a user loads it from its folder, to try the victim and its trigger.

    Attributes:
        model: the victim, in evaluation mode.
        trigger: fires on images at test time.
        record: what was measured.
    """

    model: nn.Module
    trigger: Trigger
    record: Record


def open_run(
    folder: str | Path, *, model: nn.Module | None = None, networks: Mapping[str, nn.Module] | None = None
) -> OpenedRun:
    """Load a finished run: its model, its trigger and its record.

    Args:
        folder: the run's folder.
        model: your own network, if the victim was one; it gets the victim's weights.
        networks: your own networks, if the trigger holds any, by field name.

    Raises:
        UserError: the folder holds no finished run, or a file of it is missing or damaged.
    """
    folder = Path(folder)
    record = read_record(folder)
    check_run(folder)
    if model is None:
        model = read_model(folder / MODEL)
    else:
        check_type(model, nn.Module, "model")
        load_weights(model, folder / MODEL)
    place = folder / TRIGGER
    trigger = read_trigger(place, parse_spec(record.spec).attack, networks)
    if isinstance(model, Classifier):
        shape = (1, len(model.mean), model.architecture.size, model.architecture.size)
        try_out(trigger, torch.linspace(0, 1, prod(shape)).view(shape), place)
    return OpenedRun(model.eval(), trigger, record)
