"""Where lines and marks stand, by hand."""

from typing import Any

import pytest

from tests.report.made import found, record, to_record
from vitrap.report.page.figures import points, span, styles, ticks, to_charts, to_scatter
from vitrap.report.page.summary import to_runs


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (21.2, 34.9, (20, 25, 30, 35)),
        (0.0, 100.0, (0, 20, 40, 60, 80, 100)),
        (25.0, 25.0, (25, 25.000000001)),
        (99.9, 100.0, (99.9, 99.92, 99.94, 99.96, 99.98, 100.0)),
    ],
)
def test_ticks_are_round_and_span_the_range(low: float, high: float, marks: tuple[float, ...]) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert found == pytest.approx(marks)


def test_marks_stand_at_their_values() -> None:
    made = [record(asr=0.5, psnr=20.0), record(attack="ageb", number=1, asr=1.0, psnr=30.0)]
    scatter = to_scatter(to_runs([found(one) for one in made]))
    assert scatter is not None
    ageb, badnets = scatter.marks
    assert (badnets.x, ageb.x) == (52.0, 746.0)  # 760 wide, 52 free at the left, 14 at the right
    assert (badnets.y, ageb.y) == (185.0, 14.0)  # 400 high, 44 free below, 14 above
    assert (badnets.low, badnets.high) == (191.8, 178.2)  # 0.02 of 342 each way
    assert scatter.legend == (("ageb", 0, 0), ("badnets", 1, 1))
    assert [tick.text for tick in scatter.up] == ["0", "20", "40", "60", "80", "100"]


def test_one_psnr_stands_in_the_middle() -> None:
    scatter = to_scatter(to_runs([found(record(psnr=25.0))]))
    assert scatter is not None
    assert [tick.text for tick in scatter.across] == ["24", "24.5", "25", "25.5", "26"]
    assert scatter.marks[0].x == 399.0  # between 52 and 746


def test_no_runs_are_no_chart() -> None:
    assert to_scatter([]) is None


def test_styles_differ_for_thirty_six_attacks() -> None:
    assert len(set(styles([f"{i:02d}" for i in range(36)]).values())) == 36


def test_charts_have_rates_first_and_end_at_the_last_value() -> None:
    content = record()
    content["data"]["n_curves"] = {"cda": 500, "asr": 450}
    charts = {chart.title: chart for chart in to_charts(to_record(content))}
    assert list(charts) == [
        "clean accuracy (CDA), 500 held-out images",
        "attack success (ASR), 450 held-out images",
        "cross entropy",
    ]
    loss, asr = charts["cross entropy"], charts["attack success (ASR), 450 held-out images"]
    assert (loss.epochs, loss.top, loss.bottom) == (3, "2", "0")
    assert [(line.role, line.last) for line in loss.lines] == [("victim", "0.5"), ("twin", "0.4")]
    assert loss.lines[0].points == "0,0 110,45 220,68"  # 90 high: 0.5 of 2 is 22.5 up, 67.5 down
    assert [(line.role, line.last) for line in asr.lines] == [("victim", "95.0 %")]
    assert (asr.top, asr.bottom) == ("100 %", "0 %")


@pytest.mark.parametrize("curves", [{}, {"victim": {}}, {"victim": {"a": []}}])
def test_empty_curves_are_passed_over(curves: Any) -> None:
    assert to_charts(to_record(record() | {"curves": curves})) == ()


def test_one_epoch_is_a_level_line() -> None:
    assert points([0.5], 0.0, 1.0) == "0,45 220,45"


def test_a_range_is_never_empty() -> None:
    assert span([0.0, 0.0]) == (0.0, 1.0)
