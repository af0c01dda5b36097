"""The record of a run: what was asked, what was measured, and all it takes to judge it. See docs/record.md."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vitrap.errors import UserError
from vitrap.files import write_json

SCHEMA = 1
"""Raised when a name in the record changes its meaning."""
Table = dict[str, Any]


@dataclass(frozen=True)
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
        diagnosis: what is wrong with the attack by these figures, a line each; nothing where the backdoor is in, and
            in records of vitraps that did not say.
        attack: what the attack reports of itself.
        attack_version: of the attack; raised when it comes to mean something else.
        curves: loss terms by epoch, for each model that was trained.
        precision: of the matrix products.
        attention: "fused" or "eager"; "" in records of vitraps that did not say.
        compiled: whether training went through `torch.compile`.
        memory: peaks in bytes.
        seconds: time of each stage, when it was made.
        stages: key of each stage that the record rests on.
        defences: one row a defence and its settings.
    """

    schema: int
    name: str
    spec: Table
    hash: str
    seed: int
    environment: Table
    data: Table
    models: Table
    victim: Table
    diagnosis: list[str] = field(default_factory=list, kw_only=True)
    attack: Table
    attack_version: int = field(default=1, kw_only=True)
    curves: Table
    precision: str
    attention: Literal["fused", "eager", ""] = field(default="", kw_only=True)
    compiled: bool = field(default=False, kw_only=True)
    memory: Table
    seconds: Table
    stages: Table
    defences: list[Table] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write `record.json` into `folder`, whole or not at all."""
        write_json(folder / "record.json", asdict(self))


def read_record(folder: Path) -> Record:
    """The record in a run's folder.

    Raises:
        UserError: there is none, it is damaged, or a later vitrap wrote it.
    """
    path = folder / "record.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
        if schema <= SCHEMA:
            return Record(**content)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{str(folder)!r} holds no record.json; give the folder of a finished run") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"record {str(path)!r} is damaged ({error}); run its spec again with --force") from error
    raise UserError(f"record {str(path)!r} has schema {schema}, this vitrap reads up to {SCHEMA}; update vitrap")
