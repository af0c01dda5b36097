"""Reads specs: TOML files that say what to run, checked strictly before anything starts.

`load_spec` reads a file and overrides, and `Spec` is the result. This module imports no torch, so that a broken spec is
refused at once.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vitrap import registry
from vitrap.errors import UserError, shown, unknown
from vitrap.experiment.defence_spec import DefenceSpec
from vitrap.experiment.spec_file import DEFAULT_NAMES, FOLDERS, NETWORKS, leaves, parse_override, read_table, set_keys
from vitrap.experiment.spec_paths import SpecPath, folders_of, located, set_leaf
from vitrap.formats import Table, adapter, check_plain
from vitrap.params import hyperparameters, param
from vitrap.train.recipe import Recipe, recipe_for

DEFAULT = Path(__file__).with_name("default.toml")
LONGEST_NAME = 100
"""Letters that the name of a run may have."""
MOST_BYTES = 2 * LONGEST_NAME
"""Bytes that the name of a run may have: folders, locks and drafts are named after it and may have 255."""
FEWEST_SCREENED = 10
"""Least number of images of each kind that a screen scores; a threshold from fewer scores means nothing."""
LARGEST_OVERRIDE = 10_000
"""Greatest whole number among timm's arguments: a depth or width beyond it takes time or memory without end."""
MOST_SCREENED = 10**9
"""Greatest number of images of each kind that a screen scores: of all, where there are fewer."""
LONGEST_FILE_NAME = 255
"""Greatest length of a file's name, in bytes."""
LONGEST_PATH = 4000
"""Greatest length of a path, in bytes."""


@hyperparameters
class DataTable:
    """Which images."""

    name: str = param(
        DEFAULT_NAMES["data"],
        "digits, cifar10, cifar100, gtsrb, tiny-imagenet, a folder of the cache, imagefolder:PATH or npy:PATH",
    )
    size: int | None = param(
        None,
        "working resolution: where triggers are applied and models look; left out: native",
        unit="px",
        low=1,
        high=4096,
    )
    limit: int | None = param(
        None, "a class-balanced training subset of so many images; left out: all", low=1, high=10**9
    )
    holdout: float = param(
        0.1,
        "share of the training set held out: a third each to choose settings on, for defenders, and for thresholds",
        low=0,
        high=1,
        open=True,
    )
    measured: Literal["test", "choose"] = param(
        "test",
        "what a run is measured on: the test set, or the third of the hold-out that settings are chosen on",
    )

    @property
    def short_name(self) -> str:
        """The name; of `imagefolder:PATH` and `npy:PATH` that of the folder, whatever link or `.` leads there."""
        kind, colon, path = self.name.partition(":")
        name = os.path.basename(os.path.realpath(path)) if colon else kind
        return name[:60] or "data"


@hyperparameters
class ModelTable:
    """Which network: a timm name, where its weights start from, and timm's arguments.

    Without a name it is a small ViT: `vit_tiny_patch16_224` with patch = size / 8, depth 4, dim 96, 3 heads (digits:
    patch 4, depth 3, dim 64, 4 heads); `overrides` go over that.
    """

    name: str | None = param(None, "timm's name; left out: the small ViT")
    pretrained: bool = param(False, "start from the hub's weights")
    checkpoint: str | None = param(
        None, "take the weights of this safetensors file, which fits exactly; a surrogate is then used as it is"
    )
    weights: str | None = param(
        None, "start training from this safetensors file, adapted as timm adapts pretrained weights"
    )
    linear_probe: bool = param(False, "train the head alone, on the weights that it starts from")
    overrides: Table = param({}, "timm's arguments: patch_size, depth, embed_dim, num_heads, ...")

    def check_settings(self) -> None:
        """Refuse networks too large to build, weights from two places, a linear probe without pretrained weights."""
        for key, value in leaves(self.overrides):
            if isinstance(value, int) and abs(value) > LARGEST_OVERRIDE:
                raise UserError(f"{key} = {shown(value)} is out of range: it must be at most {LARGEST_OVERRIDE:,}")
        given = {"pretrained": self.pretrained, "checkpoint": self.checkpoint, "weights": self.weights}
        starts = [key for key, value in given.items() if value]
        if len(starts) > 1:
            raise UserError(f"{' and '.join(starts)} are given, and weights start from one of them; leave out the rest")
        if self.linear_probe and not (self.pretrained or self.weights):
            instead = "in place of checkpoint" if self.checkpoint else "too"
            raise UserError(
                f"linear_probe = true trains a head on pretrained weights; give pretrained or weights, {instead}"
            )


@dataclass(frozen=True)
class Spec:
    """One experiment: everything that decides its result.

    Attributes:
        name: a name for people; it does not change the result. Left out: attack, its setting if it has any, and data.
        seed: the seed of victim and twin; every random stream derives from it.
        data: which images.
        model: the victim's network.
        surrogate: the attacker's own network; None: one like the victim's, with another seed.
        test_surrogate: a second one, which the trigger uses at test time; None: the same as in training.
        attack_name: the name that the attack is registered under.
        attack: the attack itself, with its settings.
        recipe: how every model of the run is trained.
        defences: what is tried against the victim; they do not change it.
        paths: the paths that it names, by dotted key, as they are written; the attributes above have them relative to
            the working folder.
    """

    name: str
    seed: int
    data: DataTable
    model: ModelTable
    surrogate: ModelTable | None
    attack_name: str
    attack: Any
    recipe: Recipe
    defences: tuple[DefenceSpec, ...] = ()
    test_surrogate: ModelTable | None = None
    paths: Mapping[str, SpecPath] = field(default_factory=dict)

    def table(self) -> Table:
        """The spec as a record has it: all keys of the TOML file whose value is not None, and no absolute path."""
        return self._table({key: path.in_record for key, path in self.paths.items()})

    def located_table(self) -> Table:
        """The spec as a table from which `parse_spec` makes an equal one."""
        table = self._table({key: path.written for key, path in self.paths.items()})
        return table | ({FOLDERS: folders} if (folders := folders_of(self.paths)) else {})

    def contents(self) -> dict[str, str]:
        """The SHA-256 (hex) of each file and folder that the spec names, by dotted key, as far as they are there."""
        return {key: found for key, path in self.paths.items() if (found := path.content) is not None}

    def hash(self) -> str:
        """Twelve hex digits that stand for the whole spec except its name and defences; of files the content counts."""
        contents = {key: f"sha256:{content}" for key, content in self.contents().items()}
        return _digest_of(self._table({**{key: path.in_record for key, path in self.paths.items()}, **contents}))

    def hash_as_written(self) -> str:
        """The same, but of files the path counts as a record has it: no file is read."""
        return _digest_of(self.table())

    def _table(self, paths: Mapping[str, str]) -> Table:
        """The spec as a nested table, with these texts for its paths."""
        tables = {
            "name": self.name,
            "seed": self.seed,
            "data": asdict(self.data),
            "model": _model_table(self.model),
            "surrogate": _model_table(self.surrogate) if self.surrogate else None,
            "test_surrogate": _model_table(self.test_surrogate) if self.test_surrogate else None,
            "attack": {"name": self.attack_name, **asdict(self.attack)},
            "recipe": asdict(self.recipe),
            "defences": [_without_none(defence.table()) for defence in self.defences] or None,
        }
        for key, text in paths.items():
            set_leaf(tables, key, text)
        return _without_none(tables)


def _digest_of(table: Table) -> str:
    return digest({key: value for key, value in table.items() if key not in ("name", "defences")})


def digest(thing: Any) -> str:
    """The first twelve hex digits of the SHA-256 of `thing`, which must be writable as JSON."""
    return hashlib.sha256(json.dumps(thing, sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]


def load_spec(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Spec:
    """Read a spec, apply overrides to it, and check it.

    Args:
        path: a TOML file; None for the embedded default. `base = "other.toml"` in it names a spec to start from.
        overrides: `key=value` or `table.key=value`; a value is read as TOML, else as a string.

    Raises:
        UserError: the file is missing or not TOML; a key, name, type or value is wrong.
    """
    return parse_spec(read_spec(path, overrides))


def read_spec(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Table:
    """Read a spec as `load_spec` does, but return its nested table, unchecked and without defaults.

    Raises:
        UserError: the file is missing, not TOML or a sweep; an override is none.
    """
    table = read_table(Path(path) if path is not None else DEFAULT)
    if "grid" in table:
        raise UserError(f"spec {str(path)!r} has a [grid]: it is a sweep of many runs; start it with vitrap sweep")
    return set_keys(table, [parse_override(text) for text in overrides])


def parse_spec(table: Mapping[str, Any]) -> Spec:
    """Check the nested table of a spec, and fill in every default.

    Raises:
        UserError: a key, name, type or value is wrong.
    """
    _check_values(table)
    # Refuse unknown keys, and values where tables belong.
    tables = ("data", *NETWORKS, "attack", "recipe", FOLDERS)
    for key in table:
        if key not in {"name", "seed", "defences", *tables}:
            raise unknown("key", key, ["name", "seed", "defences", *(each for each in tables if each != FOLDERS)])
    for key in tables:
        if not isinstance(table.get(key, {}), Mapping):
            raise UserError(f"{key} = {shown(table[key])} must be a table: [{key}]")
    table, paths = located(table)
    # Build each part; the defaults of the recipe are those of the data set.
    data = build(DataTable, table.get("data", {}), "data")
    model = _model(table.get("model", {}), "model")
    surrogates = {k: _model(table[k], k) if k in table else None for k in ("surrogate", "test_surrogate")}
    recipe = build(Recipe, {**asdict(recipe_for(data.name)), **table.get("recipe", {})}, "recipe")
    # Attack and defences come last, for their files import torch.
    attack_name, attack = _method("attacks", {"name": DEFAULT_NAMES["attack"], **table.get("attack", {})}, "attack")
    defences = _defences(table.get("defences", []))
    named = {"name": _default_name(attack_name, attack, data)}
    head = build(_NameAndSeed, named | {k: v for k, v in table.items() if k in {"name", "seed"}}, "")
    return Spec(
        head.name,
        head.seed,
        data,
        model,
        surrogates["surrogate"],
        attack_name,
        attack,
        recipe,
        defences,
        surrogates["test_surrogate"],
        paths,
    )


def load_defence(name: str, overrides: Sequence[str] = ()) -> DefenceSpec:
    """The defence of a name, with its defaults except for the overrides `key=value`.

    Raises:
        UserError: the name, a key, type or value is wrong.
    """
    pairs = [parse_override(text) for text in overrides]
    if any(keys == ["name"] for keys, _ in pairs):
        raise UserError(f"defence.name is given already, as {name!r}; leave name=... out")
    return parse_defence({**{".".join(keys): value for keys, value in pairs}, "name": name})


@hyperparameters
class _NameAndSeed:
    name: str = field(metadata={})  # no `param`: it has no default of its own
    seed: int = param(0, "seed of victim and twin", low=0, high=2**53)

    def check_settings(self) -> None:
        fits = 0 < len(self.name) <= LONGEST_NAME and len(self.name.encode()) <= MOST_BYTES
        if not fits or not self.name.isprintable() or set(self.name) & set("/\\") or self.name.startswith("."):
            letters = f"{LONGEST_NAME} letters, digits and dashes"
            raise UserError(f"name = {shown(self.name)} cannot name a folder; use at most {letters}")


def _method(
    kind: registry.Kind, table: Mapping[str, Any], where: str, also_known: Sequence[str] = ("name",)
) -> tuple[str, Any]:
    """The name in a table, and the attack or defence of that name; its settings are the keys not in `also_known`."""
    name = table.get("name")
    if not isinstance(name, str):
        raise UserError(f"{where}.name = {shown(name)} is wrong: it must be one of {', '.join(registry.names(kind))}")
    settings = {k: v for k, v in table.items() if k not in also_known}
    return name, build(registry.get(kind, name), settings, where, also_known)


def _default_name(attack_name: str, attack: Any, data: DataTable) -> str:
    """The attack, its setting if it has any, and the data set, as a folder can be named."""
    name = "-".join(filter(None, [attack_name, str(getattr(attack, "setting", "")), data.short_name]))
    name = "".join(letter if letter.isprintable() and letter not in "/\\" else "-" for letter in name)
    return name.encode()[:MOST_BYTES].decode(errors="ignore")[:LONGEST_NAME]


def _defences(tables: Any) -> tuple[DefenceSpec, ...]:
    """The defences of a spec in its order, each once."""
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise UserError(f"defences = {shown(tables)} must be tables with a name each: [[defences]]")
    found = [parse_defence(table, f"defences[{i}]") for i, table in enumerate(tables)]
    return tuple(defence for i, defence in enumerate(found) if defence not in found[:i])


def parse_defence(table: Mapping[str, Any], where: str = "defence") -> DefenceSpec:
    """The defence of a table with its name and settings.

    Raises:
        UserError: the name, a key, type or value is wrong.
    """
    _check_values(table, where)
    name, defence = _method("defences", table, where, ("name", "screened"))
    if "screened" not in table:
        return DefenceSpec(name, defence)
    screened = table["screened"]
    if defence.kind != "screen":
        raise UserError(
            f"{where}.screened = {shown(screened)} means nothing for {name}, a {defence.kind}, since only a screen"
            " scores images at test time; leave it out"
        )
    if type(screened) is not int or not FEWEST_SCREENED <= screened <= MOST_SCREENED:
        raise UserError(
            f"{where}.screened = {shown(screened)} is wrong: it must be a whole number"
            f" from {FEWEST_SCREENED} to {MOST_SCREENED:,}"
        )
    return DefenceSpec(name, defence, screened)


def _model(table: Mapping[str, Any], where: str) -> ModelTable:
    """The table of a network; keys that are not vitrap's are timm's arguments."""
    own = {f.name for f in fields(ModelTable)} - {"overrides"}
    overrides = {k: v for k, v in table.items() if k not in own}
    return build(ModelTable, {**{k: v for k, v in table.items() if k in own}, "overrides": overrides}, where)


def _model_table(model: ModelTable) -> Table:
    """A network's table as a spec has it, with timm's arguments beside vitrap's keys."""
    table = asdict(model)
    overrides = table.pop("overrides")
    return {**table, **overrides}


def build(cls: type[Any], table: Mapping[str, Any], where: str, also_known: Sequence[str] = ()) -> Any:
    """Make an instance of a dataclass from a table, with types checked by pydantic and ranges by the class.

    Args:
        cls: the dataclass.
        table: its values.
        where: the table's place in the spec, for messages.
        also_known: further keys that the user may give and that are read elsewhere; a hint may name them.

    Raises:
        UserError: a key, type or value is wrong.
    """
    known = [f.name for f in fields(cls)]
    dot = f"{where}." if where else ""
    for key in table:
        if key not in known:
            raise unknown("key", dot + key, [dot + k for k in (*known, *also_known)])
    try:
        return adapter(cls).validate_json(json.dumps(table), strict=True)
    except ValidationError as errors:
        raise UserError("; ".join(_sentence(dict(e), dot) for e in errors.errors())) from errors


def _sentence(error: Table, dot: str) -> str:
    """An error of pydantic's as a sentence that names the key and the value."""
    if error["type"] == "value_error":
        return dot + str(error["ctx"]["error"])
    place = ".".join(str(p) for p in error["loc"])
    return f"{dot}{place} = {shown(error['input'])} is wrong: {error['msg'][0].lower()}{error['msg'][1:]}"


def _check_values(table: Mapping[str, Any], place: str = "") -> None:
    """Refuse values of a table that a record could not hold, and texts that can be no file's name.

    Raises:
        UserError: naming the dotted key.
    """
    check_plain(table, place)
    for key, text in _texts(table, place):
        try:
            name = text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{key} = {shown(text)} is no Unicode text") from error
        longest = max(map(len, name.split(b"/")))
        if b"\0" in name or longest > LONGEST_FILE_NAME or len(name) > LONGEST_PATH:
            raise UserError(f"{key} = {shown(text)} is no name and no path: it has a NUL, or is too long")


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every text in a nested value, with its dotted key."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, place)


def _without_none(table: Table) -> Table:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}
