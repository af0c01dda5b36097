"""Specs: bases, overrides, every refusal, the hash, and that a spec's table reads back as the spec."""

import json
import os
import tomllib
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrap import registry
from vitrap.attacks.ageb import Ageb
from vitrap.attacks.badnets import BadNets
from vitrap.errors import UserError
from vitrap.experiment.spec import (
    LARGEST_OVERRIDE,
    DataTable,
    ModelTable,
    Spec,
    digest,
    load_defence,
    load_spec,
    parse_spec,
)
from vitrap.train.recipe import RECIPES, Recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_spec(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- the default, and what stands in the repository


def test_the_embedded_default_is_ageb_on_digits() -> None:
    spec = load_spec()
    assert (spec.name, spec.seed, spec.data.name, spec.attack_name) == ("ageb-digits", 0, "digits", "ageb")
    assert isinstance(spec.attack, Ageb)
    assert spec.surrogate is None


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "ageb-digits"),
        (["attack.name=badnets"], "badnets-digits"),
        (["attack.name=badnets", "data.name=gtsrb"], "badnets-gtsrb"),
        (["data.name=imagefolder:/some/where/flowers/"], "ageb-flowers"),
        (["data.name=imagefolder:/"], "ageb-data"),
        (["attack.name=megatron", "data.name=gtsrb"], "megatron-training-gtsrb"),
        (["attack.name=megatron", "attack.setting=clean-label"], "megatron-clean-label-digits"),
        (["attack.name=megatron", r'data.name="npy:a\\b\u0007"'], "megatron-training-a-b-"),
        (["data.name=npy:" + 200 * "x"], f"ageb-{60 * 'x'}"),
        (["name=mine", "attack.name=badnets"], "mine"),
    ],
)
def test_a_run_without_a_name_is_called_by_attack_setting_and_data(overrides: list[str], name: str) -> None:
    assert load_spec(None, overrides).name == name


def test_the_name_is_no_part_of_the_hash() -> None:
    overrides = ["attack.name=megatron", "attack.setting=clean-label"]
    assert load_spec(None, overrides).hash() == load_spec(None, [*overrides, "name=mine"]).hash()


def test_an_empty_spec_is_whole() -> None:
    assert parse_spec({}) == Spec("ageb-digits", 0, DataTable(), ModelTable(), None, "ageb", Ageb(), RECIPES["digits"])


@pytest.mark.parametrize("path", sorted((ROOT / "specs").rglob("*.toml")), ids=lambda path: path.stem)
def test_the_specs_that_ship_are_right(path: Path) -> None:
    if "grid" not in tomllib.loads(path.read_text(encoding="utf-8")):
        load_spec(path)


def test_recipe_keys_go_over_those_of_the_data_set() -> None:
    spec = parse_spec({"data": {"name": "cifar100-12k"}, "recipe": {"epochs": 3}})
    assert spec.recipe == replace(RECIPES["cifar100"], epochs=3)


# ---- base


def test_a_base_is_relative_to_its_file_and_own_keys_go_over_it(write) -> None:
    write("study.toml", 'name = "study"\nseed = 3\n[data]\nlimit = 200\n[attack]\nname = "badnets"\nsize = 5')
    write("deep/middle.toml", 'base = "../study.toml"\n[attack]\ntarget = 4\n[recipe]\nepochs = 2')
    path = write("deep/er/mine.toml", 'base = "../middle.toml"\nname = "mine"\n[attack]\nsize = 7')
    spec = load_spec(path)
    assert (spec.name, spec.seed, spec.data.limit, spec.recipe.epochs) == ("mine", 3, 200, 2)
    assert spec.attack == BadNets(target=4, size=7)


def test_a_spec_with_another_attack_keeps_only_the_bases_target(write) -> None:
    write("base.toml", '[data]\nname = "digits"\nsize = 32\nlimit = 90\n[attack]\ntarget = 3\nalpha = 0.2')
    spec = load_spec(write("mine.toml", 'base = "base.toml"\n[data]\nname = "gtsrb"\n[attack]\nname = "badnets"'))
    assert spec.data == DataTable("gtsrb", limit=90)
    assert spec.attack == BadNets(target=3)


def test_a_circle_of_bases_is_refused(write) -> None:
    one = write("one.toml", 'base = "two.toml"')
    write("two.toml", 'base = "one.toml"')
    assert "is its own base; remove the circle" in refusal(path=one)
    own = write("own.toml", 'base = "own.toml"')
    assert f"{str(own)!r} is its own base" in refusal(path=own)


def test_a_base_must_be_a_path_that_is_there(write) -> None:
    assert "base = 3 in spec" in refusal(path=write("mine.toml", "base = 3"))
    assert "gone.toml' cannot be read" in refusal(path=write("mine.toml", 'base = "gone.toml"'))


# ---- overrides


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("seed=7", lambda s: s.seed, 7),
        (" seed = 7 ", lambda s: s.seed, 7),
        ("name=b", lambda s: s.name, "b"),
        ('name="3"', lambda s: s.name, "3"),
        ("name=it's = fine", lambda s: s.name, "it's = fine"),
        ("attack.alpha=0.25", lambda s: s.attack.alpha, 0.25),
        ("attack.alpha=1", lambda s: s.attack.alpha, 1.0),
        ("attack.poison_rate=1e-2", lambda s: s.attack.poison_rate, 0.01),
        ("attack.route=score", lambda s: s.attack.route, "score"),
        ("recipe.flip=true", lambda s: s.recipe.flip, True),
        ("data.name=npy:some/where", lambda s: s.data.name, "npy:some/where"),
        ("model.embed_dim=32", lambda s: s.model.overrides, {"embed_dim": 32}),
        ("model.global_pool=avg", lambda s: s.model.overrides, {"global_pool": "avg"}),
        ("model.init_values=[1, 2]", lambda s: s.model.overrides, {"init_values": [1, 2]}),
        ("surrogate.depth=2", lambda s: s.surrogate, ModelTable(overrides={"depth": 2})),
    ],
)
def test_a_value_is_toml_or_else_a_string(override: str, read, value: Any) -> None:
    found = read(load_spec(None, [override]))
    assert found == value
    assert type(found) is type(value)


def test_a_later_override_goes_over_an_earlier_one() -> None:
    assert load_spec(None, ["seed=1", "seed=2"]).seed == 2


def test_another_attack_drops_the_keys_of_the_first_but_the_target(write) -> None:
    path = write("mine.toml", "[attack]\ntarget = 4\npoison_rate = 0.2\nalpha = 0.3")
    assert load_spec(path, ["attack.name=badnets"]).attack == BadNets(target=4)
    assert load_spec(path, ["attack.name=ageb"]).attack == Ageb(target=4, poison_rate=0.2, alpha=0.3)


def test_the_other_overrides_apply_after_the_name_wherever_they_stand(write) -> None:
    path = write("mine.toml", "[attack]\ntarget = 4\nsize = 5")
    for overrides in (["attack.size=2", "attack.name=badnets"], ["attack.name=badnets", "attack.size=2"]):
        assert load_spec(path, overrides).attack == BadNets(target=4, size=2)


def test_another_data_set_keeps_the_limit_alone() -> None:
    spec = load_spec(None, ["data.limit=100", "data.size=32", "data.name=digits"])
    assert spec.data == DataTable("digits", 32, 100)


def test_another_data_set_drops_size_and_hold_out_and_brings_its_recipe(write) -> None:
    path = write("mine.toml", '[data]\nname = "cifar10"\nsize = 64\nlimit = 500\nholdout = 0.2')
    spec = load_spec(path, ["data.name=gtsrb"])
    assert spec.data == DataTable("gtsrb", limit=500)
    assert spec.recipe == RECIPES["gtsrb"]


def test_another_model_drops_the_first_ones_arguments(write) -> None:
    path = write("mine.toml", '[model]\nname = "vit_tiny_patch16_224"\ndepth = 2\npretrained = true')
    spec = load_spec(path, ["model.name=deit_tiny_patch16_224", "model.embed_dim=32"])
    assert spec.model == ModelTable("deit_tiny_patch16_224", overrides={"embed_dim": 32})


@pytest.mark.parametrize("text", ["seed", "=3", "attack.=3", ".seed=3", "attack..alpha=3", ""])
def test_what_is_no_override_is_named(text: str) -> None:
    assert refusal(text) == f"override {text!r} is not of the form key=value or table.key=value"


# ---- refusals


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "+nan"])
@pytest.mark.parametrize("key", ["attack.poison_rate", "recipe.lr", "data.holdout", "seed", "model.drop_rate"])
def test_numbers_must_be_finite(key: str, value: str) -> None:
    assert refusal(f"{key}={value}") == f"{key} = {float(value)} is no finite number"


def test_numbers_in_lists_must_be_finite() -> None:
    assert refusal("model.init_values=[1.0, nan]") == "model.init_values = nan is no finite number"


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("sed=1", "seed"),
        ("dta.name=digits", "data"),
        ("data.limt=1", "data.limit"),
        ("attack.alhpa=1", "attack.alpha"),
        ("attack.nam=ageb", "attack.name"),
        ("recipe.epoch=1", "recipe.epochs"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(override: str, near: str) -> None:
    key = override.partition("=")[0] if near.count(".") or near == "seed" else override.partition(".")[0]
    assert refusal(override).startswith(f"unknown key {key!r}; did you mean {near!r}? known: ")


def test_an_unknown_attack_is_named_with_the_nearest() -> None:
    known = ", ".join(registry.names("attacks"))
    assert refusal("attack.name=badnet") == f"unknown attack 'badnet'; did you mean 'badnets'? known: {known}"


@pytest.mark.parametrize("value", ["3", "true", "['ageb']", "{ of = 'ageb' }", "2020-01-01"])
def test_an_attacks_name_must_be_a_name(value: str) -> None:
    assert refusal(f"attack.name={value}").startswith("attack.name = ")


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("seed=x", "seed = 'x' is wrong: "),
        ("seed=1.5", "seed = 1.5 is wrong: "),
        ("seed=true", "seed = True is wrong: "),
        ("name=3", "name = 3 is wrong: "),
        ("data.limit=many", "data.limit = 'many' is wrong: "),
        ("data.name=['digits']", "data.name = ['digits'] is wrong: "),
        ("attack.target=1.0", "attack.target = 1.0 is wrong: "),
        ("attack.adjust=1", "attack.adjust = 1 is wrong: "),
        ("attack.alpha='0.5'", "attack.alpha = '0.5' is wrong: "),
        ("attack.route=elsewhere", "attack.route = 'elsewhere' is wrong: "),
        ("attack.target.of=1", "attack.target = {'of': 1} is wrong: "),
        ("recipe.flip=yes", "recipe.flip = 'yes' is wrong: "),
        ("model.pretrained=1", "model.pretrained = 1 is wrong: "),
        ("surrogate.checkpoint=1", "surrogate.checkpoint = 1 is wrong: "),
        ("attack=ageb", "attack = 'ageb' must be a table: [attack]"),
        ("data=3", "data = 3 must be a table: [data]"),
        ("attack.alpha=2020-01-01", "attack.alpha = 2020-01-01 is a date or a time"),
    ],
)
def test_a_wrong_type_is_named_with_its_value(override: str, start: str) -> None:
    assert refusal(override).startswith(start)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed = -1 is out of range: it must be in [0, 9.0072e+15]"),
        ("data.size=0", "data.size = 0 is out of range: it must be in [1, 4096]"),
        ("data.limit=-5", "data.limit = -5 is out of range: it must be in [1, 1e+09]"),
        ("data.holdout=1.0", "data.holdout = 1.0 is out of range: it must be in (0, 1)"),
        ("attack.poison_rate=0.0", "attack.poison_rate = 0.0 is out of range: it must be in (0, 1)"),
        ("attack.poison_rate=1.0", "attack.poison_rate = 1.0 is out of range: it must be in (0, 1)"),
        ("attack.poison_rate=-1.0", "attack.poison_rate = -1.0 is out of range: it must be in (0, 1)"),
        ("attack.size=4", "attack.size = 4 is out of range: it must be odd, in [1, 255]"),
        ("attack.size=0", "attack.size = 0 is out of range: it must be odd, in [1, 255]"),
        ("attack.target=-1", "attack.target = -1 is out of range: it must be >= 0"),
        ("recipe.epochs=0", "recipe.epochs = 0 is out of range: it must be >= 1"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(override: str, message: str) -> None:
    assert refusal(override) == message


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a\\b", "a\nb", "\x1b[2J", "a" * 101, "\U0001f600" * 60])
def test_a_name_that_cannot_name_a_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot name a folder"):
        parse_spec({"name": name})


@pytest.mark.parametrize("data", ["/", "a/b", "a\\b", "npy:a\nb", "imagefolder:" + "\U0001f600" * 60])
def test_a_run_without_a_name_gets_one_that_names_a_folder_whatever_its_data_are_called(data: str) -> None:
    spec = parse_spec({"data": {"name": data}})
    assert parse_spec({"name": spec.name}).name == spec.name
    assert spec.name.startswith("ageb-")


def test_a_spec_that_is_not_there_or_not_toml_is_refused(tmp_path: Path, write) -> None:
    gone = tmp_path / "gone.toml"
    assert refusal(path=gone) == (
        f"spec {str(gone)!r} cannot be read: No such file or directory; give the path of a TOML file"
    )
    assert "cannot be read: Is a directory" in refusal(path=tmp_path)
    assert "is not TOML: " in refusal(path=write("bad.toml", "name = [1,"))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "it is UTF-16; save it as UTF-8" in refusal(path=binary)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "latin-1"])
def test_a_spec_is_utf8_with_or_without_a_mark(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "spec.toml"
    path.write_text('name = "fünf"\n', encoding=encoding)
    if encoding == "utf-8-sig":
        assert load_spec(path).name == "fünf"
    else:
        said = {"latin-1": "byte 0xfc in line 1 is no UTF-8"}.get(encoding, f"it is {encoding.upper()}")
        assert f"{said}; save it as UTF-8" in refusal(path=path)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_circle_of_bases_by_other_names_is_refused(tmp_path: Path, write, link: Any) -> None:
    one = write("one.toml", 'base = "two.toml"')
    link(one, tmp_path / "two.toml")
    assert "is its own base" in refusal(path=one)


def test_bases_have_an_end(write) -> None:
    for i in range(100):
        write(f"{i}.toml", f'base = "{i + 1}.toml"')
    assert "is the base of a base, more than 50 times" in refusal(path=write("100.toml", 'base = "0.toml"'))


@pytest.mark.parametrize("text", ["data.limit=5\nseed=3", "name=a\nb", "seed=1\r\n[attack]\ntarget = 2"])
def test_an_override_is_one_line(text: str) -> None:
    assert "has more than one line; give each key=value by itself" in refusal(text)


BOUND = ("data.size=10000000", "data.name=" + "a" * 300, "data.name=" + "a/" * 3000, "seed=" + "9" * 5000,
         f"seed={2**64}", "recipe.batch_size=99999999999999999999", "recipe.lr=1e300", "recipe.crop=100000",
         "model.depth=1000000", "surrogate.embed_dim=-100000", ".".join(["model"] * 60) + "=1",
         "model.patch_size=[[2020-01-01]]", "model.x=" + "[" * 3000)  # fmt: skip


@pytest.mark.parametrize("override", BOUND, ids=lambda text: text[:30])
def test_nothing_is_too_large_to_be_refused(override: str) -> None:
    assert len(refusal(override)) < 1000


@pytest.mark.parametrize("name", registry.names("defences"))
@pytest.mark.parametrize("value", ["nan", "-inf", "1e99", "-1e99", str(10**40), "9" * 5000, "[[1]]", "2020-01-01"])
def test_a_defences_settings_are_in_range(name: str, value: str) -> None:
    for each in fields(registry.get("defences", name)):
        with pytest.raises(UserError) as refused:
            load_defence(name, [f"{each.name}={value}"])
        assert each.name in str(refused.value)
        assert len(str(refused.value)) < 500


def result_or_refusal(make: Any, *given: Any) -> None:
    with suppress(UserError):
        make(*given)


signs = st.text(alphabet='[]{}=".,\n 019aeuft-+#\\\0\ud800')


@given(st.binary(max_size=300) | signs.map(lambda text: text.encode(errors="surrogatepass")))
def test_any_bytes_are_a_spec_or_refused(content: bytes) -> None:
    with NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)
        result_or_refusal(load_spec, file.name)


KEYS = ("seed", "name", "data.name", "data.limit", "model.depth", "attack.target", "recipe", "defences", "x.y", "base")


@given(st.sampled_from(KEYS), signs | st.text())
def test_any_text_is_an_override_or_refused(key: str, text: str) -> None:
    result_or_refusal(load_spec, None, [f"{key}={text}"])
    result_or_refusal(load_spec, None, [text])


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "size", "target"]), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*KEYS, "model", "data", "attack", "surrogate"]), anything))
def test_any_table_is_a_spec_or_refused(table: dict[str, Any]) -> None:
    result_or_refusal(parse_spec, table)


# ---- identity


def settings_of(record: type, **fixed) -> st.SearchStrategy[dict[str, Any]]:
    """Any part of a record's keys, each with a value in its range."""
    return st.fixed_dictionaries({}, optional={f.name: _values(f) for f in fields(record)} | fixed)


def _values(f: Any) -> st.SearchStrategy[Any]:
    about = f.metadata["param"]
    if about.choices:
        return st.sampled_from(about.choices)
    if f.type is bool or f.type == bool | None:
        return st.booleans()
    if f.type is int or f.type == int | None:
        low = int(about.low or 0)
        high = min(10**6, int(about.high or 10**6))
        return st.integers(low, high).map(lambda n: n - (n % 2 == 0) if about.odd else n)
    return st.floats(
        0 if about.low is None else about.low,
        1 if about.high is None else about.high,
        exclude_min=bool(about.open),
        exclude_max=about.open is True,
    )


words = st.text("abcxyz-_:/. 019", min_size=1, max_size=12)
whole = st.integers(-LARGEST_OVERRIDE, LARGEST_OVERRIDE)
plain = st.one_of(st.booleans(), whole, st.floats(-1e6, 1e6), words, st.lists(st.integers(0, 9)))
arguments = st.dictionaries(st.sampled_from(["depth", "patch_size", "mlp_ratio", "global_pool"]), plain)
starts = st.sampled_from([{}, {"pretrained": True}, {"pretrained": False}, {"checkpoint": "x"}, {"weights": "x y.z"}])
models = st.builds(
    lambda table, start, overrides: {**overrides, **start, **table},
    st.fixed_dictionaries({}, optional={"name": words}),
    starts,
    arguments,
)
classes = st.lists(st.integers(0, 9), min_size=2, max_size=2, unique=True)
goals = st.one_of(
    st.fixed_dictionaries({}, optional={"goal": st.just("all-to-one"), "target": st.integers(0, 9)}),
    st.just({"goal": "all-to-all"}),
    classes.map(lambda two: {"goal": "source-to-target", "target": two[0], "source": two[1]}),
)
attacks = st.one_of(
    settings_of(Ageb, name=st.just("ageb")),
    st.builds(
        lambda table, goal: {**{k: v for k, v in table.items() if k not in ("goal", "target", "source")}, **goal},
        settings_of(BadNets).map(lambda table: {"name": "badnets", **table}),
        goals,
    ),
)
tables = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text("abc019-_ []", min_size=1, max_size=12),
        "seed": st.integers(0, 10**9),
        "data": settings_of(DataTable, name=words),
        "model": models,
        "surrogate": models,
        "attack": attacks,
        "recipe": settings_of(Recipe),
    },
)


@given(tables)
def test_a_specs_table_reads_back_as_the_spec(table: dict[str, Any]) -> None:
    spec = parse_spec(table)
    again = spec.table()
    assert parse_spec(again) == spec
    assert parse_spec(json.loads(json.dumps(again))) == spec
    assert parse_spec(again).table() == again
    assert parse_spec(again).hash() == spec.hash()


def test_a_table_names_every_key_as_a_spec_does() -> None:
    table = load_spec(None, ["model.depth=2", "surrogate.depth=3"]).table()
    assert set(table) == {"name", "seed", "data", "model", "surrogate", "attack", "recipe"}
    assert table["model"] == {"pretrained": False, "linear_probe": False, "depth": 2}
    assert table["surrogate"] == {"pretrained": False, "linear_probe": False, "depth": 3}
    assert "surrogate" not in load_spec().table()


# ---- hash


def test_the_hash_ignores_the_name_and_nothing_else() -> None:
    spec = load_spec()
    assert replace(spec, name="other").hash() == spec.hash()
    changes = [
        "seed=1",
        "data.name=cifar10",
        "data.size=32",
        "data.limit=100",
        "data.holdout=0.2",
        "data.measured=choose",
        "model.name=deit_tiny_patch16_224",
        "model.pretrained=true",
        "model.checkpoint=x",
        "model.depth=2",
        "surrogate.depth=2",
        "attack.name=badnets",
        *(f"attack.{f.name}={_another(getattr(spec.attack, f.name), f)}" for f in fields(Ageb)),
        *(f"recipe.{f.name}={_another(getattr(spec.recipe, f.name), f)}" for f in fields(Recipe)),
    ]
    hashes = [spec.hash(), *(load_spec(None, [change]).hash() for change in changes)]
    assert len(set(hashes)) == len(hashes)
    assert all(len(h) == 12 and int(h, 16) >= 0 for h in hashes)


def _another(value: Any, f: Any) -> Any:
    if value is None and f.metadata["param"].choices:
        return f.metadata["param"].choices[0]
    if value is None:
        return "true" if f.type == bool | None else 0.5
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, str):
        return next(choice for choice in f.metadata["param"].choices if choice != value)
    return value + 2 if isinstance(value, int) else value / 2 or 0.5


def test_a_default_written_out_changes_no_hash() -> None:
    whole = {"seed": 0, "attack": {"name": "ageb", "alpha": Ageb().alpha}, "recipe": {"crop": RECIPES["digits"].crop}}
    assert parse_spec(whole).hash() == parse_spec({}).hash()


def test_a_digest_needs_numbers_that_json_has() -> None:
    assert digest({"b": 1, "a": [1.5]}) == digest({"a": [1.5], "b": 1}) != digest({"a": [1.5], "b": 2})
    with pytest.raises(ValueError, match="JSON"):
        digest({"a": float("nan")})


def test_a_spec_is_frozen() -> None:
    with pytest.raises(AttributeError):
        load_spec().seed = 1  # type: ignore[misc]
    assert isinstance(load_spec(), Spec)


def test_a_linear_probe_needs_weights_to_start_from() -> None:
    with pytest.raises(UserError, match=r"^surrogate\.linear_probe = true trains a head on pretrained weights; give "):
        parse_spec({"surrogate": {"linear_probe": True}})
    with pytest.raises(UserError, match="give pretrained or weights, in place of checkpoint$"):
        parse_spec({"surrogate": {"linear_probe": True, "checkpoint": "x"}})
    for start in ({"pretrained": True}, {"weights": "x"}):
        assert parse_spec({"surrogate": {"linear_probe": True, **start}}).surrogate


@pytest.mark.parametrize("table", ["model", "surrogate"])
@pytest.mark.parametrize(
    ("start", "named"),
    [
        ({"pretrained": True, "checkpoint": "a"}, "pretrained and checkpoint are given"),
        ({"pretrained": True, "weights": "a"}, "pretrained and weights are given"),
        ({"checkpoint": "a", "weights": "b"}, "checkpoint and weights are given"),
        ({"pretrained": True, "checkpoint": "a", "weights": "b"}, "pretrained and checkpoint and weights are given"),
    ],
)
def test_weights_start_from_one_thing(table: str, start: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_spec({table: start})
    assert str(caught.value) == f"{table}.{named}, and weights start from one of them; leave out the rest"
    assert parse_spec({table: {"pretrained": False, "weights": "b"}})
