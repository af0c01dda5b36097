"""`load_sweep`: reads a sweep's spec, a spec with a `[grid]` of settings that vary, and makes a spec of each run.

Each key of `[grid]` leads to a list of values, quoted or bare (`"attack.poison_rate" = [0.05, 0.1]`, `seed = [0, 1]`);
`[[grid.case]]` tables hold settings that belong together, and may have a `title` for tables and figures; a list in one
is several cases. A key `base` names the spec that a run starts from. The runs are all combinations. If the spec's own
`base` names a sweep, its settings are inherited, but not its [grid] or page. Imports no torch.
"""

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from vitrap.errors import UserError, shown
from vitrap.experiment.spec import Spec, parse_spec
from vitrap.experiment.spec_file import PAGE, leaves, parse_override, read_table, set_keys
from vitrap.formats import Table

MOST = 10_000
"""A sweep of more runs needs `--yes`."""
MOST_AT_ALL = 1_000_000
"""No sweep has more runs: their specs would fill the memory."""
DEFENCES, BASE, TITLE = "defences", "base", "title"
Settings = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A point of the grid: one run of a sweep.

    Attributes:
        settings: the settings by which it differs from other runs: each key of the grid and of its case with its value,
            and the case's `title`.
        spec: the run's whole spec.
    """

    settings: Settings
    spec: Spec

    @property
    def label(self) -> str:
        """The settings by which it differs from other runs, in a line."""
        pairs = [f"{k} = {_short(v)}" for k, v in self.settings.items() if k not in (DEFENCES, TITLE)]
        return ", ".join(pairs) or self.spec.name


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep's spec.

    Attributes:
        name: the name of the spec's file.
        points: each run once, in the order of the grid.
        page: the `page`, `table` and `figure` keys, as they are in the file.
    """

    name: str
    points: tuple[Point, ...]
    page: Table = field(default_factory=dict)


def load_sweep(path: str | Path, overrides: Sequence[str] = (), *, any_number: bool = False) -> Sweep:
    """Read a sweep's spec and make a spec of each combination.

    Args:
        path: a TOML file with a `[grid]`; paths in it (`base`, also as a grid's key) are relative to its folder.
        overrides: `key=value`; for a key of the grid, this value replaces its list.
        any_number: allow more than 10,000 runs.

    Raises:
        UserError: the grid is empty or contradicts itself, names too many runs, or one of its specs is wrong.
    """
    path = Path(path)
    table = read_table(path)
    page = {key: table.pop(key) for key in PAGE if key in table}
    if "grid" not in table:
        raise UserError(f"spec {str(path)!r} has no [grid] of lists: it is a single run; start it with vitrap run")
    if not isinstance(grid := table.pop("grid"), Mapping):
        raise UserError(f"grid = {shown(grid)} in spec {str(path)!r} must be a table of lists: [grid]")
    # Read what varies, apply overrides, and refuse contradictions.
    axes = _axes(grid)
    cases = _cases(grid.get("case", []))
    replaced = _override(table, axes, cases, overrides)
    _check_count(str(path), prod(map(len, axes.values())) * max(1, sum(map(_count, cases))), any_number)
    cases = [settings for case in cases for settings in _each_case(case)]
    _check(str(path), axes, cases)
    # The runs are all combinations of a case with a value of each axis.
    combinations = (
        {**case, **dict(zip(axes, values, strict=True))} for case in cases or [{}] for values in product(*axes.values())
    )
    points = [Point(settings, _spec(table, settings, path.parent, replaced)) for settings in combinations]
    return Sweep(path.stem, tuple(_each_once(points)), page)


def _axes(grid: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Each key of the grid but its cases, dotted, with its list of values."""
    axes: dict[str, list[Any]] = {}
    for key, values in leaves({key: value for key, value in grid.items() if key != "case"}):
        if key in axes:
            raise UserError(f"grid.{key} stands twice, quoted and bare; remove one")
        if not isinstance(values, list) or not values:
            raise UserError(f"grid.{key} = {shown(values)} must be a list with a value or more")
        axes[key] = values
    return axes


def _cases(cases: Any) -> list[Settings]:
    """The cases of the grid, each with its settings by dotted key."""
    if not isinstance(cases, list) or not all(isinstance(case, Mapping) and case for case in cases):
        raise UserError(f"grid.case = {shown(cases)} must be tables of settings that belong together: [[grid.case]]")
    return [dict(leaves(case)) for case in cases]


def _lists(case: Settings) -> dict[str, list[Any]]:
    """The values of each key of a case; a list of defences is one value."""
    return {key: value if isinstance(value, list) and key != DEFENCES else [value] for key, value in case.items()}


def _count(case: Settings) -> int:
    """The number of combinations of a case's lists."""
    return prod(map(len, _lists(case).values()))


def _each_case(case: Settings) -> list[Settings]:
    """One case for each combination of its lists."""
    lists = _lists(case)
    for key, values in lists.items():
        if not values or _twice(values):
            raise UserError(f"grid.case.{key} = {shown(values)} must be a value, or a list of different ones")
    return [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]


def _twice(values: Sequence[Any]) -> list[Any]:
    """The values that stand before in the list already."""
    seen: set[str] = set()
    found = []
    for value in values:
        key = json.dumps(value, sort_keys=True)
        found += [value] if key in seen else []
        seen.add(key)
    return found


def _check_count(where: str, count: int, any_number: bool) -> None:
    """Refuse a grid of too many runs, before any of them is made.

    Raises:
        UserError: naming their number.
    """
    if count > MOST_AT_ALL:
        raise UserError(f"the grid of {where!r} has {shown(count)} runs, more than {MOST_AT_ALL:,}; split it")
    if count > MOST and not any_number:
        raise UserError(f"the grid of {where!r} has {count} runs, more than {MOST}; say --yes if you mean it")


def _override(
    table: Table, axes: dict[str, list[Any]], cases: Sequence[Settings], overrides: Sequence[str]
) -> set[str]:
    """Apply overrides, in place: to the grid where it has the key, else to the spec of all runs.

    Returns:
        The keys of the grid that an override has replaced.
    """
    pairs = []
    replaced = set()
    for text in overrides:
        keys, value = parse_override(text)
        name = ".".join(keys)
        if any(_overlap(name, key) for case in cases for key in case):
            raise UserError(f"override {text!r} contradicts the grid's cases, which set {name!r}; change the spec")
        if name in axes:
            axes[name] = [value]
            replaced.add(name)
        else:
            pairs.append((keys, value))
    set_keys(table, pairs)
    return replaced


def _check(where: str, axes: Mapping[str, list[Any]], cases: Sequence[Settings]) -> None:
    """Refuse a grid that is empty, or in which two keys set the same setting."""
    if not axes and not cases:
        raise UserError(f"the [grid] of {where!r} is empty; give it a key with a list of values, or [[grid.case]]")
    if twice := _twice(cases):
        raise UserError(f"[[grid.case]] {_short(twice[0])} stands twice; remove one")
    for key, values in axes.items():
        if twice := _twice(values):
            raise UserError(f"grid.{key} has {_short(twice[0])} twice; remove one")
        of_axes = [other for other in axes if other != key]
        of_cases = [other for case in cases for other in case]
        if clash := next((other for other in of_axes + of_cases if _overlap(key, other)), None):
            shorter = min(key, clash, key=len)
            raise UserError(f"the grid contradicts itself: {key!r} and {clash!r} both set {shorter!r}")


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted keys are the same, or one is a table that has the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _spec(table: Table, settings: Settings, folder: Path, replaced: Set[str]) -> Spec:
    """The spec of one combination; `replaced` are the grid's keys whose values come from overrides."""
    start = deepcopy(table)
    # Where the grid varies the base, the sweep's own settings go over each base.
    if BASE in settings:
        own = [([key], value) for key, value in start.items()]
        start = set_keys(read_table(folder / str(settings[BASE])), own)
    # Paths of the grid are relative to `folder`, those of overrides to the working folder.
    from_grid: list[tuple[list[str], Any]] = []
    from_overrides: list[tuple[list[str], Any]] = []
    for key, value in settings.items():
        if key not in (BASE, TITLE):
            pair = (key.split("."), _listed(value) if key == DEFENCES else value)
            (from_overrides if key in replaced else from_grid).append(pair)
    set_keys(start, from_grid, str(folder))
    try:
        return parse_spec(set_keys(start, from_overrides))
    except UserError as error:
        run = ", ".join(f"{key} = {_short(value)}" for key, value in settings.items())
        raise UserError(f"{error} (in the grid's run {run})") from error


def _listed(defences: Any) -> list[Any]:
    """One defence or several, each a name or a table, as a list of tables like `[[defences]]`."""
    several = defences if isinstance(defences, list) else [defences]
    return [{"name": defence} if isinstance(defence, str) else defence for defence in several]


def _each_once(points: Sequence[Point]) -> Iterator[Point]:
    """Each run once: points that differ by their defences alone become one run with all these defences."""
    found: dict[str, Point] = {}
    for point in points:
        key = point.spec.hash()
        first = found.setdefault(key, point)
        if first is point:
            continue
        one, other = ({k: v for k, v in p.settings.items() if k != DEFENCES} for p in (first, point))
        if one != other:
            raise UserError(f"the grid contradicts itself: {first.label} and {point.label} are the same run")
        more = tuple(d for d in point.spec.defences if d not in first.spec.defences)
        found[key] = replace(first, spec=replace(first.spec, defences=first.spec.defences + more))
    return iter(found.values())


def _short(value: Any) -> str:
    """A value as a TOML file has it; a string without quotes."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
