"""One line for every attack: small settings, other than the defaults, that its contract is held with."""

from typing import Any

ATTACKS: dict[str, dict[str, Any]] = {
    "ageb": {"target": 1, "poison_rate": 0.15, "tau": 0.6, "shape": "cross", "iterations": 2, "alpha": 0.25},
    "badnets": {"target": 3, "poison_rate": 0.08, "size": 2, "margin": 1, "value": 0.9},
}
