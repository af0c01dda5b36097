"""How the strengths of specs were chosen: `python docs/studies/choose_strength.py NAME OUT`, NAME a key of CHOICES.

Part of the training set is held out; each setting is trained on the rest and measured on the first third of the
hold-out. Chosen is the setting with the highest ASR among those that are faint and harmless enough. The test set is
not looked at. Writes results/choice/NAME.json; OUT keeps the runs. About 4 minutes for digits, 15 for the others.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import vitrap
from vitrap.experiment.record import to_table
from vitrap.metrics.values import Measures

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Choice:
    """What was tried for a spec, and what was asked of it.

    Attributes:
        spec: the spec that the settings go over; None for the embedded default.
        holdout: share of the training set held out.
        psnr: least PSNR, dB.
        loss: greatest loss of CDA against the clean twin.
        settings: the attack's parameters tried.
        attack: its name.
    """

    spec: str | None
    holdout: float
    psnr: float
    loss: float
    settings: tuple[Mapping[str, float], ...]
    attack: str = "ageb"

    def allows(self, victim: Measures) -> bool:
        """Whether a measured setting may be chosen."""
        loss = victim.cda_clean_model.value - victim.cda.value
        return loss <= self.loss and victim.stealth.psnr_db.mean >= self.psnr


CHOICES = {
    "digits": Choice(None, 0.3, 20, 0.02, (
        {"alpha": 0.3, "signal": 8, "tau": 0.5, "poison_rate": 0.2},
        {"alpha": 0.3, "signal": 12, "tau": 0.5, "poison_rate": 0.2},
        {"alpha": 0.3, "signal": 12, "tau": 0.7, "poison_rate": 0.2},
        {"alpha": 0.3, "signal": 12, "tau": 0.5, "poison_rate": 0.1},
        {"alpha": 0.3, "signal": 16, "tau": 0.5, "poison_rate": 0.2},
        {"alpha": 0.2, "signal": 12, "tau": 0.3, "poison_rate": 0.2},
        {"alpha": 0.4, "signal": 24, "tau": 0.5, "poison_rate": 0.2},
    )),
    # on the study model; every setting cost more clean accuracy than one would like, so that none is refused for it
    "gtsrb": Choice("specs/study.toml", 0.1, 25, 1.0, (
        {"alpha": 0.2, "signal": 12, "tau": 0.5, "size": 3},
        {"alpha": 0.0, "signal": 12, "tau": 0.5, "size": 3},
        {"alpha": 0.2, "signal": 12, "tau": 0.5, "size": 5},
        {"alpha": 0.4, "signal": 12, "tau": 0.5, "size": 5},
        {"alpha": 0.4, "signal": 16, "tau": 0.6, "size": 5},
        {"alpha": 0.5, "signal": 12, "tau": 0.5, "size": 5},
        {"alpha": 0.5, "signal": 12, "tau": 0.5, "size": 7},
        {"alpha": 0.6, "signal": 12, "tau": 0.5, "size": 7},
    )),
    # weights of the two losses, at a poison rate at which cross-entropy alone (0, 0) fails
    "megatron": Choice("specs/study.toml", 0.1, 25, 0.01, tuple(
        {"poison_rate": 0.01, "latent": latent, "diffusion": diffusion}
        for latent, diffusion in (
            (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (10.0, 1.0), (1.0, 0.1), (0.0, 0.1), (10.0, 0.1),
            (0.1, 0.1), (1.0, 0.3), (1.0, 0.03),
        )
    ), "megatron"),
}  # fmt: skip


def main(name: str, out: str) -> None:
    """Measure every setting, choose, write."""
    choice = CHOICES[name]
    measured = []
    for setting in choice.settings:
        overrides = [f"attack.name={choice.attack}", f"data.holdout={choice.holdout}"]
        spec = vitrap.load_spec(choice.spec, [*overrides, *(f"attack.{k}={v}" for k, v in setting.items())])
        world = vitrap.open_data(spec.data.name, limit=spec.data.limit, holdout=choice.holdout)
        record = vitrap.run(spec, out, world=replace(world, test=world.choose))
        measured.append((setting, record.victim))
    write(name, choice, measured)


def write(name: str, choice: Choice, measured: Sequence[tuple[Mapping[str, float], Measures]]) -> None:
    """Keep what was measured and what was chosen."""
    allowed = [(victim.asr.value, setting) for setting, victim in measured if choice.allows(victim)]
    chosen = max(allowed, key=itemgetter(0))[1] if allowed else None
    found = {
        "spec": choice.spec,
        "attack": choice.attack,
        "holdout": choice.holdout,
        "least_psnr_db": choice.psnr,
        "greatest_loss_of_cda": choice.loss,
        "chosen": chosen,
        "measured": [{"setting": dict(setting), "victim": to_table(victim)} for setting, victim in measured],
    }
    place = ROOT / "results" / "choice" / f"{name}.json"
    place.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
