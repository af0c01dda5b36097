"""A hyper-parameter as a dataclass field: its default, meaning, unit, range, and the source of the default."""

from dataclasses import MISSING, dataclass, field, fields, replace
from functools import wraps
from types import MappingProxyType, UnionType
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from vitrap.errors import UserError, unknown

T = TypeVar("T")

Source = Literal["paper", "code", "field", "assumed"]
"""Where a default comes from: the paper, its reference code, what the field commonly uses, or nowhere but us."""


@dataclass(frozen=True)
class Param:
    """What is known of one parameter besides its name, type and default.

    Attributes:
        doc: its meaning, in a few words.
        symbol: its symbol in the paper, "" where the paper has none.
        unit: its unit, "" for a pure number.
        source: where the default comes from.
        low: the least value allowed, None for no bound.
        high: the greatest value allowed, None for no bound.
        open: whether `low` and `high` themselves are refused; "low" for `low` alone.
        odd: whether only odd numbers are allowed.
        choices: the strings allowed, () for any.
        file: whether the value may name a file, whose content then counts, not its name.
        data: whether the value names a data set, whose content then counts, not its name: the attacker's other images.
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

    def range(self) -> str:
        """The allowed values in words: "" where anything goes."""
        if self.choices:
            return "one of " + ", ".join(self.choices) + (", or a file" if self.file else "")
        left, right = "(" if self.open else "[", ")" if self.open is True else "]"
        odd = "odd, " if self.odd else ""
        if self.low is None and self.high is None:
            return odd.rstrip(", ")
        if self.high is None:
            return f"{odd}{'>' if self.open else '>='} {self.low:g}"
        return f"{odd}in {left}{-float('inf') if self.low is None else self.low:g}, {self.high:g}{right}"

    def allows(self, value: Any) -> bool:
        """Whether `value`, or each of several, lies in the range; None (left to a default) always does."""
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
    """A dataclass field that carries a `Param`; `facts` are the other attributes of `Param`."""
    about = {"param": Param(doc, **facts)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=about)
    return field(default=default, metadata=about) if default is not MISSING else field(metadata=about)


@dataclass_transform(frozen_default=True)
def hyperparameters(kind: type[T]) -> type[T]:
    """Make of a class of `param` fields a frozen dataclass that refuses what is out of range.

    Choices are read from the type: those of a `Literal` need not be repeated. A `__post_init__` of the class's own runs
    after the check, to fill in what other settings decide and to refuse combinations.

    Raises:
        UserError: at making one: a setting is unknown, or its value out of range.
    """
    own = kind.__dict__.get("__post_init__")

    def check_and_complete(self: Any) -> None:
        check(self)
        if own:
            own(self)

    setattr(kind, "__post_init__", check_and_complete)  # noqa: B010 - pyright knows no such attribute of a type
    made: Any = dataclass(frozen=True)(kind)
    hints = get_type_hints(kind)
    for each in fields(made):
        about: Param | None = each.metadata.get("param")
        if about and not about.choices:
            known = replace(about, choices=_words(hints[each.name]))
            each.metadata = MappingProxyType({**each.metadata, "param": known})
    _refuse_unknown(made)
    return made


def _words(hint: Any) -> tuple[str, ...]:
    """The words of a `Literal`, also where None is allowed beside them; () of any other type."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(word for part in get_args(hint) for word in _words(part))
    return get_args(hint) if get_origin(hint) is Literal else ()


def _refuse_unknown(kind: type) -> None:
    """Have a class name a setting that it does not know, and what may have been meant."""
    init, names = kind.__init__, [each.name for each in fields(kind)]

    @wraps(init)
    def checked(self: Any, *values: Any, **settings: Any) -> None:
        odd = next((name for name in settings if name not in names), None)
        if odd is not None:
            raise unknown(f"setting of {kind.__name__}", odd, names)
        init(self, *values, **settings)

    setattr(kind, "__init__", checked)  # noqa: B010


def check(record: Any) -> None:
    """Refuse a record (a dataclass of `param` fields) with a value out of range.

    Raises:
        UserError: naming the field, the value and what is allowed.
    """
    for f in fields(record):
        about: Param | None = f.metadata.get("param")
        value = getattr(record, f.name)
        if about is not None and not about.allows(value):
            raise UserError(f"{f.name} = {value!r} is out of range: it must be {about.range()}")
