"""`UserError`, the error for users: one line that says what is wrong, where, and how to mend it."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UserError(ValueError):
    """A user's mistake. The command line prints its message without a traceback, and exits with code 2."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error that `name` is no known `kind`; it suggests the most similar name, and lists the known ones.

    >>> str(unknown("attack", "agbe", ["ageb", "badnets"]))
    "unknown attack 'agbe'; did you mean 'ageb'? known: ageb, badnets"
    """
    names = sorted(known)
    near = get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    shown = names if len(names) <= 40 else get_close_matches(str(name), names, n=8, cutoff=0.3)
    return UserError(f"unknown {kind} {name!r}{hint} {'known' if shown is names else 'close'}: {', '.join(shown)}")


def some_of(names: Sequence[str], most: int = 3) -> str:
    """How many names there are, and the first of them.

    >>> some_of(["a", "b", "c", "d", "e"]), some_of(["a"])
    ('5: a, b, c and 2 more', '1: a')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)}: {', '.join(names[:most])}{more}"
