"""The classes of a record's rows of defences: what was measured of a defence, on victim and clean twin.

There is a class for each kind of outcome. docs/record.md explains the keys. All rows begin with these:

- `kind`: the kind of outcome;
- `name` and `params`: the defence and all its settings;
- `version`: the defence's version, raised when its results change;
- `seconds`: wall-clock time on the victim, by step;
- `layer`: the layer that the defence looks at; "" where it looks at the model's outputs alone;
- `report`: numbers that the defence reports;
- `key`: hash of all that the row rests on; "" until the row is in a record;
- `no_backdoor`: the faults of the run's diagnosis by which there is no backdoor, so that nothing in the row is to the
  defence's credit; empty where there is one, and in older rows.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vitrap.experiment.defence_spec import SCREENED, settings_of
from vitrap.formats import Table
from vitrap.metrics.values import Auroc, Count, Rate, Rates, Share

OPTIONAL = {"optional": True}
"""Marks a field that is not written to a record while it has its default."""
RatesByFpr = dict[str, Rate | None]
"""A rate for each false positive rate, which is written as in `0.05`; None where no threshold resolves that."""
RATES_BY_FPR = ("tpr_at_fpr", "tied_at_fpr", "fpr_on_test", "tpr_at_fpr_on_hits", "fpr_on_clean_model")
"""The fields of a screen's row that are such rates."""


@dataclass(frozen=True, kw_only=True)
class ScreenRow:
    """A screen: how well its scores tell triggered images from clean ones.

    Rates are given for each false positive rate, at the threshold that so large a share of held-out images exceeds.
    They are None where that share is less than one image, and no threshold has such a rate.

    Attributes:
        auroc: of triggered against clean test images.
        tpr_at_fpr: share of triggered images above the threshold.
        tied_at_fpr: share of triggered images whose score is the threshold itself.
        fpr_on_test: share of clean test images above the threshold.
        auroc_on_hits: as `auroc`, for those triggered images that fool the victim.
        tpr_at_fpr_on_hits: as `tpr_at_fpr`, for those.
        auroc_clean_model: as `auroc`, for the clean twin.
        fpr_on_clean_model: as `fpr_on_test`, for the clean twin and its own thresholds.
        n_threshold: number of held-out images.
        unresolved: for each false positive rate without a threshold, how many held-out images that needs.
        screened: number of images of each kind that are scored; all where there are fewer.
        scores: the file in the run's folder with the score of each image; "" in older rows.
    """

    kind: Literal["screen"] = "screen"
    name: str
    params: Table
    version: int = 1
    seconds: dict[str, float]
    layer: str
    report: Table
    key: str = ""
    no_backdoor: tuple[str, ...] = field(default=(), metadata=OPTIONAL)
    auroc: Auroc
    tpr_at_fpr: RatesByFpr
    tied_at_fpr: RatesByFpr = field(default_factory=dict, metadata=OPTIONAL)
    fpr_on_test: RatesByFpr
    auroc_on_hits: Auroc
    tpr_at_fpr_on_hits: RatesByFpr
    auroc_clean_model: Auroc
    fpr_on_clean_model: RatesByFpr
    n_threshold: Count
    unresolved: dict[str, str] = field(default_factory=dict, metadata=OPTIONAL)
    screened: Count = SCREENED
    scores: str = field(default="", metadata=OPTIONAL)

    def __post_init__(self) -> None:
        """Leave out the rates at thresholds that the held-out images cannot resolve, of older rows as well.

        Raises:
            ValueError: a key is no false positive rate, or tables have rates for different ones.
        """
        why = {fpr: reason for fpr in self.tpr_at_fpr if (reason := _unresolved(fpr, self.n_threshold))}
        object.__setattr__(self, "unresolved", why)
        for name in RATES_BY_FPR:
            table = getattr(self, name)
            if name == "tied_at_fpr" and not table:  # an older row
                continue
            if extra := sorted(table.keys() - self.tpr_at_fpr.keys()):
                raise ValueError(f"{name} has a rate for {extra[0]!r}, and tpr_at_fpr has none")
            rates = {fpr: None if fpr in why else table.get(fpr) for fpr in self.tpr_at_fpr}
            if missing := [fpr for fpr, rate in rates.items() if rate is None and fpr not in why]:
                raise ValueError(f"{name} has no rate for {missing[0]!r}")
            object.__setattr__(self, name, rates)


def _unresolved(fpr: str, n_threshold: int) -> str:
    """Why so many held-out images give no threshold of this false positive rate; "" where they do."""
    if not 1e-6 <= float(fpr) < 1:
        raise ValueError(f"{fpr!r} is no false positive rate")
    needed = math.ceil(1 / float(fpr))
    return "" if n_threshold >= needed else f"needs {needed} held-out images, has {n_threshold}"


@dataclass(frozen=True, kw_only=True)
class RepairRow:
    """A repair: CDA, ASR and RA of the victim after and before it.

    Attributes:
        cda: of the repaired victim, as are `asr` and `ra`.
        before: rates of the victim before its repair.
        der: defence effectiveness rate; 0.5 for no effect.
        cda_clean_model: of the clean twin after its repair.
        cda_clean_model_before: of the clean twin before its repair.
    """

    kind: Literal["repair"] = "repair"
    name: str
    params: Table
    version: int = 1
    seconds: dict[str, float]
    layer: str
    report: Table
    key: str = ""
    no_backdoor: tuple[str, ...] = field(default=(), metadata=OPTIONAL)
    cda: Rate
    asr: Rate
    ra: Rate
    before: Rates
    der: Share
    cda_clean_model: Rate
    cda_clean_model_before: Rate


@dataclass(frozen=True, kw_only=True)
class FilterRow:
    """A filter: which training images it flags, and how a model trained on the rest behaves.

    Attributes:
        auroc: of poisoned against other training images.
        tpr: share of the poisoned images that it flags.
        fpr: share of the other images that it flags.
        n_flagged: number of images flagged.
        cda_retrained: of the network trained on the images left, as are `asr_retrained` and `ra_retrained`.
        fpr_on_clean_model: share of the clean training set that it flags, given the clean twin.
    """

    kind: Literal["filter"] = "filter"
    name: str
    params: Table
    version: int = 1
    seconds: dict[str, float]
    layer: str
    report: Table
    key: str = ""
    no_backdoor: tuple[str, ...] = field(default=(), metadata=OPTIONAL)
    auroc: Auroc
    tpr: Rate
    fpr: Rate
    n_flagged: Count
    cda_retrained: Rate
    asr_retrained: Rate
    ra_retrained: Rate
    fpr_on_clean_model: Rate


@dataclass(frozen=True)
class Verdict:
    """A judgement's verdict on one model.

    Attributes:
        score: higher for a backdoored model.
        backdoored: whether the score is above the paper's threshold.
        suspected: the class that the backdoor seems to lead to; None where the method names none.
        suspected_classes: all classes that it may lead to, the likeliest first; None in older rows.
        by_class: a score for each class; None where the method has none.
    """

    score: float
    backdoored: bool
    suspected: int | None
    suspected_classes: tuple[int, ...] | None = None
    by_class: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class JudgementRow:
    """A judgement: its verdict on the victim and, under `..._clean_model`, on the clean twin; see `Verdict`.

    Attributes:
        threshold: the paper's threshold.
        suspects_target: whether `suspected` is a class that the goal leads to; None where it leads to every class.
    """

    kind: Literal["judgement"] = "judgement"
    name: str
    params: Table
    version: int = 1
    seconds: dict[str, float]
    layer: str
    report: Table
    key: str = ""
    no_backdoor: tuple[str, ...] = field(default=(), metadata=OPTIONAL)
    score: float
    backdoored: bool
    suspected: int | None
    suspected_classes: tuple[int, ...] | None = field(default=None, metadata=OPTIONAL)
    by_class: tuple[float, ...] | None = None
    threshold: float
    suspects_target: bool | None
    score_clean_model: float
    backdoored_clean_model: bool
    suspected_clean_model: int | None
    suspected_classes_clean_model: tuple[int, ...] | None = field(default=None, metadata=OPTIONAL)
    by_class_clean_model: tuple[float, ...] | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict on the victim."""
        return Verdict(self.score, self.backdoored, self.suspected, self.suspected_classes, self.by_class)

    @property
    def verdict_clean_model(self) -> Verdict:
        """The verdict on the clean twin."""
        return Verdict(
            self.score_clean_model,
            self.backdoored_clean_model,
            self.suspected_clean_model,
            self.suspected_classes_clean_model,
            self.by_class_clean_model,
        )


Row = Annotated[ScreenRow | RepairRow | FilterRow | JudgementRow, Field(discriminator="kind")]
"""A row of whichever kind its `kind` says."""


def row_settings(row: Row) -> Table:
    """All settings that a row was measured with; of a screen, `screened` where it is not the default."""
    return settings_of(row.params, row.screened if isinstance(row, ScreenRow) else SCREENED)


def lacks_scores(row: Row, folder: Path) -> bool:
    """Whether a row names a file of scores that is missing from the run's folder."""
    return isinstance(row, ScreenRow) and row.scores != "" and not os.path.exists(folder / row.scores)
