"""Text from files as a terminal, a page or a figure can take it: what would steer them is written as its code."""

import re
from contextlib import AbstractContextManager

STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but for tab and newline: escape sequences begin with one
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # turn the direction of writing
    "\u2028\u2029\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # line separators, byte-order mark, annotations, tags
    "\ud800-\udfff]"  # halves of characters, of a file name that is no UTF-8
)
FONT = "DejaVu Sans"
"""The font that matplotlib brings along."""
LETTERS = 40
"""Greatest number of characters of a name in a figure."""


def printable(text: str) -> str:
    r"""Text in which characters that steer a terminal, or turn the text around, are written as their codes.

    >>> printable("\x1b[31mred\u202e, two\nlines")
    '\\x1b[31mred\\u202e, two\nlines'
    """
    return STEERING.sub(lambda found: _code(found[0]), text)


def drawable(text: str, most: int = LETTERS) -> str:
    r"""Text as a figure can show it: one line of at most so many characters, all of which matplotlib's font has.

    Others are written as their codes. That a dollar sign begins no formula is up to `plain_text`.

    >>> drawable("a\nb 犬"), drawable("x" * 50, 5)
    ('a\\nb \\u72ac', 'xxxx…')
    """
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(FONT))
    beginning = printable(text[: most + 1])
    shown = "".join(c if font.get_char_index(ord(c)) else _code(c) for c in beginning)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def plain_text() -> AbstractContextManager[None]:
    """The block in which matplotlib draws text in the font of `drawable`, and takes no dollar sign for a formula."""
    import matplotlib

    return matplotlib.rc_context({"text.parse_math": False, "font.family": [FONT]})


def _code(character: str) -> str:
    """A character's code as Python writes it."""
    return character.encode("unicode_escape").decode()
