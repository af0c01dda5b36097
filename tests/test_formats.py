"""JSON and TOML from anybody: a plain value or one line of refusal, whatever the text is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrap.errors import UserError
from vitrap.formats import DEEPEST, GREATEST, check_plain, parse_json, parse_toml

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def line(error: UserError) -> str:
    """A refusal, which is a line that a terminal can show."""
    assert "\n" not in str(error)
    assert len(str(error)) < 500
    return str(error)


@pytest.mark.parametrize("parse", [parse_json, parse_toml])
@given(text=st.text(alphabet='[]{}=".,:\n 019aeuft-+#\\\0', max_size=200) | st.text())
def test_any_text_is_a_value_or_a_refusal(parse: Any, text: str) -> None:
    try:
        parse(text)
    except UserError as error:
        line(error)


@given(values)
def test_any_value_is_plain_or_refused(value: Any) -> None:
    try:
        check_plain(value)
    except UserError as error:
        line(error)


LARGE = {
    "deep lists": ("[" * 100_000, "x = " + "[" * 60_000),
    "closed lists": ("[" * 51 + "]" * 51, None),
    "digits": ("9" * 5000, "x = " + "9" * 5000),
    "a key of many parts": ("{" * 30_000, ".".join("a" * 30_000) + " = 1"),
    "a table of many parts": ("", f"[{'.'.join('a' * 30_000)}]"),
}


@pytest.mark.parametrize("kind", LARGE)
def test_what_would_take_memory_or_time_is_refused(kind: str) -> None:
    for parse, text in zip((parse_json, parse_toml), LARGE[kind], strict=True):
        if text is not None:
            with pytest.raises(UserError) as refused:
                parse(text)
            line(refused.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "a.b = nan is no finite number"),
        (float("-inf"), "a.b = -inf is no finite number"),
        (10**101, "is out of range: no number may be greater than 1e+100"),
        (-(10**5000), "a.b = a huge int is out of range"),
        (object, "is of type type; give text or a number"),
        ([[1, b"x"]], "a.b = b'x' is of type bytes"),
    ],
    ids=["nan", "infinity", "a great number", "thousands of digits", "an object", "bytes"],
)
def test_a_refusal_names_the_key(value: Any, said: str) -> None:
    with pytest.raises(UserError) as refused:
        check_plain({"a": {"b": value}})
    assert said in line(refused.value)


def test_what_is_within_the_bounds_is_plain() -> None:
    deep: Any = GREATEST
    for _ in range(DEEPEST - 1):
        deep = [deep]
    check_plain(deep)
    with pytest.raises(UserError, match=f"it is nested more than {DEEPEST} deep"):
        check_plain([deep])
    deep.append(deep)  # a circle
    with pytest.raises(UserError, match="nested more than"):
        check_plain(deep)
