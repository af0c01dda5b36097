"""What runs and matrix cells cost in operations, counted, and what that comes to for a study of any size.

`python -m benchmarks.cost RUN results/scale/NAME.json` counts what every defence does to a finished run: torch notes
each matrix product while it is computed, so the count does not depend on the machine. With a spec in place of a run it
writes only the sizes.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitrap import registry

BACKWARD = 2
"""A backward pass makes two products for each one of the forward pass."""
GROWS_WITH = {
    "attention_block": "", "fine_tune": "clean", "max_softmax": "", "mm_bd": "classes", "patch_process": "clean",
    "psbd": "clean", "sage": "clean", "spectral": "train", "strip": "",
}  # fmt: skip
"""What the work of applying each counted defence grows with, "" for nothing; measuring comes on top."""
AT_MOST = {"psbd": "images"}
"""Its setting that bounds that."""
SCREENED = 1000
"""Images of a kind that a screen scores at most."""


@dataclass(frozen=True)
class Study:
    """A matrix of attacks, defences and seeds on one data set and network.

    Attributes:
        name: what it is called.
        forward: operations of one image's forward pass.
        weights: bytes of a model.
        n: images of "train", "test", "clean" and "threshold", and number of "classes".
        epochs: of each training.
        pixels: bytes of an image at working size.
        attacks, defences, seeds: how many.
        poison_rate: share of the training set.
    """

    name: str
    forward: float
    weights: float
    n: Mapping[str, int]
    epochs: int
    pixels: int
    attacks: int = 20
    defences: int = 20
    seeds: int = 3
    poison_rate: float = 0.1

    @property
    def victims(self) -> int:
        """Runs."""
        return self.attacks * self.seeds

    @property
    def trainings(self) -> int:
        """Victims, a clean twin for each seed, and a surrogate for all."""
        return self.victims + self.seeds + 1

    @property
    def training(self) -> float:
        """Operations of one training."""
        return (1 + BACKWARD) * self.forward * self.n["train"] * self.epochs

    @property
    def measuring(self) -> float:
        """Operations of a run beside its training: an eroding trigger on poison and test set, and four predictions."""
        return self.forward * (self.poison_rate * self.n["train"] + 5 * self.n["test"])


def passes(source: Mapping[str, Any], defence: str, n: Mapping[str, int]) -> float:
    """Forward passes of an image that a cell takes, on victim and twin together; a filter's retraining is left out.

    Args:
        source: what `count` found.
        defence: its name.
        n: numbers of images and classes to carry the count over to. Applying grows as `GROWS_WITH` has it; measuring
            with the test set, but for screens, which score a bounded number, and judgements, which are not measured.
    """
    found, was, law = source["defences"][defence], source["n"], GROWS_WITH[defence]
    if name := AT_MOST.get(defence):
        most = getattr(registry.get("defences", defence)(), name)
        n, was = {**n, law: min(n[law], most)}, {**was, law: min(was[law], most)}
    applied = 2 * found["apply"] * (n[law] / was[law] if law else 1)
    measured = max(0.0, found["row"] - 2 * found["apply"])
    if found["kind"] in ("repair", "filter"):
        measured *= n["test"] / was["test"]
    if found["kind"] == "screen":
        measured *= _scored(n) / _scored(was)
    return applied + measured


def _scored(n: Mapping[str, int]) -> int:
    return min(SCREENED, n["threshold"]) + 2 * min(SCREENED, n["test"])


def operations(study: Study, source: Mapping[str, Any]) -> dict[str, float]:
    """Operations of a study by what they are for, with defences that cost what the counted ones do on average."""
    counted = source["defences"]
    cell = sum(passes(source, name, study.n) for name in counted) / len(counted) * study.forward
    filters = sum(found["kind"] == "filter" for found in counted.values()) / len(counted)
    cells = study.victims * study.defences
    return {
        "trainings": study.trainings * study.training,
        "measures": study.victims * study.measuring,
        "defences": cells * cell,
        "retraining for filters": cells * filters * study.training,
    }


def counted(work: Callable[[], object]) -> float:
    """Floating-point operations of the matrix products in a call, by torch's own formulas.

    Not by its `FlopCounterMode`, which also follows modules, and so refuses gradients at an image.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        total = 0.0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if (formula := flop_registry.get(func.overloadpacket)) is not None:
                self.total += formula(*args, **(kwargs or {}), out_val=out)
            return out

    with Counter() as counter:
        work()
    return counter.total


def sizes(plan: Any) -> dict[str, Any]:
    """Operations of one image's forward pass, bytes of the weights, and numbers of images and classes of a plan."""
    import torch

    model, one = plan.victim.build(0).eval(), plan.world.test.images(torch.arange(1))
    with torch.no_grad():
        forward = counted(lambda: model(one))
    n = {part: len(getattr(plan.world, part)) for part in ("train", "test", "clean", "threshold")}
    weights = sum(w.numel() * w.element_size() for w in model.parameters())
    return {"forward": forward, "weights": weights, "n": {**n, "classes": plan.world.train.n_classes}}


def count(run: Path) -> dict[str, Any]:
    """The sizes of a run, what applying each defence to its victim takes, and what its whole row of the record does."""
    from vitrap.experiment.defence_spec import DefenceSpec
    from vitrap.experiment.defend import FinishedRun
    from vitrap.experiment.measure_defences import measure_defence, measure_each_time
    from vitrap.experiment.plan import make_plan
    from vitrap.experiment.progress import no_progress
    from vitrap.experiment.records import read_record
    from vitrap.experiment.spec import parse_spec

    record = read_record(run)
    spec = replace(parse_spec(record.spec), name=record.name, defences=())
    plan = make_plan(spec, "cpu", with_surrogates=False)
    case = FinishedRun(run, record, plan, no_progress).evaluation()
    # a retraining is counted as a training
    case = replace(case, result_on_twin=measure_each_time, train_on_kept=lambda kept: case.twin)
    poisoned = case.poisoned.unmarked()
    assert case.before  # made once, before anything is counted
    found = sizes(plan)
    defences: dict[str, Any] = {}
    for name in registry.names("defences"):
        defence = registry.get("defences", name)()
        suspect = case.suspect(case.victim, poisoned if defence.needs_train else None, name)
        apply = counted(lambda: defence.apply(suspect))  # noqa: B023 - called at once
        row = counted(lambda: measure_defence(DefenceSpec(name, defence), case, lambda: None))  # noqa: B023
        defences[name] = {"kind": defence.kind, "apply": apply / found["forward"], "row": row / found["forward"]}
    return {"spec": record.spec, **found, "defences": defences}


def main(source: Path, kept: Path) -> None:
    """Count a finished run, or only the sizes of a spec, and write them as JSON."""
    from vitrap.experiment.plan import make_plan
    from vitrap.experiment.spec import load_spec

    found = sizes(make_plan(load_spec(source), "cpu")) if source.is_file() else count(source)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
