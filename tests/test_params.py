"""Hyper-parameters as fields: what is allowed, how it reads, and what is refused."""

from dataclasses import MISSING, FrozenInstanceError, dataclass, fields
from typing import Any, Literal

import pytest

from vitrap.errors import UserError
from vitrap.params import DefaultFrom, Param, check, hyperparameters, param


@pytest.mark.parametrize(
    ("about", "words", "allowed", "refused"),
    [
        (Param("d"), "", [0, -1e9, "x", None, True, [1]], []),
        (Param("d", low=0), ">= 0", [0, 0.0, 5, None], [-1, -1e-9, float("nan")]),
        (Param("d", low=0, open=True), "> 0", [1e-9, 3], [0, 0.0, -1, float("nan")]),
        (Param("d", low=0, high=1), "in [0, 1]", [0, 0.5, 1], [-0.1, 1.1, float("nan"), float("inf")]),
        (Param("d", low=0, high=1, open=True), "in (0, 1)", [0.5], [0, 1, float("nan")]),
        (Param("d", low=0, high=1, open="low"), "in (0, 1]", [0.5, 1], [0, 1.1, float("nan")]),
        (Param("d", low=0, open="low"), "> 0", [1e-9, 3], [0, -1]),
        (Param("d", high=2.5), "in [-inf, 2.5]", [-1e9, 2.5], [2.6]),
        (Param("d", high=2.5, open=True), "in (-inf, 2.5)", [2.4], [2.5]),
        (Param("d", odd=True), "odd", [1, -3, 7], [0, 2, -4]),
        (Param("d", odd=True, low=1), "odd, >= 1", [1, 3], [-1, 2]),
        (Param("d", odd=True, low=1, high=7), "odd, in [1, 7]", [1, 7], [6, 9]),
        (Param("d", choices=("a", "b")), "one of a, b", ["a", "b", None], ["c", "", 1]),
        (Param("d", choices=("a",), file=True), "one of a, or a file", ["a", "b.png", None], []),
        (
            Param("d", low=1),
            ">= 1",
            [True, False, "text", (1, 2), ()],
            [(0,), [1, 0]],
        ),  # switches and words have no size
    ],
)
def test_what_a_parameter_allows(about: Param, words: str, allowed: list[Any], refused: list[Any]) -> None:
    assert about.range() == words
    assert [value for value in allowed if not about.allows(value)] == []
    assert [value for value in refused if about.allows(value)] == []


@dataclass(frozen=True)
class Settings:
    steps: int = param(3, "how many", symbol="n", unit="steps", source="paper", low=1)
    kind: str = param("a", "which", choices=("a", "b"))
    rate: float | None = param(None, "how fast", low=0, high=1, open=True)
    layers: list = param([1, 2], "where")
    table: dict = param({"x": 1}, "what else")
    plain: int = -5

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Demanding:
    needed: int = param(MISSING, "must be given", low=0)


def test_a_field_carries_its_parameter() -> None:
    about = {f.name: f.metadata.get("param") for f in fields(Settings)}
    assert about["steps"] == Param("how many", symbol="n", unit="steps", source="paper", low=1)
    assert about["kind"].source == "assumed", "what nobody vouches for is assumed"
    assert about["plain"] is None


def test_defaults_are_not_shared() -> None:
    one, other = Settings(), Settings()
    assert (one.layers, one.table) == ([1, 2], {"x": 1})
    one.layers.append(3)
    one.table["y"] = 2
    assert (other.layers, other.table) == ([1, 2], {"x": 1})


def test_a_field_without_default_must_be_given() -> None:
    with pytest.raises(TypeError, match="needed"):
        Demanding()
    assert Demanding(needed=2).needed == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps = 0 is out of range: it must be >= 1"),
        ({"kind": "c"}, "kind = 'c' is out of range: it must be one of a, b"),
        ({"rate": 1.0}, "rate = 1.0 is out of range: it must be in (0, 1)"),
        ({"rate": float("nan")}, "rate = nan is out of range: it must be in (0, 1)"),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Settings(**values)
    assert str(caught.value) == message


def test_values_in_range_and_fields_without_parameter_pass() -> None:
    settings = Settings(steps=1, kind="b", rate=0.5, plain=-100)
    assert (settings.steps, settings.kind, settings.rate, settings.plain) == (1, "b", 0.5, -100)


def test_a_parameter_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Param("d").low = 3  # type: ignore[misc]


@hyperparameters
class Tuned:
    """One of whose defaults another setting decides."""

    kind: Literal["fast", "slow"] = param("fast", "which")
    way: Literal["up", "down"] | None = param(None, "where to")
    picture: str = param("noise", "what", choices=("noise",), file=True)
    rate: float = param(DefaultFrom("kind", {"fast": 1.0, "slow": 0.1}), "how fast", low=0)

    def check_settings(self) -> None:
        """Refuse what is too fast."""
        if self.way == "down" and self.kind == "fast":
            raise UserError("way = 'down' is slow; set kind = 'slow'")


def test_choices_are_those_of_the_type() -> None:
    about = {f.name: f.metadata["param"].choices for f in fields(Tuned)}
    assert about == {"kind": ("fast", "slow"), "way": ("up", "down"), "picture": ("noise",), "rate": ()}


def test_hyperparameters_are_completed_checked_and_frozen() -> None:
    assert (Tuned().rate, Tuned("slow").rate, Tuned(rate=3.0).rate) == (1.0, 0.1, 3.0)
    with pytest.raises(UserError, match="rate = -1 is out of range: it must be >= 0"):
        Tuned(rate=-1)
    with pytest.raises(UserError, match="kind = 'slwo' is out of range: it must be one of fast, slow"):
        Tuned("slwo")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="set kind = 'slow'"):
        Tuned(way="down")
    with pytest.raises(FrozenInstanceError):
        Tuned().rate = 2.0  # type: ignore[misc]


def test_an_unknown_setting_is_named_with_the_nearest_that_is_known() -> None:
    with pytest.raises(UserError, match="unknown setting of Tuned 'rte'; did you mean 'rate'?"):
        Tuned(rte=1.0)  # type: ignore[call-arg]
