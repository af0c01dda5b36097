"""Matches the runs of a sweep with records: an `Entry` is a run, or a defence on it, with what was measured.

A record belongs to a run if its spec, as today's vitrap reads it, is the run's; a setting that is newer than the record
has its default. A row of a record's `defences` is matched in the same way, by name and settings.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import sqrt
from statistics import mean, stdev
from typing import Any, TypeVar

from vitrap.errors import UserError, unknown
from vitrap.experiment.defence_rows import RATES_BY_FPR, Row, ScreenRow, row_settings
from vitrap.experiment.defence_spec import SCREENED, DefenceSpec
from vitrap.experiment.record import Failure, Record
from vitrap.experiment.records import Loaded
from vitrap.experiment.spec import Spec, parse_defence, parse_spec
from vitrap.experiment.spec_file import leaves
from vitrap.metrics.diagnosis import backdoor_faults
from vitrap.report.frame import Measured, of_row, of_run
from vitrap.report.study.layout import DEFENCE
from vitrap.sweeps.grid import DEFENCES, Point, Sweep

SEED, NAME = "seed", "name"
NO_BACKDOOR_MARK = "†"
"""Marks figures of a defence whose victim has no backdoor."""
T = TypeVar("T")


@dataclass(frozen=True)
class Value:
    """A measure: its value and, where it has them, its interval and the number of images."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Entry:
    """A run of the sweep, or a defence on it, with its measures.

    Attributes:
        settings: every setting by its dotted key; and the case's title and the defence, where there are any.
        kind: the defence's kind; "" for the run itself.
        state: "found", "not run" or "failed".
        values: the measures, by the names of docs/record.md.
        reference: the entry of equal seed that this one is compared with; None where there is none.
        unresolved: the measures that it lacks since the held-out images are too few for their threshold.
        backdoor: whether there is one for the defence to find.
    """

    settings: Mapping[str, Any]
    kind: str = ""
    state: str = "found"
    values: Mapping[str, Value] = field(default_factory=dict)
    reference: "Entry | None" = None
    unresolved: tuple[str, ...] = ()
    backdoor: bool = True


def current_hash(record: Record | Failure) -> str:
    """The hash of a record's spec, read with this version's defaults.

    If this version refuses the spec, the hash stored in the record. Files count by their paths, not by their content,
    since a table is also made where the files are missing.
    """
    spec = record.spec
    # When records did not yet name the attention, "auto" meant one precision: the one that the record states.
    if isinstance(record, Record) and not record.attention and spec.get("recipe", {}).get("precision") == "auto":
        spec = {**spec, "recipe": {**spec["recipe"], "precision": record.precision}}
    try:
        return parse_spec(spec).hash_as_written()
    except UserError:
        return record.hash


def records_by_hash(loaded: Loaded) -> dict[str, Record]:
    """Each record by its current hash and by its stored one, which differ where its files had other paths, say.

    If several records have the same current hash, the one whose stored hash equals it is preferred.
    """
    found: dict[str, Record] = {}
    for record in (each.record for each in loaded.records):
        key = current_hash(record)
        if key not in found or record.hash == key:
            found[key] = record
    return {each.record.hash: each.record for each in loaded.records} | found


def known_hash(spec: Spec, known: Collection[str]) -> str:
    """The hash by which to look up a spec in `known`.

    That is its hash with files by path or, if this is not in `known`, its hash with files by content.
    """
    written = spec.hash_as_written()
    return written if written in known or not spec.paths else spec.hash()


def entries(sweep: Sweep, loaded: Loaded) -> tuple[Entry, ...]:
    """Every run of a sweep and every defence on it, in the order of the grid."""
    records = records_by_hash(loaded)
    failed = {key for failure in loaded.failures for key in (current_hash(failure), failure.hash)}
    named = _labels(defence for point in sweep.points for defence in point.spec.defences)
    return tuple(
        entry
        for point in sweep.points
        for entry in _of_point(
            point, records.get(known_hash(point.spec, records)), known_hash(point.spec, failed) in failed, named
        )
    )


def _of_point(
    point: Point, record: Record | None, failed: bool, named: Sequence[tuple[DefenceSpec, str]]
) -> Iterator[Entry]:
    """The entry of a run, and those of its defences."""
    shared = {**point.settings, **dict(leaves(point.spec.table()))}
    shared |= {f"attack.{name}": getattr(point.spec.attack, name) for name in ("threat", "labels")}
    shared.pop(DEFENCES, None)
    missing = "failed" if failed else "not run"
    if record is None:
        yield Entry(shared, "", missing)
    else:
        yield Entry(shared, "", "found", _values(of_run(record)))
    rows = [(row, _defence(row)) for row in record.defences] if record else []
    backdoor = record is None or not backdoor_faults(record.victim, record.data.classes)
    for defence in point.spec.defences:
        own = {**shared, DEFENCE: next(label for each, label in named if each == defence)}
        table = {**defence.table(), **({"screened": defence.screened} if defence.method.kind == "screen" else {})}
        own |= {f"{DEFENCE}.{key}": value for key, value in table.items()}
        row = next((row for row, met in rows if met == defence), None)
        if row is None:
            yield Entry(own, defence.method.kind, "not run" if record else missing)
        else:
            values = _values(of_row(row))
            yield Entry(own, row.kind, values=values, unresolved=tuple(_unresolved(row)), backdoor=backdoor)


def _defence(row: Row) -> DefenceSpec | None:
    """The defence of a row, with its settings; None where today's vitrap does not know it."""
    try:
        return parse_defence({**{k: v for k, v in row_settings(row).items() if v is not None}, "name": row.name})
    except UserError:
        return None


def _unresolved(row: Row) -> Iterator[str]:
    """The measures of a row that need more held-out images than there are."""
    if isinstance(row, ScreenRow):
        yield from (f"{name}.{fpr}" for name in RATES_BY_FPR for fpr in row.unresolved)


def _values(lines: Iterable[Measured]) -> dict[str, Value]:
    """Measures by name."""
    return {name: Value(value, low, high, n) for name, value, low, high, n in lines}


def _labels(defences: Iterable[DefenceSpec]) -> list[tuple[DefenceSpec, str]]:
    """Each defence once, with a label: its name and the settings by which it differs from others of that name."""
    each: list[DefenceSpec] = []
    for defence in defences:
        if defence not in each:
            each.append(defence)
    labels = []
    for defence in each:
        tables = [asdict(other.method) for other in each if other.name == defence.name]
        apart = [key for key in tables[0] if any(table[key] != tables[0][key] for table in tables)]
        own = asdict(defence.method)
        # Where settings that are words differ, such as the optimiser, numbers that differ with them are not shown.
        words = [key for key in apart if isinstance(own[key], str)]
        shown = [str(own[key]) for key in words] or [f"{key} {own[key]}" for key in apart]
        shown += [f"screened {defence.screened}"] if defence.screened != SCREENED else []
        labels.append((defence, ", ".join([f"`{defence.name}`", *shown])))
    if len({label for _, label in labels}) < len(labels):
        labels = [(d, f"`{d.name}` {_settings(d)}") for d, _ in labels]
    return labels


def _settings(defence: DefenceSpec) -> str:
    """All settings of a defence as text."""
    return ", ".join(f"{key} {value}" for key, value in defence.table().items() if key != NAME)


def choose(
    found: Sequence[Entry], keys: Sequence[str], measures: Sequence[str], where: Mapping[str, Any], kind: str = ""
) -> list[Entry]:
    """The entries that a table or a figure is made of.

    Args:
        found: all entries.
        keys: the keys that make its rows, columns or marks.
        measures: its measures: "a", "a - b" or "a / b".
        where: for some keys, the value or the values that they must have.
        kind: the kind of its defences; "" where `keys` have no defence, and the runs themselves are shown.

    Raises:
        UserError: it asks for an unknown key or value; or for an unknown measure, if there are records with measures.
    """
    defended = bool(kind) or DEFENCE in keys
    candidates = [entry for entry in found if bool(entry.kind) == defended and kind in ("", entry.kind)]
    if not candidates:
        raise UserError(f"the sweep has no {kind or 'defence'} to show; add it under [[defences]]")
    known = {key for entry in candidates for key in entry.settings}
    for key in (*keys, *where):
        if key not in known:
            raise unknown("key of rows, columns or where", key, known)
    measured = {name for entry in candidates for name in (*entry.values, *entry.unresolved)}
    for name in {part for each in measures for part in re.split(" / | - ", each)}:
        if measured and name not in measured:
            raise unknown("measure", name, measured)
    allowed = {key: value if isinstance(value, list) else [value] for key, value in where.items()}
    for key, values in allowed.items():
        there = [entry.settings.get(key) for entry in candidates]
        if (value := next((v for v in values if v not in there), None)) is not None:
            raise unknown(f"value of where.{key}", value, {label(v) for v in there})
    return [entry for entry in candidates if all(entry.settings.get(key) in values for key, values in allowed.items())]


def with_references(chosen: Sequence[Entry], keys: Sequence[str], against: Mapping[str, Any]) -> list[Entry]:
    """Each entry with its reference: the entry of equal seed and `keys`, except for the values of `against`.

    Raises:
        UserError: there is no such entry, or more than one.
    """
    known = {key for entry in chosen for key in entry.settings}
    if missing := next((key for key in against if key not in known), None):
        raise unknown("key of against", missing, known)
    return [replace(entry, reference=_reference(entry, chosen, keys, against)) for entry in chosen]


def _reference(entry: Entry, chosen: Sequence[Entry], keys: Sequence[str], against: Mapping[str, Any]) -> Entry | None:
    """The reference of an entry; None for the reference itself."""
    wanted = {key: entry.settings.get(key) for key in (*keys, SEED)} | dict(against)
    found = [other for other in chosen if all(other.settings.get(key) == value for key, value in wanted.items())]
    if len(found) != 1:
        pairs = ", ".join(f"{key} = {value!r}" for key, value in wanted.items())
        raise UserError(
            f"{len(found)} runs have {pairs}, and others can be compared with one only; change the table's `against`"
        )
    return None if found[0] is entry else found[0]


def check_alike(seeds: Sequence[Entry]) -> None:
    """Refuse to average over runs that differ by more than their seed.

    Raises:
        UserError: naming a key by which they differ.
    """
    for entry in seeds[1:]:
        one, other = seeds[0].settings, entry.settings
        apart = [key for key in (*one, *other) if one.get(key) != other.get(key) and key not in (SEED, NAME)]
        if apart:
            raise UserError(f"a cell would mix runs that differ by {apart[0]!r}; name it in rows, columns or where")


def measure(entry: Entry, name: str) -> Value | None:
    """A measure of an entry or, for "a - b", a difference of two, with Newcombe's interval where they are rates."""
    one, minus, other = name.partition(" - ")
    left = entry.values.get(one)
    right = entry.values.get(other)
    if not minus or left is None:
        return left
    return None if right is None else difference(left, right)


def change(entry: Entry, name: str) -> Value | None:
    """A measure of an entry minus that of its reference."""
    ours = measure(entry, name)
    theirs = measure(entry.reference, name) if entry.reference else None
    return difference(ours, theirs) if ours and theirs else None


def mean_change(changes: Sequence[float]) -> Value:
    """The mean of two or more differences that are paired by seed, and its 95 % interval by Student's t.

    >>> change = mean_change([1.0, 2.0, 3.0])  # 2 -+ 4.3027 / sqrt(3)
    >>> round(change.low, 3), change.value, round(change.high, 3)
    (-0.484, 2.0, 4.484)
    """
    from scipy.stats import t  # imported here, since importing it takes a second

    centre = mean(changes)
    n = len(changes)
    reach = float(t.ppf(0.975, n - 1)) * stdev(changes) / sqrt(n)
    return Value(centre, centre - reach, centre + reach)


def difference(one: Value, other: Value) -> Value:
    """`one` minus `other`; for two rates with a 95 % interval, made of their intervals (Newcombe 1998, method 10).

    The method assumes independent samples. Rates on the same images are correlated, and for them the interval is wide.

    >>> apart = difference(Value(0.8, 0.6918, 0.8772, 70), Value(0.6, 0.4904, 0.7004, 80))
    >>> round(apart.value, 2), round(apart.low, 2), round(apart.high, 2)
    (0.2, 0.05, 0.33)
    """
    value = one.value - other.value
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return Value(value)
    down = sqrt((one.value - one.low) ** 2 + (other.high - other.value) ** 2)
    up = sqrt((one.high - one.value) ** 2 + (other.value - other.low) ** 2)
    return Value(value, value - down, value + up, one.n)


def label(value: Any, percent: bool = False) -> str:
    """A setting's value as a table shows it."""
    if value is None:
        return "–"
    if percent and isinstance(value, int | float):
        return f"{100 * value:g} %"
    return f"{value:g}" if isinstance(value, float) else str(value)


def grouped(found: Iterable[tuple[tuple[str, ...], T]]) -> dict[tuple[str, ...], list[T]]:
    """Group things by their labels; sorted by the first label, then the second, each in order of first appearance.

    >>> list(grouped([(("b", "x"), 1), (("a", "x"), 2), (("b", "y"), 3)]))
    [('b', 'x'), ('b', 'y'), ('a', 'x')]
    """
    groups: dict[tuple[str, ...], list[T]] = {}
    for names, thing in found:
        groups.setdefault(names, []).append(thing)
    came = [list(dict.fromkeys(column)) for column in zip(*groups, strict=True)]
    by_place = sorted(groups, key=lambda names: [place.index(name) for place, name in zip(came, names, strict=True)])
    return {names: groups[names] for names in by_place}
