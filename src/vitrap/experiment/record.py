"""The record of a run: what was asked, what was measured, and all it takes to judge it. See docs/record.md.

Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from vitrap.experiment.rows import OPTIONAL, Row
from vitrap.files import write_json
from vitrap.metrics.values import Count, Measures

SCHEMA = 1
"""Raised when a name in the record changes its meaning."""
Table = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What the run that wrote the record ran on: versions, and the machine, which abridged records leave out."""

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
    """

    n_train: Count
    n_test: Count
    n_poisoned: Count
    n_covers: Count = 0
    classes: Count
    fingerprint: str
    n_curves: dict[str, Count] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BuiltNetwork:
    """A timm network as it was built.

    Attributes:
        name: timm's.
        size: of the images, px.
        overrides: timm's arguments over those that the name stands for.
        pretrained: whether its weights started from the hub's.
        checkpoint: whether they were taken from a file that fits exactly.
        weights: of a network that starts from a file's weights, what was adapted; None otherwise.
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
    """A network given from outside, by the name of its class."""

    module: str


@dataclass(frozen=True)
class Memory:
    """Peaks since the run began, in bytes; None for a GPU where none is used."""

    host_peak_bytes: int
    device_peak_bytes: int | None


def _named(spec: Table) -> Table:
    """A spec's table, if it names its data and its attack and its parts are tables."""
    for key in ("data", "attack"):
        part = spec.get(key)
        if not isinstance(part, dict) or not isinstance(part.get("name"), str):
            raise ValueError(f"{key}.name is missing")
    for key in ("model", "surrogate", "test_surrogate", "recipe"):
        if not isinstance(spec.get(key, {}), dict):
            raise ValueError(f"{key} is no table")
    return spec


SpecTable = Annotated[Table, AfterValidator(_named)]
"""A spec as some vitrap wrote it; `parse_spec` reads it."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run. The fields are the keys of `record.json`, in its order.

    Attributes:
        schema: version of the format.
        name: the spec's name.
        spec: the whole spec, defaults filled in; what it leaves to the data stands under data and models.
        hash: hash of the spec without its name.
        seed: the spec's seed.
        environment: versions, device, cores.
        data: sizes, classes, content fingerprint.
        models: how victim and surrogate are built; the surrogate None where the attack has none.
        victim: CDA, ASR, RA, the clean twin's base rates, stealth.
        diagnosis: what is wrong with the attack by these figures, a line each; empty where the backdoor is in; None in
            records of vitraps that did not say.
        attack: what the attack reports of itself.
        attack_version: of the attack; raised when it comes to mean something else.
        curves: loss terms by epoch, for each model that was trained; none in an abridged record.
        precision: of the matrix products.
        attention: "fused" or "eager"; "" in records of vitraps that did not say.
        compiled: whether training went through `torch.compile`.
        memory: peaks; None in an abridged record.
        seconds: time of each stage, when it was made.
        stages: key of each stage that the record rests on; none in records of vitraps that did not say.
        defences: one row a defence and its settings.
        last: of an abridged record, where the victim's curves ended.
    """

    schema: int
    name: str
    spec: SpecTable
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
        write_json(folder / "record.json", to_table(self))


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a run of a sweep has no record, or no newer one.

    Attributes:
        error: in one line.
        traceback: its lines; with paths of the machine.
        seconds: until it failed.
        environment: versions.
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
    """A record or a part of one as JSON has it, without the optional fields that have their default."""
    if is_dataclass(thing) and not isinstance(thing, type):
        return {f.name: to_table(getattr(thing, f.name)) for f in fields(thing) if not _left_out(f, thing)}
    if isinstance(thing, Mapping):
        return {key: to_table(value) for key, value in thing.items()}
    return [to_table(value) for value in thing] if isinstance(thing, list | tuple) else thing


def _left_out(f: Any, thing: Any) -> bool:
    """Whether a field is optional and has its default."""
    default = f.default if f.default_factory is MISSING else f.default_factory()
    return "optional" in f.metadata and getattr(thing, f.name) == default
