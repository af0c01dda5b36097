"""A sweep's spec: which runs it stands for, and what is refused."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from vitrap.errors import UserError
from vitrap.experiment.spec import load_spec
from vitrap.sweeps.grid import load_sweep

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "sweep.toml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_the_runs_are_all_combinations(write: Write):
    path = write('[grid]\nseed = [0, 1, 2]\n"attack.poison_rate" = [0.1, 0.2]\nattack.alpha = [0.3, 0.4]\n')
    sweep = load_sweep(path)
    assert sweep.name == "sweep"
    found = [(p.spec.seed, p.spec.attack.poison_rate, p.spec.attack.alpha) for p in sweep.points]
    assert sorted(found) == sorted(product((0, 1, 2), (0.1, 0.2), (0.3, 0.4)))
    assert len({p.spec.hash() for p in sweep.points}) == 12
    assert sweep.points[0].settings == {"seed": 0, "attack.poison_rate": 0.1, "attack.alpha": 0.3}
    assert sweep.points[0].label == "seed = 0, attack.poison_rate = 0.1, attack.alpha = 0.3"


def test_a_run_of_a_sweep_is_the_run_of_its_spec(write: Write):
    (point,) = load_sweep(write("name = 'x'\n[grid]\nseed = [3]\nattack.alpha = [0.4]\n")).points
    assert point.spec == load_spec(write("name = 'x'", "one.toml"), ["attack.alpha=0.4", "seed=3"])


def test_cases_hold_settings_that_belong_together(write: Write):
    path = write(
        "[grid]\nseed = [0, 1]\n"
        "[[grid.case]]\ntitle = 'A'\nattack.name = 'badnets'\nattack.size = 2\n"
        "[[grid.case]]\nattack = {name = 'ageb', alpha = 0.4}\n"
    )
    points = load_sweep(path).points
    assert [(p.spec.attack_name, p.spec.seed) for p in points] == [
        ("badnets", 0), ("badnets", 1), ("ageb", 0), ("ageb", 1),
    ]  # fmt: skip
    assert (points[0].spec.attack.size, points[2].spec.attack.alpha) == (2, 0.4)
    assert points[0].settings["title"] == "A"
    assert points[0].label == "attack.name = badnets, attack.size = 2, seed = 0"


def test_a_list_in_a_case_is_several_cases_but_a_list_of_defences_one(write: Write):
    path = write(
        "[grid]\nattack.alpha = [0.3, 0.4]\n"
        "[[grid.case]]\ntitle = 'some'\nseed = [1, 2]\ndefences = ['strip', 'mm_bd']\n"
        "[[grid.case]]\ntitle = 'one'\nseed = 0\n"
    )
    found = [
        (p.settings["title"], p.spec.seed, p.spec.attack.alpha, len(p.spec.defences)) for p in load_sweep(path).points
    ]
    assert found == [
        *(("some", seed, alpha, 2) for seed in (1, 2) for alpha in (0.3, 0.4)),
        *(("one", 0, alpha, 0) for alpha in (0.3, 0.4)),
    ]


def test_a_name_comes_before_the_settings_that_it_would_drop(write: Write):
    path = write("[attack]\nalpha = 0.9\n[grid]\n'attack.size' = [2]\n'attack.name' = ['badnets']\n")
    (point,) = load_sweep(path).points
    assert (point.spec.attack_name, point.spec.attack.size) == ("badnets", 2)


def test_a_base_in_the_grid_is_where_a_run_starts(write: Write, tmp_path: Path):
    (tmp_path / "deep").mkdir()
    for name in ("one", "two"):
        (tmp_path / "deep" / f"{name}.toml").write_text(f"name = '{name}'\n[attack]\nname = 'badnets'\nsize = 3\n")
    path = write("[recipe]\nepochs = 7\n[grid]\nbase = ['deep/one.toml', 'deep/two.toml']\nattack.size = [4]\n")
    with pytest.raises(UserError, match="are the same run"):  # they differ by name alone
        load_sweep(path)
    (tmp_path / "deep" / "two.toml").write_text("name = 'two'\nseed = 1\n[attack]\nname = 'badnets'\n")
    points = load_sweep(path).points
    assert [(p.spec.name, p.spec.seed) for p in points] == [("one", 0), ("two", 1)]
    assert {(p.spec.attack.size, p.spec.recipe.epochs) for p in points} == {(4, 7)}


def test_runs_that_differ_by_their_defences_are_one_run_with_all_of_them(write: Write):
    path = write("[grid]\nseed = [0, 1]\ndefences = ['strip', {name = 'strip', overlays = 5}, ['psbd', 'strip']]\n")
    points = load_sweep(path).points
    assert [p.spec.seed for p in points] == [0, 1]
    assert [(d.name, d.table().get("overlays")) for d in points[0].spec.defences] == [
        ("strip", 100), ("strip", 5), ("psbd", None),
    ]  # fmt: skip


def test_an_override_goes_over_all_runs_or_narrows_the_grid(write: Write):
    path = write("[grid]\nseed = [0, 1]\nattack.alpha = [0.3, 0.4]\n")
    points = load_sweep(path, ["seed=7", "recipe.epochs=2"]).points
    assert [(p.spec.seed, p.spec.recipe.epochs) for p in points] == [(7, 2), (7, 2)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = 0\n", r"has no \[grid\].*vitrap run"),
        ("[grid]\n", "is empty"),
        ("[grid]\nseed = []\n", r"grid.seed = \[\] must be a list with a value"),
        ("[grid]\nseed = 3\n", "grid.seed = 3 must be a list"),
        ("[grid]\nseed = [0, 0]\n", "grid.seed has 0 twice"),
        ("[grid]\n'attack.alpha' = [0.3]\nattack.alpha = [0.4]\n", "grid.attack.alpha stands twice"),
        ("[grid]\nseed = [0]\n[[grid.case]]\nseed = 1\n", "contradicts itself: 'seed' and 'seed'"),
        ("[grid]\nattack = [{alpha = 0.3}]\n'attack.alpha' = [0.4]\n", "contradicts itself"),
        ("[grid]\ncase = [{}]\n", "grid.case"),
        ("[grid]\ncase = 3\n", "grid.case = 3 must be tables"),
        ("[grid]\n[[grid.case]]\nseed = []\n", "grid.case.seed = .* must be a value, or a list"),
        ("[grid]\n[[grid.case]]\nseed = [1, 1]\n", "must be a value, or a list of different ones"),
        ("[grid]\nattack.alhpa = [0.3]\n", "unknown key 'attack.alhpa'; did you mean 'attack.alpha'.*alhpa = 0.3"),
        ("[grid]\nseeds = [0]\n", "unknown key 'seeds'; did you mean 'seed'"),
        ("[grid]\nattack.alpha = [0.3, 'x']\n", "attack.alpha = 'x' is wrong"),
        ("[grid]\nattack.name = ['ageb', 'badnet']\n", "unknown attack 'badnet'; did you mean 'badnets'"),
        ("[grid]\nbase = ['nowhere.toml']\n", "nowhere.toml' cannot be read"),
        ("[grid]\nname = ['a', 'b']\n", "are the same run"),
        ("[grid]\n[[grid.case]]\ntitle = 'a'\n[[grid.case]]\ntitle = 'b'\n", "are the same run"),
        ("[grid]\nseed = [0]\n[[grid.case]]\nattack.margin = 1\n", "unknown key 'attack.margin'.*seed = 0"),
    ],
)
def test_a_wrong_grid_is_refused(write: Write, text: str, said: str):
    with pytest.raises(UserError, match=said) as refusal:
        load_sweep(write(text))
    assert "\n" not in str(refusal.value)


def test_an_override_of_what_cases_set_is_refused(write: Write):
    path = write("[grid]\n[[grid.case]]\nattack.alpha = 0.3\n")
    with pytest.raises(UserError, match="contradicts the grid's cases"):
        load_sweep(path, ["attack.alpha=0.5"])


def test_a_very_large_grid_is_asked_about(write: Write, monkeypatch: pytest.MonkeyPatch):
    path = write(f"[grid]\nseed = {list(range(101))}\nattack.target = {list(range(100))}\n")
    with pytest.raises(UserError, match="has 10100 runs, more than 10000; say --yes"):
        load_sweep(path)
    monkeypatch.setattr("vitrap.sweeps.grid.MOST", 3)
    path = write("[grid]\nseed = [0, 1]\nattack.target = [0, 1]\n")
    with pytest.raises(UserError, match="has 4 runs, more than 3"):
        load_sweep(path)
    assert len(load_sweep(path, any_number=True).points) == 4
    assert len(load_sweep(path, ["seed=0"]).points) == 2


def test_a_base_that_is_a_sweep_gives_its_settings_alone(write: Write):
    write("name = 'first'\n[recipe]\nepochs = 3\n[grid]\nseed = [0, 1]\n[page]\nfile = 'x.md'\n", "first.toml")
    sweep = load_sweep(write("base = 'first.toml'\n[grid]\nattack.target = [1, 2]\n"))
    assert [(p.spec.seed, p.spec.attack.target, p.spec.recipe.epochs) for p in sweep.points] == [(0, 1, 3), (0, 2, 3)]
    assert sweep.page == {}
    assert load_spec(write("base = 'first.toml'\n", "one.toml")).recipe.epochs == 3


def test_a_sweep_is_no_single_run(write: Write):
    with pytest.raises(UserError, match=r"has a \[grid\].*vitrap sweep"):
        load_spec(write("[grid]\nseed = [0]\n"))


HUGE = {
    "axes": "\n".join(f'"attack.a{i}" = {list(range(100))}' for i in range(20)),
    "a case": "[[grid.case]]\n" + "\n".join(f"a{i} = {list(range(100))}" for i in range(20)),
}


@pytest.mark.parametrize("kind", HUGE)
@pytest.mark.parametrize("any_number", [False, True])
def test_the_runs_are_counted_before_they_are_made(write: Write, kind: str, any_number: bool):
    with pytest.raises(UserError, match="runs, more than 1,000,000; split it"):
        load_sweep(write(f"[grid]\n{HUGE[kind]}\n"), any_number=any_number)
