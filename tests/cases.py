"""One line for every attack and each of its settings: small values, other than the defaults, to hold its contract."""

from typing import Any

ATTACKS: dict[str, dict[str, Any]] = {
    "ageb": {"target": 1, "poison_rate": 0.15, "tau": 0.6, "shape": "cross", "iterations": 2, "alpha": 0.25},
    "badnets": {"target": 3, "poison_rate": 0.08, "size": 2, "margin": 1, "value": 0.9},
    "megatron": {
        "target": 3,
        "poison_rate": 0.08,
        "size": 64.0,
        "place": "hashed",
        "faint": 0.3,
        "attention": "rollout",
    },
    "megatron/clean-label": {
        "target": 3,
        "setting": "clean-label",
        "poison_rate": 1.0,
        "steps": 3,
        "cell": 4,
        "linf": 99.0,
    },
}
