"""No text steers a terminal or a page, and every text can be drawn."""

import io
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from vitrap.printable import LETTERS, drawable, plain_text, printable

ANY = st.text(st.characters(codec=None), max_size=60)
STEERING = {
    "escape sequence": "\x1b[2J",
    "a terminal's title": "\x1b]0;x\x07",
    "one byte for two": "\x9b31m",
    "carriage return": "a\rb",
    "backspace": "a\bb",
    "nul": "a\0b",
    "right to left": "\u202egnp.exe",
    "isolated": "\u2066x\u2069",
    "half a character": "\udcff",
    "line separator": "a\u2028b",
    "tag": "\U000e0041",
}


@pytest.mark.parametrize("name", STEERING)
def test_what_steers_is_written_as_its_code(name: str) -> None:
    shown = printable(STEERING[name])
    assert shown.isprintable()
    assert "\\" in shown


@given(ANY)
def test_any_text_can_be_printed(text: str) -> None:
    shown = printable(text)
    assert not {"\x1b", "\x9b", "\r", "\0", "\u202e"} & set(shown)
    shown.encode()
    assert printable(shown) == shown
    assert shown.count("\n") == text.count("\n")


@pytest.mark.parametrize("text", ["cat", "école", "кот", "犬", "a\tb", "two\nlines", "👩\u200d🔬", "[red]$x$", "\\n"])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def draw(text: str) -> bytes:
    out = io.BytesIO()
    with plain_text(), warnings.catch_warnings(action="error"):
        figure = Figure(figsize=(2, 1), dpi=20)
        figure.subplots().set_title(drawable(text))
        figure.savefig(out, format="png")
    return out.getvalue()


@pytest.mark.parametrize(
    "text", ["", "$", "$x^{$", "$\\frac{1$ and $", "犬🐈", "a\nb", "\0", "\udcff", "x" * 10**6, "\\", "{", "%"]
)
def test_odd_text_is_drawn_without_a_warning(text: str) -> None:
    assert draw(text).startswith(b"\x89PNG")


@settings(deadline=None, max_examples=30)
@given(ANY)
def test_any_text_is_drawn_in_one_short_line(text: str) -> None:
    shown = drawable(text)
    assert len(shown) <= LETTERS
    assert "\n" not in shown
    draw(text)


def test_a_dollar_sign_is_drawn_as_one() -> None:
    assert draw("$x$") != draw("x")
