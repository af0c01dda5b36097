"""vitrap: a test bench for backdoors in vision transformers.

Public names load when first asked for, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrap import attacks as attacks
    from vitrap import defences as defences
    from vitrap import tensors as tensors
    from vitrap.contracts import ImageSet as ImageSet
    from vitrap.contracts import Suspect as Suspect
    from vitrap.data.sources import World as World
    from vitrap.data.sources import open_data as open_data
    from vitrap.errors import UserError as UserError
    from vitrap.experiment.defend import defend as defend
    from vitrap.experiment.export import poison as poison
    from vitrap.experiment.opened_run import open_run as open_run
    from vitrap.experiment.record import Record as Record
    from vitrap.experiment.run import run as run
    from vitrap.experiment.scores import read_scores as read_scores
    from vitrap.experiment.spec import Spec as Spec
    from vitrap.experiment.spec import load_defence as load_defence
    from vitrap.experiment.spec import load_spec as load_spec
    from vitrap.report.frame import load_records as load_records
    from vitrap.sweeps.grid import load_sweep as load_sweep
    from vitrap.sweeps.sweep import sweep as sweep

__version__ = "0.1.0"

_HOMES = {
    "ImageSet": "vitrap.contracts",
    "Record": "vitrap.experiment.record",
    "Spec": "vitrap.experiment.spec",
    "Suspect": "vitrap.contracts",
    "UserError": "vitrap.errors",
    "World": "vitrap.data.sources",
    "defend": "vitrap.experiment.defend",
    "load_defence": "vitrap.experiment.spec",
    "load_records": "vitrap.report.frame",
    "load_spec": "vitrap.experiment.spec",
    "load_sweep": "vitrap.sweeps.grid",
    "open_data": "vitrap.data.sources",
    "open_run": "vitrap.experiment.opened_run",
    "poison": "vitrap.experiment.export",
    "read_scores": "vitrap.experiment.scores",
    "run": "vitrap.experiment.run",
    "sweep": "vitrap.sweeps.sweep",
}
_ROOMS = ("attacks", "defences", "tensors")

__all__ = [
    "ImageSet",
    "Record",
    "Spec",
    "Suspect",
    "UserError",
    "World",
    "attacks",
    "defences",
    "defend",
    "load_defence",
    "load_records",
    "load_spec",
    "load_sweep",
    "open_data",
    "open_run",
    "poison",
    "read_scores",
    "run",
    "sweep",
    "tensors",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return import_module(f"vitrap.{name}")
    raise AttributeError(f"module 'vitrap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
