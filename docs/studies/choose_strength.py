"""How the embedded default's strength was chosen: `python docs/studies/choose_strength.py OUT`.

Thirty per cent of the training set are held out; each setting is trained on the rest and measured on the first third
of the hold-out. The default is the one with the highest ASR among those at PSNR >= 20 dB whose CDA is within two
points of the clean twin's. The test set is not looked at. Writes results/choice/digits.json; about 4 minutes.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import vitrap

ROOT = Path(__file__).parents[2]
HOLDOUT = 0.3
SETTINGS = (
    {"alpha": 0.3, "signal": 8.0, "tau": 0.5, "poison_rate": 0.2},
    {"alpha": 0.3, "signal": 12.0, "tau": 0.5, "poison_rate": 0.2},
    {"alpha": 0.3, "signal": 12.0, "tau": 0.7, "poison_rate": 0.2},
    {"alpha": 0.3, "signal": 12.0, "tau": 0.5, "poison_rate": 0.1},
    {"alpha": 0.3, "signal": 16.0, "tau": 0.5, "poison_rate": 0.2},
    {"alpha": 0.2, "signal": 12.0, "tau": 0.3, "poison_rate": 0.2},
    {"alpha": 0.4, "signal": 24.0, "tau": 0.5, "poison_rate": 0.2},
)


def main(out: str) -> None:
    """Measure every setting, choose, write."""
    world = vitrap.open_data("digits", holdout=HOLDOUT)
    world = replace(world, test=world.choose)
    measured = []
    for setting in SETTINGS:
        overrides = [f"attack.{k}={v}" for k, v in setting.items()]
        record = vitrap.run(vitrap.load_spec(None, [*overrides, f"data.holdout={HOLDOUT}"]), out, world=world)
        measured.append({"setting": setting, "victim": record.victim})
    allowed = [m for m in measured if admissible(m["victim"])]
    chosen = max(allowed, key=lambda m: m["victim"]["asr"]["value"])["setting"] if allowed else None
    found = {"holdout": HOLDOUT, "n": len(world.test), "chosen": chosen, "measured": measured}
    place = ROOT / "results" / "choice" / "digits.json"
    place.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def admissible(victim: dict[str, Any]) -> bool:
    """Visible and harmful settings are out."""
    harmless = victim["cda"]["value"] >= victim["cda_clean_model"]["value"] - 0.02
    return harmless and victim["stealth"]["psnr_db"]["mean"] >= 20


if __name__ == "__main__":
    main(sys.argv[1])
