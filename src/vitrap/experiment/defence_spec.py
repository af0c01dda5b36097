"""`DefenceSpec`: a defence with its settings, as a spec or a command names it.

It has a file of its own because the code that measures a defence depends on it, and on nothing else of a spec: an edit
of spec.py then leaves the rows of a record valid.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vitrap.formats import Table

SCREENED = 1000
"""By default a screen scores so many images of each kind: held out, clean, triggered."""


@dataclass(frozen=True)
class DefenceSpec:
    """A defence to be measured.

    Attributes:
        name: the name that it is registered under.
        method: the defence itself, with its settings.
        screened: how many images of each kind a screen scores.
    """

    name: str
    method: Any
    screened: int = SCREENED

    def table(self) -> Table:
        """The table that stands for it in a spec's `[[defences]]`; `screened` is left out where it is the default."""
        return {"name": self.name, **settings_of(asdict(self.method), self.screened)}


def settings_of(params: Mapping[str, Any], screened: int) -> Table:
    """All settings that a defence is measured with; `screened` is left out where it is the default."""
    return {**params, **({"screened": screened} if screened != SCREENED else {})}
