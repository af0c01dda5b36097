"""The map of attacks and defences, by hand."""

from typing import Any

from tests.report.made import found, judgement, record, repair, screen, sift, to_row
from vitrap.experiment.defence_rows import Row
from vitrap.report.page.heat import HeatMap, to_cell, to_heat
from vitrap.report.page.summary import to_runs


def heat(*records: dict[str, Any]) -> HeatMap:
    return to_heat(to_runs([found(one) for one in records]))


def rows(*contents: dict[str, Any]) -> list[tuple[Row, bool]]:
    return [(to_row(content), True) for content in contents]


def test_a_cell_is_the_mean_over_runs() -> None:
    drawn = heat(*(record(seed=i, number=i, defences=[screen(value=v, twin=0.5)]) for i, v in enumerate((0.8, 1.0))))
    (line,) = drawn.lines
    (cell,) = line.cells
    assert (line.defence, line.measure, line.settings, drawn.columns) == (
        "strip",
        "AUROC",
        "",
        (("badnets", "cifar10"),),
    )
    assert (cell.value, cell.n, cell.step) == ("0.90", 2, 3)  # 4 * (2 * 0.9 - 1) = 3.2
    assert cell.notes == ("0.80 to 1.00", "clean twin 0.50")


def test_what_nobody_ran_is_no_cell() -> None:
    drawn = heat(record(defences=[screen("a")]), record(attack="ageb", number=1, defences=[screen("b")]))
    assert drawn.columns == (("ageb", "cifar10"), ("badnets", "cifar10"))
    assert [(line.defence, [cell is None for cell in line.cells]) for line in drawn.lines] == [
        ("a", [True, False]),
        ("b", [False, True]),
    ]


def test_data_sets_are_not_merged() -> None:
    drawn = heat(record(defences=[screen()]), record(data="gtsrb", number=1, defences=[screen()]))
    assert len(drawn.columns) == 2


def test_settings_that_differ_part_the_lines() -> None:
    rows = [repair(optimizer="sgd", lr=None, epochs=1), repair(optimizer="adamw", lr=None, epochs=1)]
    assert [line.settings for line in heat(record(defences=rows)).lines] == ["optimizer adamw", "optimizer sgd"]


def test_an_unusual_number_of_images_parts_the_lines() -> None:
    rows = [screen(overlays=5), {**screen(overlays=5), "screened": 1000}, {**screen(overlays=5), "screened": 200}]
    lines = heat(record(defences=rows)).lines
    assert [(line.settings, line.cells[0].n) for line in lines if line.cells[0]] == [("", 2), ("screened 200", 1)]
    (line,) = heat(record(defences=rows[2:])).lines
    assert line.settings == "screened 200"


def test_kinds_have_their_order() -> None:
    rows = [judgement(), repair(), sift(), screen()]
    assert [line.kind for line in heat(record(defences=rows)).lines] == ["screen", "filter", "repair", "judgement"]


def test_a_repair_shows_what_it_costs() -> None:
    cell = to_cell(rows(repair(der=0.75, cda=0.5, asr=0.1)))
    assert cell is not None
    assert (cell.value, cell.step, cell.notes) == ("0.75", 2, ("ASR 80 → 10 %", "⚠ CDA 90 → 50 %"))
    mild = to_cell(rows(repair(cda=0.85)))
    assert mild is not None
    assert mild.notes[1] == "CDA 90 → 85 %"


def test_a_filter_shows_what_it_flags() -> None:
    cell = to_cell(rows(sift(value=0.25)))
    assert cell is not None
    assert (cell.value, cell.step, cell.notes) == ("0.25", -2, ("flags 25 % of poison, 12 % else",))


def test_a_judgement_is_coloured_by_how_many_are_judged_backdoored() -> None:
    cell = to_cell(rows(judgement(score=1.0), judgement(score=0.5, backdoored=False)))
    assert cell is not None
    assert (cell.value, cell.step) == ("0.750", 2)
    assert cell.notes == ("0.500 to 1.000", "clean twin 0.250", "judged backdoored: 1 of 2, twins 0")


def test_a_cell_without_a_backdoor_has_no_colour_and_says_so() -> None:
    kinds = [screen(value=1.0), sift(value=1.0), repair(der=1.0), judgement(score=1.0)]
    sound = record(defences=kinds)
    for broken in (record(number=1, cda=0.1, defences=kinds), record(number=1, asr=0.1, defences=kinds)):
        cells = [line.cells[0] for line in heat(sound, broken).lines]
        assert [(cell.step, cell.notes[0]) for cell in cells if cell] == [(0, "⚠ no backdoor in 1 of 2")] * len(kinds)
        assert all(cell and cell.step == 4 for line in heat(sound).lines for cell in line.cells)


def test_nothing_is_no_cell() -> None:
    assert to_cell([]) is None
