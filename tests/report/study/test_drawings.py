"""Figures of a sweep's records: what they show, and that the file says what it was drawn from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.report.made import judgement, record, repair, screen
from tests.report.study.test_fill_page import HEAD, at, study
from vitrap.errors import UserError
from vitrap.report.study.drawings import figure_data
from vitrap.report.study.fill_page import Study, fill_page, open_study

HEAT = """
[[figure]]
kind = "heat"
file = "a.png"
title = "A heat map"
rows = "defence"
columns = "attack.poison_rate"
scale = "1: caught"
blocks = [{kind = "screen", measure = "auroc", heading = "AUROC"}, {kind = "repair", measure = "der", heading = "DER"}]
"""
SCATTER = """
[[figure]]
kind = "scatter"
file = "a.png"
title = "A cloud"
x = "stealth.psnr_db"
y = "asr"
series = "data.name"
note = "attack.poison_rate"
xlabel = "PSNR, dB"
ylabel = "ASR"
percent = ["attack.poison_rate"]
"""
LINES = """
[[figure]]
kind = "lines"
file = "a.png"
title = "Lines"
x = "attack.poison_rate"
y = "asr"
series = "data.name"
xlabel = "poison rate"
ylabel = "ASR, %"
percent = ["attack.poison_rate"]
"""
CURVES = """
[[figure]]
kind = "curves"
file = "a.png"
title = "Curves"
x = "stealth.psnr_db"
y = "asr"
series = "attack.threat"
xlabel = "PSNR, dB"
ylabel = "ASR, %"
bold = ["data"]
"""
DEFENDED = HEAD.replace("[data]", '[[defences]]\nname = "strip"\n[[defences]]\nname = "fine_tune"\n[data]')
TWO = '[grid]\nseed = [0, 1]\n"attack.poison_rate" = [0.1, 0.2]\n'


def opened(folder: Path, records: list[dict[str, Any]], figure: str, head: str = HEAD) -> Study:
    return open_study(study(folder, records, figure, TWO, head), folder / "runs")


def test_a_heat_map_has_means_over_seeds_and_says_over_how_many(tmp_path: Path) -> None:
    found = [
        record(seed=0, number=0, defences=[screen(value=0.8), repair(der=0.7), judgement()]),
        record(seed=1, number=1, defences=[screen(value=0.6)]),
    ]
    one = opened(tmp_path, found, HEAT, DEFENDED)
    shown = [(c["row"], c["column"], c["measure"], c["value"], c["seeds"]) for c in data(one)]
    assert shown == [
        ("strip", "0.1", "AUROC", pytest.approx(0.7), 2),
        ("strip", "0.2", "AUROC", None, 0),
        ("fine_tune", "0.1", "DER", 0.7, 1),
        ("fine_tune", "0.2", "DER", None, 0),
    ]


def data(one: Study) -> list[dict[str, Any]]:
    (figure,) = one.page.figures
    return figure_data(figure, one.entries)


@pytest.mark.parametrize("figure", [SCATTER, LINES, CURVES])
def test_only_a_heat_map_has_blocks(tmp_path: Path, figure: str) -> None:
    with pytest.raises(UserError, match=r"unknown key 'figure\[0\]\.blocks'"):
        opened(tmp_path, at((0.5,)), f"{figure}blocks = []\n")


def test_marks_are_runs_with_their_intervals_and_a_missing_run_has_none(tmp_path: Path) -> None:
    one = opened(tmp_path, at((0.5,)), SCATTER)
    first, *others = data(one)
    assert first == {"x": 25.0, "y": [0.5, 0.48, 0.52], "data.name": "cifar10", "attack.poison_rate": "10 %"}
    assert [point["y"] for point in others] == [None, None, None]


def test_the_points_of_a_curve_are_runs_under_what_the_attacker_controls(tmp_path: Path) -> None:
    assert data(opened(tmp_path, at((0.5,)), CURVES))[0] == {"x": 25.0, "y": [0.5, 0.48, 0.52], "attack.threat": "data"}


FIGURES = {"heat": HEAT, "scatter": SCATTER, "lines": LINES, "curves": CURVES}


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES)
@pytest.mark.parametrize("there", [0, 1, 2])
def test_a_picture_is_current_until_its_figures_or_its_lines_change(tmp_path: Path, figure: str, there: int) -> None:
    found = [record(seed=i, number=i, asr=0.5 + i / 10, defences=[screen(), repair()]) for i in range(there)]
    one = opened(tmp_path, found, figure, DEFENDED)
    assert [change.outdated for change in fill_page(one)] == [True]
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["Software"] == "vitrap"
        assert min(image.size) > 100
    assert [change.outdated for change in fill_page(one)] == [False]
    retitled = opened(tmp_path, [], figure.replace("title = ", 'title = "New" # '), DEFENDED)
    assert [change.outdated for change in fill_page(retitled, write=False)] == [True]
    changed = record(seed=0, number=0, asr=0.51, defences=[screen(value=0.91), repair()])
    assert [change.outdated for change in fill_page(opened(tmp_path, [changed], figure, DEFENDED), write=False)] == [
        True
    ]


def test_a_picture_that_is_none_is_outdated(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert [change.outdated for change in fill_page(opened(tmp_path, at((0.5,)), LINES), write=False)] == [True]


def test_a_new_folder_is_made_for_a_picture(tmp_path: Path) -> None:
    fill_page(opened(tmp_path, at((0.5,)), LINES.replace("a.png", "pictures/a.png")))
    assert (tmp_path / "pictures" / "a.png").exists()


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        (LINES.replace('y = "asr"', 'y = "acr"'), "unknown measure 'acr'"),
        (LINES.replace('series = "data.name"', 'series = "data.nam"'), "did you mean 'data.name'?"),
        (LINES.replace('x = "attack.poison_rate"', 'x = "attack.target"'), "differ by 'attack.poison_rate'"),
        (
            LINES.replace('x = "attack.poison_rate"', 'x = "attack.name"')
            + "where = {seed = 0, 'attack.poison_rate' = 0.1}",
            "'attack.name' = 'badnets' has no place on a logarithmic axis",
        ),
        (LINES.replace('y = "asr"', 'y = "stealth.psnr_db"'), "'stealth.psnr_db' is no rate"),
        (CURVES.replace('y = "asr"', 'y = "stealth.ssim"'), "'stealth.ssim' is no rate"),
        (HEAT.replace('measure = "der"', 'measure = "dre"'), "unknown measure 'dre'"),
        (HEAT.replace('columns = "attack.poison_rate"', 'columns = "seed"'), "differ by 'attack.poison_rate'"),
        (SCATTER.replace("xlabel", "xlable"), "did you mean 'figure[0].xlabel'?"),
        (SCATTER.replace('note = "attack.poison_rate"\n', ""), "figure[0].note"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, figure: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        fill_page(opened(tmp_path, [record(defences=[screen(), repair()])], figure, DEFENDED))
    assert said in str(refused.value)
    assert not (tmp_path / "a.png").exists()


THEIRS = {"a key": b"precious", "nothing": b"", "a picture": None}


@pytest.mark.parametrize("kind", THEIRS)
def test_a_figure_replaces_nothing_but_a_figure(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.png"
    if THEIRS[kind] is None:
        Image.new("RGB", (8, 8)).save(file)
    else:
        file.write_bytes(THEIRS[kind])
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"a\.png' is there, and is no figure of vitrap's; remove it"):
        fill_page(opened(tmp_path, at((0.5,)), LINES))
    assert file.read_bytes() == before


def elsewhere(folder: Path) -> str:
    return "../elsewhere/a.png"


def linked(folder: Path) -> str:
    (folder / "linked").symlink_to("../elsewhere")
    return "linked/a.png"


@pytest.mark.parametrize("name", [elsewhere, linked])
def test_a_figure_is_drawn_below_the_specs_folder_or_out_alone(tmp_path: Path, name: Callable[[Path], str]) -> None:
    spec, there = tmp_path / "spec", tmp_path / "elsewhere"
    spec.mkdir()
    there.mkdir()
    one = opened(spec, at((0.5,)), LINES.replace("a.png", name(spec)))
    with pytest.raises(UserError, match="does not lie below .*; give --out a folder that it lies below"):
        fill_page(one)
    assert list(there.iterdir()) == []
    fill_page(one, out=tmp_path)
    assert [file.name for file in there.iterdir()] == ["a.png"]


def test_a_figures_file_is_called_a_png(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"figure\[0\]\.file = '\.bashrc' is no name of a PNG; end it in \.png"):
        opened(tmp_path, [], LINES.replace("a.png", ".bashrc"))
