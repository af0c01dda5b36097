"""A defence that is asked for, and what identifies its row in a record.

A file of its own, since whoever measures a defence needs it and nothing else of a spec.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Table = dict[str, Any]
SCREENED = 1000
"""A screen scores so many images of each kind (held out, clean, triggered), where nobody says otherwise."""


@dataclass(frozen=True)
class Named:
    """A defence that is asked for.

    Attributes:
        name: that it is registered under.
        method: the defence itself, with its settings.
        screened: how many images of each kind are scored; of screens alone.
    """

    name: str
    method: Any
    screened: int = SCREENED

    def table(self) -> Table:
        """As a spec has it, under `[[defences]]`; the usual number of images is left out."""
        return {"name": self.name, **settings_of(asdict(self.method), self.screened)}


def settings_of(params: Mapping[str, Any], screened: int) -> Table:
    """All settings that a defence is measured with; the usual number of images is left out."""
    return {**params, **({"screened": screened} if screened != SCREENED else {})}
