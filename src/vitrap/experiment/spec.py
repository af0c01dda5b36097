"""A spec: what to run, as TOML, checked strictly before anything starts.

This file imports no torch, so that a broken spec is refused at once.
"""

import hashlib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date, time
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from vitrap import registry
from vitrap.errors import UserError, unknown
from vitrap.experiment.named import Named
from vitrap.params import hyperparameters, param
from vitrap.train.recipe import Recipe, recipe_for

Table = dict[str, Any]
DEFAULT = Path(__file__).with_name("default.toml")
_adapter = cache(TypeAdapter)
KEPT = {"attack": ("target",), "model": (), "surrogate": (), "test_surrogate": (), "data": ("limit",)}
"""Tables whose name can be overridden, and the keys that a new name leaves in place."""
UNNAMED = {"attack": "ageb", "data": "digits"}
"""What a table without a name stands for."""
FEWEST = 10
"""With fewer scores a threshold says nothing."""
PAGE = ("page", "table", "figure")
"""Keys of a sweep's spec that say what `vitrap table` makes of its records."""


@hyperparameters
class DataTable:
    """Which images."""

    name: str = param(
        UNNAMED["data"],
        "digits, cifar10, cifar100, gtsrb, tiny-imagenet, a folder of the cache, imagefolder:PATH or npy:PATH",
    )
    size: int | None = param(
        None, "working resolution: where triggers are applied and models look; left out: native", unit="px", low=1
    )
    limit: int | None = param(None, "a class-balanced training subset of so many images; left out: all", low=1)
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
        """The name without the folders before it; of `imagefolder:PATH`, the last folder."""
        return self.name.rstrip("/").rpartition("/")[2].rpartition(":")[2][:60] or "data"


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
        """Refuse more than one start."""
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
        name: what to call it; left out: attack and data set. It decides nothing.
        seed: of the victim and its twin; every random stream derives from it.
        data: which images.
        model: the victim's network.
        surrogate: the attacker's own network; None: like the victim's, other seed.
        test_surrogate: a second one, which the trigger uses at test time; None: the same as in training.
        attack_name: what the attack is registered under.
        attack: the attack itself, with its settings.
        recipe: how every model of the run is trained.
        defences: what is tried against the victim; decides nothing about it.
    """

    name: str
    seed: int
    data: DataTable
    model: ModelTable
    surrogate: ModelTable | None
    attack_name: str
    attack: Any
    recipe: Recipe
    defences: tuple[Named, ...] = ()
    test_surrogate: ModelTable | None = None

    def table(self) -> Table:
        """The spec as the nested table that `load_spec` reads; keys left out are None's."""
        tables = {
            "name": self.name,
            "seed": self.seed,
            "data": asdict(self.data),
            "model": _flat(self.model),
            "surrogate": _flat(self.surrogate) if self.surrogate else None,
            "test_surrogate": _flat(self.test_surrogate) if self.test_surrogate else None,
            "attack": {"name": self.attack_name, **asdict(self.attack)},
            "recipe": asdict(self.recipe),
            "defences": [_without_none(defence.table()) for defence in self.defences] or None,
        }
        return _without_none(tables)

    def hash(self) -> str:
        """Twelve hex digits that stand for everything but the name and the defences."""
        return digest({k: v for k, v in self.table().items() if k not in ("name", "defences")})


def digest(thing: Any) -> str:
    """Twelve hex digits of the SHA-256 of anything that JSON can write."""
    return hashlib.sha256(json.dumps(thing, sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]


def load_spec(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Spec:
    """Read a spec, put overrides over it, and check it.

    Args:
        path: a TOML file; None for the embedded default. `base = "other.toml"` in it names a spec to start from.
        overrides: `key=value` or `table.key=value`; a value is read as TOML, else as a string.

    Raises:
        UserError: the file is missing or not TOML; a key, name, type or value is wrong.
    """
    return parse_spec(read_spec(path, overrides))


def read_spec(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Table:
    """As `load_spec`, but the nested table as it was asked for, unchecked and without defaults.

    Raises:
        UserError: the file is missing, not TOML or a sweep; an override is none.
    """
    table = read_table(Path(path) if path is not None else DEFAULT)
    if "grid" in table:
        raise UserError(f"spec {str(path)!r} has a [grid]: it is a sweep of many runs; start it with vitrap sweep")
    return set_keys(table, [parse_override(text) for text in overrides])


def set_keys(table: Table, pairs: Sequence[tuple[list[str], Any]]) -> Table:
    """`table`, changed in place, with each value at its place.

    Names come first, since another name drops its table's other keys.
    """
    for keys, value in sorted(pairs, key=lambda pair: pair[0][1:] != ["name"]):
        lay_over(table, nest(keys, value))
    return table


def parse_spec(table: Mapping[str, Any]) -> Spec:
    """The spec that a nested table stands for, every default filled in.

    Raises:
        UserError: a key, name, type or value is wrong.
    """
    for key, value in _leaves(table):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} = {value} is no finite number")
        if isinstance(value, date | time):
            raise UserError(f"{key} = {value} is a date or a time; put a string in quotes")
    tables = ("data", "model", "surrogate", "test_surrogate", "attack", "recipe")
    for key in table:
        if key not in {"name", "seed", "defences", *tables}:
            raise unknown("key", key, ["name", "seed", "defences", *tables])
    for key in tables:
        if not isinstance(table.get(key, {}), Mapping):
            raise UserError(f"{key} = {table[key]!r} must be a table: [{key}]")
    data = build(DataTable, table.get("data", {}), "data")
    model = _model(table.get("model", {}), "model")
    surrogates = {k: _model(table[k], k) if k in table else None for k in ("surrogate", "test_surrogate")}
    recipe = build(Recipe, {**asdict(recipe_for(data.name)), **table.get("recipe", {})}, "recipe")
    attack, params = _attack(table.get("attack", {}))  # last: its file imports torch
    defences = _defences(table.get("defences", []))
    named = {"name": f"{attack}-{data.short_name}"} | {k: v for k, v in table.items() if k in {"name", "seed"}}
    head = build(_Head, named, "")
    return Spec(
        head.name,
        head.seed,
        data,
        model,
        surrogates["surrogate"],
        attack,
        params,
        recipe,
        defences,
        surrogates["test_surrogate"],
    )


def load_defence(name: str, overrides: Sequence[str] = ()) -> Named:
    """The defence of a name with its defaults, and overrides `key=value` over them.

    Raises:
        UserError: the name, a key, type or value is wrong.
    """
    pairs = [parse_override(text) for text in overrides]
    if any(keys == ["name"] for keys, _ in pairs):
        raise UserError(f"defence.name is given already, as {name!r}; leave name=... out")
    return parse_defence({**{".".join(keys): value for keys, value in pairs}, "name": name})


@hyperparameters
class _Head:
    name: str = field(metadata={})
    seed: int = param(0, "seed of victim and twin", low=0)

    def check_settings(self) -> None:
        if not 0 < len(self.name) <= 100 or set(self.name) & set("/\\\0") or self.name.startswith("."):
            raise UserError(f"name = {self.name!r} cannot name a folder; use at most 100 letters, digits and dashes")


def _attack(table: Mapping[str, Any]) -> tuple[str, Any]:
    """The attack's name and the attack."""
    name = table.get("name", UNNAMED["attack"])
    if not isinstance(name, str):
        raise UserError(f"attack.name = {name!r} is wrong: it must be one of {', '.join(registry.names('attacks'))}")
    settings = {k: v for k, v in table.items() if k != "name"}
    return name, build(registry.get("attacks", name), settings, "attack", ("name",))


def _defences(tables: Any) -> tuple[Named, ...]:
    """Each defence once, in the order of the spec."""
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise UserError(f"defences = {tables!r} must be tables with a name each: [[defences]]")
    found = [parse_defence(table, f"defences[{i}]") for i, table in enumerate(tables)]
    return tuple(defence for i, defence in enumerate(found) if defence not in found[:i])


def parse_defence(table: Mapping[str, Any], where: str = "defence") -> Named:
    """The defence that a table of its name and settings stands for.

    Raises:
        UserError: the name, a key, type or value is wrong.
    """
    if not isinstance(name := table.get("name"), str):
        raise UserError(f"{where}.name = {name!r} is wrong: it must be one of {', '.join(registry.names('defences'))}")
    for key, value in _leaves(table):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}.{key} = {value} is no finite number")
    settings = {k: v for k, v in table.items() if k not in ("name", "screened")}
    defence = build(registry.get("defences", name), settings, where, ("name", "screened"))
    if "screened" not in table:
        return Named(name, defence)
    screened = table["screened"]
    if defence.kind != "screen":
        raise UserError(
            f"{where}.screened = {screened!r} means nothing for {name}, a {defence.kind}, since only a screen scores"
            " images at test time; leave it out"
        )
    if not isinstance(screened, int) or isinstance(screened, bool) or screened < FEWEST:
        raise UserError(f"{where}.screened = {screened!r} is wrong: it must be a whole number of {FEWEST} or more")
    return Named(name, defence, screened)


def _model(table: Mapping[str, Any], where: str) -> ModelTable:
    own = {f.name for f in fields(ModelTable)} - {"overrides"}
    overrides = {k: v for k, v in table.items() if k not in own}
    return build(ModelTable, {**{k: v for k, v in table.items() if k in own}, "overrides": overrides}, where)


def _flat(model: ModelTable) -> Table:
    table = asdict(model)
    overrides = table.pop("overrides")
    return {**table, **overrides}


def build(record: type[Any], table: Mapping[str, Any], where: str, more: Sequence[str] = ()) -> Any:
    """A record from a table: unknown keys with a hint, types by pydantic, ranges by the record itself.

    `more` are keys of the table that are read elsewhere.
    """
    known = [f.name for f in fields(record)]
    dot = f"{where}." if where else ""
    for key in table:
        if key not in known:
            raise unknown("key", dot + key, [dot + k for k in (*known, *more)])
    try:
        return _adapter(record).validate_json(json.dumps(table), strict=True)
    except ValidationError as errors:
        raise UserError("; ".join(_sentence(dict(e), dot) for e in errors.errors())) from errors


def _sentence(error: Table, dot: str) -> str:
    if error["type"] == "value_error":
        return dot + str(error["ctx"]["error"])
    place = ".".join(str(p) for p in error["loc"])
    return f"{dot}{place} = {error['input']!r} is wrong: {error['msg'][0].lower()}{error['msg'][1:]}"


def read_table(path: Path, seen: tuple[Path, ...] = ()) -> Table:
    """A spec's file as a table, over the one that its `base` names.

    Raises:
        UserError: a file is missing or not TOML, or is its own base.
    """
    if path.resolve() in seen:
        raise UserError(f"spec {str(path)!r} is its own base; remove the circle")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text file"
        raise UserError(f"spec {str(path)!r} cannot be read: {why}; give the path of a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"spec {str(path)!r} is not TOML: {error}") from error
    base = table.pop("base", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise UserError(f"base = {base!r} in spec {str(path)!r} must be the path of another spec")
    start = read_table(path.parent / base, (*seen, path.resolve()))
    start = {key: value for key, value in start.items() if key not in ("grid", *PAGE)}
    return lay_over(start, table)


def lay_over(table: Table, over: Mapping[str, Any]) -> Table:
    """Put `over` on `table` in place; a new name drops the other keys of its table."""
    for key, value in over.items():
        below = table.get(key)
        if not isinstance(value, Mapping) or not isinstance(below, dict):
            table[key] = value
            continue
        if key in KEPT and "name" in value and value["name"] != below.get("name", UNNAMED.get(key)):
            table[key] = below = {k: v for k, v in below.items() if k in KEPT[key]}
        lay_over(below, value)
    return table


def parse_override(text: str) -> tuple[list[str], Any]:
    """The place and the value that `table.key=value` names.

    Raises:
        UserError: it is not of that form.
    """
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"override {text!r} is not of the form key=value or table.key=value")
    try:
        return keys, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return keys, value.strip()


def nest(keys: Sequence[str], value: Any) -> Table:
    """The table with `value` at the place that `keys` lead to."""
    for key in reversed(keys):
        value = {key: value}
    return value


def _leaves(table: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{place}{key}.")
        elif isinstance(value, list):
            yield from ((f"{place}{key}", entry) for entry in value)
        else:
            yield f"{place}{key}", value


def _without_none(table: Table) -> Table:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}
