"""`UserError`, the error for users: one line that says what is wrong, where, and how to mend it."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UserError(ValueError):
    """A user's mistake. The command line prints its message without a traceback, and exits with code 2."""


def shown(value: object, most: int = 100) -> str:
    """A value as a message shows it: as Python writes it, cut in the middle where that is longer than `most`.

    >>> shown("abc"), shown("a" * 1000, 20)
    ("'abc'", "'aaaaaaa...aaaaaaa'")
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, say
        return f"a huge {type(value).__name__}"
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error that `name` is no known `kind`; it suggests the most similar name, and lists the known ones.

    >>> str(unknown("attack", "agbe", ["ageb", "badnets"]))
    "unknown attack 'agbe'; did you mean 'ageb'? known: ageb, badnets"
    """
    names = sorted(known)
    wanted = str(name)[:100]
    near = get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    listed = names if len(names) <= 40 else get_close_matches(wanted, names, n=8, cutoff=0.3)
    title = "known" if listed is names else "close"
    return UserError(f"unknown {kind} {shown(name)}{hint} {title}: {', '.join(listed)}")


def some_of(names: Sequence[str], most: int = 3) -> str:
    """How many names there are, and the first of them.

    >>> some_of(["a", "b", "c", "d", "e"]), some_of(["a"])
    ('5: a, b, c and 2 more', '1: a')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)}: {', '.join(names[:most])}{more}"
