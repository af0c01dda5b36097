"""The classes of `record.json`: what a run was asked to do, what was measured, and on which machine.

Rows of defences are in defence_rows.py; records.py reads the files. docs/record.md explains the keys. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from vitrap.experiment.defence_rows import OPTIONAL, Row
from vitrap.files import write_json
from vitrap.formats import Table
from vitrap.metrics.values import Count, Measures

RECORD = "record.json"
"""File in a run's folder that holds its record."""
SCHEMA = 1
"""Version of the format; raised when a key of the record changes its meaning."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Library versions and machine of the run that wrote the record; abridged records leave the machine out."""

    python: str = field(default="", metadata=OPTIONAL)
    system: str = field(default="", metadata=OPTIONAL)
    device: str = field(default="", metadata=OPTIONAL)
    device_kind: str = field(default="", metadata=OPTIONAL)
    cores: int = field(default=0, metadata=OPTIONAL)
    threads: int = field(default=0, metadata=OPTIONAL)
    vitrap: str = field(default="", metadata=OPTIONAL)
    torch: str
    timm: str
    torchvision: str = field(default="", metadata=OPTIONAL)
    torchmetrics: str = field(default="", metadata=OPTIONAL)
    numpy: str = field(default="", metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images: how many, of how many classes, and a digest of the data set's content.

    Attributes:
        n_poisoned: training images that are stored as poison.
        n_covers: training images that carry a trigger and keep their label.
        n_curves: held-out images that the curves of CDA and ASR count.
        passed_over: how many files of an image folder are no images, and the first of them; "" where there is none.
    """

    n_train: Count
    n_test: Count
    n_poisoned: Count
    n_covers: Count = 0
    classes: Count
    fingerprint: str
    n_curves: dict[str, Count] = field(default_factory=dict)
    passed_over: str = field(default="", metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class BuiltNetwork:
    """A timm network as it was built.

    Attributes:
        name: timm's.
        size: side of its images, px.
        overrides: timm arguments that replace those of the name.
        pretrained: whether its weights started from the hub's.
        checkpoint: whether its weights were read from a file that fits exactly.
        weights: where its weights started from a file that was adapted, what was adapted; None otherwise.
        linear_probe: whether its head alone was trained.
    """

    name: str
    size: int
    n_classes: int
    overrides: Table
    pretrained: bool
    checkpoint: bool
    weights: str | None = None
    linear_probe: bool = field(default=False, metadata=OPTIONAL)


@dataclass(frozen=True)
class OwnNetwork:
    """A network that the caller gave, by the name of its class."""

    module: str


@dataclass(frozen=True)
class Memory:
    """Peak memory of the run in bytes; None for the GPU where none is used."""

    host_peak_bytes: int
    device_peak_bytes: int | None


def _named(spec: Table) -> Table:
    """The table of a spec, if it names its data and its attack and its parts are tables.

    Raises:
        ValueError: it does not.
    """
    for key in ("data", "attack"):
        part = spec.get(key)
        if not isinstance(part, dict) or not isinstance(part.get("name"), str):
            raise ValueError(f"{key}.name is missing")
    for key in ("model", "surrogate", "test_surrogate", "recipe"):
        if not isinstance(spec.get(key, {}), dict):
            raise ValueError(f"{key} is no table")
    return spec


SpecTable = Annotated[Table, AfterValidator(_named)]
"""A spec as some version of vitrap wrote it; `parse_spec` reads it."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run. The fields are the keys of `record.json`, in its order.

    Attributes:
        schema: version of the format.
        name: the spec's name.
        spec: the whole spec, defaults filled in; sizes that the data decide are in `data` and `models`.
        hash: hash of the spec without its name.
        seed: the spec's seed.
        environment: versions, device, cores.
        data: sizes, classes, content fingerprint.
        models: how victim and surrogates are built; the surrogate is None where the attack has none.
        victim: CDA, ASR, RA, base rates, stealth.
        contents: SHA-256 of each file or folder that the spec names by a path, by dotted key.
        diagnosis: what is wrong with the attack by these figures, one line for each fault; empty where the backdoor
            works; None in older records.
        attack: numbers that the attack reports.
        attack_version: version of the attack; raised when its results change.
        curves: loss terms and rates by epoch, for each model that was trained; empty in an abridged record.
        precision: of the matrix products.
        attention: "fused" or "eager"; "" in older records.
        compiled: whether training went through `torch.compile`.
        memory: peak memory; None in an abridged record.
        seconds: how long each stage took when it was made.
        stages: key of each stage that the record rests on; empty in older records.
        defences: one row for each defence and its settings.
        last: in an abridged record, the last values of the victim's curves.
    """

    schema: int
    name: str
    spec: SpecTable
    contents: dict[str, str] = field(default_factory=dict, metadata=OPTIONAL)
    hash: str
    seed: int
    environment: Environment
    data: Data
    models: dict[str, BuiltNetwork | OwnNetwork | None] = field(default_factory=dict, metadata=OPTIONAL)
    victim: Measures
    diagnosis: tuple[str, ...] | None = field(default=None, metadata=OPTIONAL)
    attack: Table = field(default_factory=dict)
    attack_version: int = 1
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict, metadata=OPTIONAL)
    precision: str
    attention: Literal["fused", "eager", ""] = ""
    compiled: bool = False
    memory: Memory | None = field(default=None, metadata=OPTIONAL)
    seconds: dict[str, float]
    stages: dict[str, str] = field(default_factory=dict, metadata=OPTIONAL)
    defences: tuple[Row, ...] = ()
    last: dict[str, float] = field(default_factory=dict, metadata=OPTIONAL)

    def write(self, folder: Path) -> None:
        """Write `record.json` into `folder`, whole or not at all."""
        write_json(folder / RECORD, to_table(self))


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The content of `failure.json`: why a run of a sweep has no record, or no newer one.

    Attributes:
        error: the error in one line.
        traceback: lines of the traceback, which have paths of the machine.
        seconds: how long the run took until it failed.
        environment: versions of libraries.
    """

    schema: int
    name: str
    hash: str
    seed: int
    spec: SpecTable
    error: str
    traceback: tuple[str, ...] = ()
    seconds: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)


def to_table(thing: Any) -> Any:
    """A record, or a part of one, as JSON can write it, without the optional fields that have their default."""
    if is_dataclass(thing) and not isinstance(thing, type):
        return {f.name: to_table(getattr(thing, f.name)) for f in fields(thing) if not _left_out(f, thing)}
    if isinstance(thing, Mapping):
        return {key: to_table(value) for key, value in thing.items()}
    return [to_table(value) for value in thing] if isinstance(thing, list | tuple) else thing


def _left_out(f: Any, thing: Any) -> bool:
    """Whether a field is optional and has its default."""
    default = f.default if f.default_factory is MISSING else f.default_factory()
    return "optional" in f.metadata and getattr(thing, f.name) == default
