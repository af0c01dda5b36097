"""Hyper-parameters: dataclass fields that carry meaning, unit, range, and the source of their default."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import wraps
from types import MappingProxyType, UnionType
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from vitrap.errors import UserError, shown, unknown

T = TypeVar("T")

Source = Literal["paper", "code", "field", "assumed"]
"""Where a default comes from: the paper, its public code, common use in the field, or our own assumption."""
MAX_INT, MAX_FLOAT = 10**6, 1e30
"""The greatest absolute values of a setting that has no bound of its own: a whole number may cost time or memory."""


@dataclass(frozen=True)
class DefaultFrom:
    """A default that another setting decides.

    Attributes:
        setting: the name of that setting.
        values: the default for each of its choices.
    """

    setting: str
    values: Mapping[str, Any]

    def __str__(self) -> str:
        return ", ".join(f"{value} ({choice})" for choice, value in self.values.items())


@dataclass(frozen=True)
class Param:
    """All about a hyper-parameter but its name, type and default.

    Attributes:
        doc: what it means, in a few words.
        symbol: its symbol in the paper, "" where the paper has none.
        unit: its unit, "" for a pure number.
        source: where the default comes from.
        low: the least allowed value, of several values of each; None for no bound.
        high: the greatest allowed value; None for no bound but `MAX_INT` or `MAX_FLOAT`.
        open: whether `low` and `high` themselves are refused; "low" where only `low` is.
        odd: whether only odd numbers are allowed.
        choices: the allowed strings, () for any.
        file: whether the value may name a file. Keys then depend on the file's content, not on its name.
        data: whether the value names a data set, for `Access.other`. Keys then depend on its content, not on its name.
        default_from: the default, where another setting decides it; `source` is that of all its values.
    """

    doc: str
    symbol: str = ""
    unit: str = ""
    source: Source = "assumed"
    low: float | None = None
    high: float | None = None
    open: bool | Literal["low"] = False
    odd: bool = False
    choices: tuple[str, ...] = ()
    file: bool = False
    data: bool = False
    default_from: DefaultFrom | None = None

    def range(self) -> str:
        """The allowed values in words; "" where there is no limit."""
        if self.choices:
            return "one of " + ", ".join(self.choices) + (", or a file" if self.file else "")
        left = "(" if self.open else "["
        right = ")" if self.open is True else "]"
        odd = "odd, " if self.odd else ""
        if self.low is None and self.high is None:
            return odd.rstrip(", ")
        if self.high is None:
            return f"{odd}{'>' if self.open else '>='} {self.low:g}"
        low = -float("inf") if self.low is None else self.low
        return f"{odd}in {left}{low:g}, {self.high:g}{right}"

    def allows(self, value: Any) -> bool:
        """Whether `value`, or each of several values, is allowed; None, which stands for a default, always is."""
        if value is None:
            return True
        if isinstance(value, tuple | list):
            return all(map(self.allows, value))
        if self.choices:
            return value in self.choices or self.file
        if isinstance(value, (str, bool)) or not isinstance(value, (int, float)):
            return True
        if self.odd and value % 2 == 0:
            return False
        above = self.low is None or value > self.low or (value == self.low and not self.open)
        below = self.high is None or value < self.high or (value == self.high and self.open is not True)
        return above and below


def param(default: Any, doc: str, **facts: Any) -> Any:
    """A dataclass field that carries a `Param`.

    Args:
        default: the default, or a `DefaultFrom`.
        doc: see `Param`.
        facts: other attributes of the `Param`.
    """
    if isinstance(default, DefaultFrom):
        return field(default=None, metadata={"param": Param(doc, default_from=default, **facts)})
    about = {"param": Param(doc, **facts)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=about)
    if default is MISSING:
        return field(metadata=about)
    return field(default=default, metadata=about)


@dataclass_transform(frozen_default=True)
def hyperparameters(kind: type[T]) -> type[T]:
    """Turn a class of `param` fields into a frozen dataclass that refuses values out of range.

    The choices of a `Literal` type are read from the type, and a default that another setting decides (`DefaultFrom`)
    is filled in. A class may have a method `check_settings`, called last, that refuses combinations of settings.

    Raises:
        UserError: when an instance is made, if a setting is unknown or a value is out of range.
    """

    def complete_and_check(self: Any) -> None:
        for each in fields(self):
            about: Param | None = each.metadata.get("param")
            if about and (default := about.default_from) and getattr(self, each.name) is None:
                object.__setattr__(self, each.name, default.values.get(getattr(self, default.setting)))
        check(self)
        if hasattr(self, "check_settings"):
            self.check_settings()

    setattr(kind, "__post_init__", complete_and_check)  # noqa: B010 - pyright knows no such attribute of a type
    made: Any = dataclass(frozen=True)(kind)
    # The choices of a Literal become part of its field's Param.
    hints = get_type_hints(kind)
    for each in fields(made):
        about: Param | None = each.metadata.get("param")
        if about and not about.choices:
            known = replace(about, choices=_words(hints[each.name]))
            each.metadata = MappingProxyType({**each.metadata, "param": known})
    _refuse_unknown(made)
    return made


def _words(hint: Any) -> tuple[str, ...]:
    """The strings of a `Literal`, also of one in a union with None; () for any other type."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(word for part in get_args(hint) for word in _words(part))
    return get_args(hint) if get_origin(hint) is Literal else ()


def _refuse_unknown(kind: type) -> None:
    """Make the class's `__init__` refuse an unknown setting with a UserError that names the nearest known one."""
    init = kind.__init__
    names = [each.name for each in fields(kind)]

    @wraps(init)
    def checked(self: Any, *values: Any, **settings: Any) -> None:
        for name in settings:
            if name not in names:
                raise unknown(f"setting of {kind.__name__}", name, names)
        init(self, *values, **settings)

    setattr(kind, "__init__", checked)  # noqa: B010


def check(record: Any) -> None:
    """Refuse a dataclass of `param` fields that has a value out of range.

    Raises:
        UserError: a value is out of range; the message names field, value and range.
    """
    for f in fields(record):
        about: Param | None = f.metadata.get("param")
        value = getattr(record, f.name)
        if about is None:
            continue
        which = "each" if isinstance(value, tuple | list) else "it"
        if not about.allows(value):
            raise UserError(f"{f.name} = {shown(value)} is out of range: {which} must be {about.range()}")
        for number in value if isinstance(value, tuple | list) else [value]:
            most = max(MAX_INT if isinstance(number, int) else MAX_FLOAT, about.high or 0)
            if isinstance(number, int | float) and not abs(number) <= most:  # NaN compares as false
                raise UserError(f"{f.name} = {shown(value)} is out of range: {which} must be at most {most:g}")
