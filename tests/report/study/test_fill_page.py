"""Tables of a sweep's records: which record is a run's, what stands in a cell, what is refused."""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args

import pytest
from scipy.stats import ttest_rel
from statsmodels.stats.proportion import confint_proportions_2indep

from tests.report.made import failure, judgement, record, repair, screen, to_record, write
from vitrap.contracts import OutcomeKind
from vitrap.errors import UserError
from vitrap.experiment.record import to_table
from vitrap.experiment.records import read_records
from vitrap.experiment.spec import parse_spec
from vitrap.metrics.interval import wilson
from vitrap.report.study.collected import abridge, collect
from vitrap.report.study.entries import Value, current_hash, difference, entries, grouped
from vitrap.report.study.fill_page import fill, fill_page, open_study
from vitrap.report.study.layout import Kind
from vitrap.sweeps.grid import load_sweep

HEAD = """
name = "one"
[data]
name = "cifar10"
[model]
name = "vit_tiny_patch16_224"
depth = 4
[attack]
name = "badnets"
[recipe]
epochs = 3
"""
SEEDS = '[grid]\nseed = [0, 1, 2]\n"attack.poison_rate" = [0.1, 0.2]\n'
REACH = "each seed's own 95 % interval over images reaches at most 2.00 to either side; n = 900 images."
ASR = '[[table]]\npart = "asr"\nrows = "attack.poison_rate"\nmeasures = "asr"\n'
PAGE = '[page]\nfile = "page.md"\nrecords = "kept"\n'


def study(folder: Path, records: list[dict[str, Any]], tables: str = ASR, grid: str = SEEDS, head: str = HEAD) -> Path:
    """A sweep's spec, its page, and its runs."""
    (folder / "runs").mkdir(exist_ok=True)
    for content in records:
        write(folder / "runs", content)
    path = folder / "sweep.toml"
    path.write_text(head + grid + tables, "utf-8")
    return path


def made(folder: Path, records: list[dict[str, Any]], tables: str = ASR, grid: str = SEEDS, head: str = HEAD) -> str:
    """The one table of such a study."""
    (text,) = open_study(study(folder, records, tables, grid, head), folder / "runs").tables().values()
    return text


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without the rule below its head."""
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [lines[0], *lines[2:]]


def at(rates: tuple[float, ...], poison_rate: float = 0.1, start: int = 0) -> list[dict[str, Any]]:
    """A record for each ASR, seeds counting up."""
    return [record(seed=i, number=start + i, asr=asr, poison_rate=poison_rate) for i, asr in enumerate(rates)]


def test_a_table_knows_every_kind_of_defence() -> None:
    assert get_args(Kind) == ("", *get_args(OutcomeKind))


def test_seeds_are_summed_up_and_the_missing_are_shown(tmp_path: Path) -> None:
    text = made(tmp_path, [*at((0.5, 0.6, 0.7)), *at((0.25, 0.75), 0.2, 3)])
    # by hand: mean 60, deviations -10, 0, 10: sqrt(200 / 2) = 10; mean 50, deviations -25, 25: sqrt(1250) = 35.355
    assert cells(text) == [
        ["attack.poison_rate", "asr"],
        ["0.1", "60.00 ± 10.00"],
        ["0.2", "50.00 ± 35.36 (2 of 3 seeds)"],
    ]
    assert text.endswith(f"\n\nMean ± standard deviation over 3 seeds; {REACH}")
    assert f"{100 * mean((0.25, 0.75)):.2f} ± {100 * stdev((0.25, 0.75)):.2f}" == "50.00 ± 35.36"


def test_one_seed_stands_with_its_interval(tmp_path: Path) -> None:
    text = made(tmp_path, at((0.5,)), grid='[grid]\n"attack.poison_rate" = [0.1, 0.2]\n')
    assert cells(text)[1:] == [["0.1", "50.00 [48.00, 52.00]"], ["0.2", "not run"]]
    assert text.endswith("\n\nOne seed; in brackets: 95 % interval over images; n = 900 images.")


def test_one_seed_of_several_says_so(tmp_path: Path) -> None:
    assert cells(made(tmp_path, at((0.5,))))[1:] == [["0.1", "50.00 [48.00, 52.00] (1 of 3 seeds)"], ["0.2", "not run"]]


def test_a_failure_is_shown_unless_there_is_a_record(tmp_path: Path) -> None:
    lost = [failure("one", "no memory", number) for number in (7, 8)]
    for content, rate in zip(lost, (0.1, 0.2), strict=True):
        content["spec"] = record(poison_rate=rate)["spec"]
        write(tmp_path / "runs", content, "failure.json")
    text = made(tmp_path, at((0.5,)), grid='[grid]\n"attack.poison_rate" = [0.1, 0.2]\n')
    assert cells(text)[1:] == [["0.1", "50.00 [48.00, 52.00]"], ["0.2", "failed"]]


def test_an_older_record_is_met_by_what_its_spec_comes_to_current_hash(tmp_path: Path) -> None:
    path = study(tmp_path, at((0.5,)))
    made = read_records(tmp_path / "runs").records[0].record
    assert "optimizer" not in made.spec["recipe"], "a key that records of old do not have"
    points = load_sweep(path).points
    assert parse_spec(made.spec).hash() == points[0].spec.hash() != made.hash
    assert [e.state for e in entries(load_sweep(path), read_records(tmp_path / "runs"))] == ["found"] + ["not run"] * 5


def test_an_older_auto_is_the_precision_that_it_stood_for(tmp_path: Path) -> None:
    pinned, measured = record(), record()
    for content in (pinned, measured):
        content["spec"]["recipe"]["precision"] = "auto"
    measured["attention"] = "fused"
    there, spec = parse_spec(measured["spec"]).hash(), record()["spec"]
    assert current_hash(to_record(measured)) == there
    assert (
        current_hash(to_record(pinned))
        == parse_spec({**spec, "recipe": {**spec["recipe"], "precision": "fp32"}}).hash()
        != there
    )


def test_of_two_records_the_one_that_was_written_with_todays_hash_counts(tmp_path: Path) -> None:
    old, new = record(asr=0.25, number=1), record(asr=0.75)
    new["hash"] = parse_spec(new["spec"]).hash()
    for place in ("a", "b"):
        for i, content in enumerate((old, new) if place == "a" else (new, old)):
            write(tmp_path / place / "runs", content).rename(tmp_path / place / "runs" / str(i))
        assert cells(made(tmp_path / place, [], grid="[grid]\nseed = [0]\n"))[1][1].startswith("75.00")


PIVOT = '[[table]]\npart = "a"\nkind = "screen"\nrows = "defence"\ncolumns = "title"\nmeasures = "auroc"\ndigits = 3\n'
CASES = '[[grid.case]]\ntitle = "a | b"\nseed = [0, 1]\n[[grid.case]]\ntitle = "more"\nattack.poison_rate = 0.2\n'


def test_defences_are_met_by_name_and_settings(tmp_path: Path) -> None:
    head = HEAD.replace("[data]", '[[defences]]\nname = "strip"\n[[defences]]\nname = "strip"\noverlays = 50\n[data]')
    rows = [screen("strip", 0.9), screen("strip", 0.7, overlays=50), screen("max_softmax", 0.1)]
    found = [record(seed=0, defences=rows), record(seed=1, number=1, defences=rows[:1])]
    text = made(tmp_path, found, PIVOT, CASES, head)
    assert cells(text.replace(r"\|", "or")) == [
        ["defence", "a or b", "more"],
        ["`strip`, overlays 100", "0.900 ± 0.000", "not run"],
        ["`strip`, overlays 50", "0.700 [0.680, 0.720] (1 of 2 seeds)", "not run"],
    ]


def test_rows_that_differ_by_their_number_of_images_are_not_mixed(tmp_path: Path) -> None:
    head = HEAD.replace("[data]", '[[defences]]\nname = "strip"\n[[defences]]\nname = "strip"\nscreened = 200\n[data]')
    rows = [screen("strip", 0.75, overlays=100), {**screen("strip", 0.5, overlays=100), "screened": 200}]
    tables = '[[table]]\npart = "a"\nrows = ["defence", "defence.screened"]\nmeasures = ["auroc"]\ndigits = 3\n'
    grid = "[grid]\nseed = [0]\n"
    assert cells(made(tmp_path, [record(defences=rows)], tables, grid, head))[1:] == [
        ["`strip`", "1000", "0.750 [0.730, 0.770]"],
        ["`strip`, screened 200", "200", "0.500 [0.480, 0.520]"],
    ]
    mixed = '[[table]]\npart = "a"\nkind = "screen"\nrows = "seed"\nmeasures = ["auroc"]\n'
    with pytest.raises(UserError, match="a cell would mix runs that differ by 'defence"):
        made(tmp_path, [], mixed, grid, head)


def test_settings_of_defences_are_keys_and_a_measure_that_a_run_lacks_is_a_dash(tmp_path: Path) -> None:
    head = HEAD.replace("[data]", '[[defences]]\nname = "strip"\noverlays = 50\n[[defences]]\nname = "mm_bd"\n[data]')
    tables = '[[table]]\npart = "a"\nrows = ["defence", "defence.overlays"]\nmeasures = ["auroc", "score"]\n'
    found = [record(defences=[screen("strip", overlays=50), judgement()])]
    assert cells(made(tmp_path, found, tables, "[grid]\nseed = [0]\n", head))[1:] == [
        ["`strip`", "50", "0.90 [0.88, 0.92]", "–"],
        ["`mm_bd`", "–", "–", "0.99"],
    ]


DEFENDED = HEAD.replace("[data]", '[[defences]]\nname = "strip"\n[[defences]]\nname = "fine_tune"\n[data]')
ONE = "[grid]\nseed = [0, 1]\n"


@pytest.mark.parametrize(("kind", "measure"), [("screen", "auroc"), ("repair", "der"), ("screen", "tpr_at_fpr.0.05")])
def test_a_defence_without_a_backdoor_is_marked(tmp_path: Path, kind: str, measure: str) -> None:
    table = f'[[table]]\npart = "a"\nrows = "defence"\nkind = "{kind}"\nmeasures = "{measure}"\n'
    rows = [screen(), repair()]
    good, bad = record(defences=rows), record(seed=1, number=1, asr=0.1, defences=rows)
    text = made(tmp_path, [good, bad], table, ONE, DEFENDED)
    assert cells(text)[1][1].endswith(" †")
    assert "† no backdoor, so no credit to the defence" in text
    good["seed"] = good["spec"]["seed"] = 1
    (tmp_path / "good").mkdir()
    text = made(tmp_path / "good", [record(defences=rows), {**good, "hash": bad["hash"]}], table, ONE, DEFENDED)
    assert "†" not in text


def test_a_threshold_stands_with_its_held_out_images_or_is_none(tmp_path: Path) -> None:
    table = '[[table]]\npart = "a"\nrows = "defence"\nkind = "screen"\nmeasures = "tpr_at_fpr.0.05"\n'
    for folder, counts, shown, said in (
        ("both", (100, 1306), "30.00 ± 0.00", "thresholds from 100 to 1,306 held-out images."),
        ("one", (10, 100), "30.00 [28.00, 32.00] (1 of 2 seeds)", "– where these are too few for the false positive"),
        ("none", (1, 19), "–", "Thresholds from 1 to 19 held-out images; – where these are too few"),
    ):
        found = [
            record(seed=i, number=i, defences=[{**screen(), "n_threshold": count}]) for i, count in enumerate(counts)
        ]
        (tmp_path / folder).mkdir()
        text = made(tmp_path / folder, found, table, ONE, DEFENDED)
        assert said in text
        assert cells(text)[1][1] == shown, text


def test_a_mean_is_over_the_seeds_that_have_the_measure(tmp_path: Path) -> None:
    found = at((0.5, 0.5, 0.5))
    for content, lpips in zip(found, (0.1, None, 0.3), strict=True):
        content["victim"]["stealth"]["lpips"] = lpips and {"mean": lpips, "median": lpips}
    tables = ASR.replace('measures = "asr"', 'measures = ["asr", "stealth.lpips"]')
    wanted = ["0.1", "50.00 ± 0.00", "0.20 ± 0.14 (2 of 3 seeds)"]
    assert cells(made(tmp_path, found, tables))[1] == wanted


@pytest.mark.parametrize(
    ("kind", "rows", "measure", "wanted"),
    [
        ("judgement", [judgement(score=0.9), judgement(score=0.5)], '{measure = "score", show = "each"}', "0.90, 0.50"),
        ("judgement", [judgement(), judgement(backdoored=False)], '{measure = "backdoored", show = "count"}', "1 of 2"),
        ("repair", [repair(), repair()], '{measure = "cda / asr", show = "n"}', "1000 / 1000"),
        ("repair", [repair(cda=0.8), repair(cda=0.6)], '"before.cda - cda"', "20.00 ± 14.14"),
        ("repair", [repair(cda=0.8), repair(cda=0.6)], '"cda / der"', "70.00 ± 14.14 / 0.70 ± 0.00"),
        ("repair", [repair(), repair()], '{measure = "der", show = "n"}', "–"),
        ("screen", [screen(), screen()], '"auroc"', "0.90 ± 0.00"),
    ],
)  # fmt: skip
def test_ways_to_show(tmp_path: Path, kind: str, rows: list[dict[str, Any]], measure: str, wanted: str) -> None:
    head = HEAD.replace("[data]", f'[[defences]]\nname = "{rows[0]["name"]}"\n[data]')
    found = [record(seed=i, number=i, defences=[row]) for i, row in enumerate(rows)]
    tables = f'[[table]]\npart = "a"\nkind = "{kind}"\nrows = "defence"\nmeasures = [{measure}]\n'
    assert cells(made(tmp_path, found, tables, "[grid]\nseed = [0, 1]\n", head))[1][1:] == [wanted]


def test_measures_can_be_rows_and_a_measure_sorts(tmp_path: Path) -> None:
    grid = '[grid]\n"attack.poison_rate" = [0.1, 0.2, 0.3]\n'
    found = [record(number=i, asr=asr, poison_rate=rate) for i, (asr, rate) in enumerate(((0.5, 0.1), (0.75, 0.2)))]
    tables = (
        '[[table]]\npart = "a"\nrows = "measure"\ncolumns = "attack.poison_rate"\npercent = ["attack.poison_rate"]\n'
    )
    tables += 'measures = ["asr", {measure = "stealth.psnr_db", heading = "PSNR", digits = 1}]\nshow = "mean"\n'
    assert cells(made(tmp_path, found, tables, grid)) == [
        ["", "10 %", "20 %", "30 %"], ["asr", "50.00", "75.00", "not run"], ["PSNR", "25.0", "25.0", "not run"]
    ]  # fmt: skip
    assert [row[0] for row in cells(made(tmp_path, [], f'{ASR}sort = "-asr"\n', grid))[1:]] == ["0.2", "0.1", "0.3"]


def test_groups_keep_the_order_of_each_label() -> None:
    came = [(("b", "x"), 1), (("a", "y"), 2), (("b", "y"), 3), (("a", "x"), 4), (("b", "x"), 5)]
    assert grouped(came) == {("b", "x"): [1, 5], ("b", "y"): [3], ("a", "x"): [4], ("a", "y"): [2]}
    assert grouped([]) == {}


def value(hits: int, n: int) -> Value:
    return Value(*vars(wilson(hits, n)).values())


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090), ((10, 10), (0, 20), 0.6791, 1.0)],
)
def test_difference_against_newcombes_table(
    one: tuple[int, int], other: tuple[int, int], low: float, high: float
) -> None:
    """Newcombe: "Interval estimation for the difference between independent proportions", 1998, table II, method 10."""
    apart = difference(value(*one), value(*other))
    assert apart.value == pytest.approx(one[0] / one[1] - other[0] / other[1])
    assert (apart.low, apart.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


@pytest.mark.parametrize(("hits", "n"), [(h, n) for n in (1, 7, 43, 12_630) for h in sorted({0, n // 3, n})])
def test_difference_against_statsmodels(hits: int, n: int) -> None:
    apart = difference(value(hits, n), value(5, 17))
    wanted = confint_proportions_2indep(hits, n, 5, 17, method="newcomb", compare="diff")
    assert (apart.low, apart.high) == (pytest.approx(wanted[0], abs=1e-9), pytest.approx(wanted[1], abs=1e-9))


AGAINST = """[[table]]
part = "a"
rows = "attack.poison_rate"
against = {"attack.poison_rate" = 0.1}
measures = ["asr", {measure = "asr", heading = "change", show = "against"}]
digits = 1
"""


def test_a_change_is_paired_by_seed(tmp_path: Path) -> None:
    # by hand: 10, 20, 30 points; mean 20, deviation 10, Student's t of two degrees of freedom 4.3027: 24.84 to a side
    found = [*at((0.5, 0.6, 0.7)), *at((0.6, 0.8, 1.0), 0.2, 3)]
    text = made(tmp_path, found, AGAINST)
    assert cells(text)[1:] == [["0.1", "60.0 ± 10.0", "–"], ["0.2", "80.0 ± 20.0", "20.0 [-4.8, 44.8]"]]
    assert "of differences: mean and 95 % interval over 3 pairs of equal seed (Student's t)" in text
    wanted = ttest_rel((60, 80, 100), (50, 60, 70)).confidence_interval()
    assert (round(wanted.low, 1), round(wanted.high, 1)) == (-4.8, 44.8)


def test_a_change_is_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    found = [*at((0.5, 0.6)), *at((0.6, 0.8, 1.0), 0.2, 3)]
    assert cells(made(tmp_path, found, AGAINST))[2][2] == "15.0 [-48.5, 78.5] (2 of 3 seeds)"
    wanted = ttest_rel((60, 80), (50, 60)).confidence_interval()
    assert (round(wanted.low, 1), round(wanted.high, 1)) == (-48.5, 78.5)


def test_a_change_of_one_seed_has_newcombes_interval(tmp_path: Path) -> None:
    found = [*at((0.5,)), *at((0.6,), 0.2, 3)]
    text = made(tmp_path, found, AGAINST, grid='[grid]\n"attack.poison_rate" = [0.1, 0.2]\n')
    assert cells(text)[2][2] == "10.0 [7.2, 12.8]"  # by hand: intervals of 2 to either side: sqrt(8) = 2.83
    assert text.endswith("One seed; in brackets: 95 % interval over images; n = 900 images.")


def made_of(path: Path) -> None:
    """Print, then make the page."""
    one = open_study(path.name, "runs")
    one.tables()
    fill_page(one)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ("", "add a [[table]] or a [[figure]]"),
        (ASR.replace("measures", "mesures"), "unknown key 'table[0].mesures'; did you mean 'table[0].measures'?"),
        (ASR.replace('"asr"\n', '"acr"\n').replace('part = "acr"', 'part = "asr"'), "unknown measure 'acr'"),
        (ASR.replace("attack.poison_rate", "attack.poisonrate"), "did you mean 'attack.poison_rate'?"),
        (f'{ASR}where = {{"attack.poison_rat" = 0.1}}\n', "did you mean 'attack.poison_rate'?"),
        (f'{ASR}where = {{"attack.poison_rate" = 0.3}}\n', "unknown value of where.attack.poison_rate 0.3"),
        (f"{ASR}{ASR}", "two tables have the part 'asr'"),
        (f'{ASR}show = "all"\n', "table[0].show = 'all' is wrong"),
        (f'{ASR}columns = "seed"\nsort = "acr"\n', "unknown measure 'acr'"),
        ('[[table]]\npart = "asr"\nrows = "seed"\nmeasures = "asr"\n', "mix runs that differ by 'attack.poison_rate'"),
        ('[[table]]\npart = "a"\nrows = "seed"\n', "table[0] has no measures"),
        ('[[table]]\nrows = "seed"\nmeasures = "asr"\n', "table[0].part"),
        (f'{ASR.replace("measures = ", "columns = ")}measures = ["asr", "cda"]\n', "neither rows nor columns are"),
        ('[page.headings]\nasr = "cda"\n' + ASR.replace('measures = "asr"', 'measures = ["asr", "cda"]'),
         "two measures have the heading 'cda'"),
        (ASR.replace('measures = "asr"', 'measures = [{measure = "asr", title = "x"}]'), "table[0].measures[0].title"),
        ('[table]\npart = "asr"\n', "must be tables: [[table]]"),
        (f'{ASR}kind = "screen"\n', "the sweep has no screen to show"),
        (f"page = 3\n{ASR}", "page = 3 must be a table"),
        (f'[page]\nfiles = "a"\n{ASR}', "did you mean 'page.file'?"),
        (f'[page]\nfile = "page.md"\n{ASR}', "page 'page.md' cannot be read"),
        (ASR.replace('measures = "asr"', 'measures = [{measure = "asr", show = "against"}]'),
         "table[0].against = {title = ...}"),
        (AGAINST.replace("0.1}", "0.3}"), "0 runs have attack.poison_rate = 0.3"),
        (AGAINST.replace('{"attack.poison_rate"', '{"attack.rate"'), "unknown key of against 'attack.rate'"),
        ('[[figure]]\nkind = ["heat"]\n', "unknown figure[0].kind ['heat']"),
        ('[[figure]]\nkind = "pie"\nfile = "a.png"\n', "unknown figure[0].kind 'pie'"),
        ('[[figure]]\nkind = "heat"\nfile = "a.png"\ntitle = ""\nrows = "a"\ncolumns = "b"\nscale = ""\n', "no blocks"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    first, rest = ("page = 3\n", tables[9:]) if tables.startswith("page = 3") else ("", tables)
    path = study(tmp_path, at((0.5,)), rest, head=first + HEAD)
    with pytest.raises(UserError) as refused:
        made_of(path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_records_must_be_somewhere(tmp_path: Path) -> None:
    path = study(tmp_path, [])
    with pytest.raises(UserError, match=r"has no page\.records; say where they lie with --records"):
        open_study(path)
    with pytest.raises(UserError, match="are not there"):
        open_study(path, tmp_path / "elsewhere")


def test_a_page_is_filled_between_its_marks_and_nowhere_else() -> None:
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb <!-- y -->\n"
    assert fill(page, "x", r"new \1", "page.md") == "a\n<!-- x -->\nnew \\1\n<!-- /x -->\nb <!-- y -->\n"
    assert fill("<!-- x -->\n<!-- /x -->\n", "x", "new", "page.md") == "<!-- x -->\nnew\n<!-- /x -->\n"
    for text in ("", "<!-- y -->\n", page + page):
        with pytest.raises(UserError, match="put <!-- . --> and <!-- /. --> around its place once"):
            fill(text, "y" if text.startswith("<!-- y") else "x", "new", "page.md")


def test_nothing_is_written_where_a_part_has_no_marks(tmp_path: Path) -> None:
    path = study(tmp_path, at((0.5,)), PAGE + ASR + ASR.replace('"asr"\nrows', '"more"\nrows'))
    (tmp_path / "page.md").write_text("<!-- asr -->\n<!-- /asr -->\n", "utf-8")
    with pytest.raises(UserError, match="0 parts 'more'"):
        fill_page(open_study(path, tmp_path / "runs"))
    assert (tmp_path / "page.md").read_text("utf-8") == "<!-- asr -->\n<!-- /asr -->\n"


def test_collected_records_are_abridged_and_make_the_same_table(tmp_path: Path) -> None:
    path = study(tmp_path, [*at((0.5, 0.6)), record("other", "ageb", number=9)], PAGE + ASR)
    done = collect(path, tmp_path / "runs")
    assert (done.file, done.new, done.superseded, done.missing) == (tmp_path / "kept" / "records.jsonl", 2, 0, 4)
    (first, second) = map(json.loads, done.file.read_text("utf-8").splitlines())
    assert (first["seed"], second["seed"]) == (0, 1)
    assert {"schema", "stages", "data", "models", "seconds", "precision", "defences"} <= set(first)
    assert not {"memory", "curves"} & set(first)
    assert first["environment"] == {
        "python": "3.11.7",
        "device_kind": "cpu",
        "threads": 1,
        "torch": "2.11.0",
        "timm": "1.0.31",
    }
    assert first["last"] == {"cross_entropy": 0.5, "cda": 0.9, "asr": 0.95}
    assert open_study(path).tables() == open_study(path, tmp_path / "runs").tables()


def test_collecting_supersedes_the_same_run_and_drops_nothing(tmp_path: Path) -> None:
    path = study(tmp_path, at((0.5, 0.6)), PAGE + ASR)
    kept = tmp_path / "kept" / "records.jsonl"
    kept.parent.mkdir()
    others = (record("other", "ageb", number=9), record("named before", number=8, asr=0.1))
    foreign, older = (to_table(abridge(to_record(content))) for content in others)
    kept.write_text(f"{json.dumps(foreign)}\n{json.dumps(older)}\nno json\n", "utf-8")
    done = collect(path, tmp_path / "runs")
    assert (done.new, done.superseded, done.missing) == (1, 1, 4)
    lines = kept.read_text("utf-8").splitlines()
    assert (json.loads(lines[0]), lines[2], len(lines)) == (foreign, "no json", 4)
    assert json.loads(lines[1])["victim"]["asr"]["value"] == 0.5
    assert collect(path, tmp_path / "runs").superseded == 0
    assert kept.read_text("utf-8").splitlines() == lines


def test_collecting_needs_a_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not say where to keep them"):
        collect(study(tmp_path, []), tmp_path / "runs")


def test_a_page_outside_of_the_specs_folder_needs_out(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("<!-- asr -->\n<!-- /asr -->\n", "utf-8")
    (tmp_path / "spec").mkdir()
    (tmp_path / "kept").mkdir()
    path = study(tmp_path / "spec", at((0.5,)), PAGE.replace('"page', '"../page').replace('"kept', '"../kept') + ASR)
    runs = path.parent / "runs"
    for make in (lambda **out: fill_page(open_study(path, runs), **out), lambda **out: collect(path, runs, **out)):
        with pytest.raises(UserError, match="does not lie below"):
            make()
        assert "50.00" not in (tmp_path / "page.md").read_text("utf-8")
        assert list((tmp_path / "kept").iterdir()) == []
    fill_page(open_study(path, runs), out=tmp_path)
    assert "50.00" in (tmp_path / "page.md").read_text("utf-8")
    assert collect(path, runs, tmp_path).file == tmp_path / "kept" / "records.jsonl"


@pytest.mark.parametrize("content", [b"notes of mine\n", b"\xff\xfe"])
def test_records_are_not_added_to_another_file(tmp_path: Path, content: bytes) -> None:
    path = study(tmp_path, at((0.5,)), PAGE + ASR)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "records.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"name another page\.records"):
        collect(path, tmp_path / "runs")
    assert (tmp_path / "kept" / "records.jsonl").read_bytes() == content
