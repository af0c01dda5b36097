"""Names and what they stand for: the package's own files, and other packages' entry points."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import vitrap
from vitrap import attacks, registry
from vitrap.attacks.ageb import Ageb
from vitrap.attacks.badnets import BadNets
from vitrap.errors import UserError


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package that offers attacks: one of its own, and one under a name that is taken."""
    offered = [
        EntryPoint("stranger", "collections:OrderedDict", "vitrap.attacks"),
        EntryPoint("badnets", "collections:Counter", "vitrap.attacks"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: offered if group == "vitrap.attacks" else [])


def test_names_are_the_files() -> None:
    files = Path(vitrap.__path__[0], "attacks").glob("*.py")
    assert registry.names("attacks") == sorted(p.stem for p in files if p.stem != "__init__")
    assert {"ageb", "badnets"} <= set(registry.names("attacks"))


def test_a_room_without_files_is_empty() -> None:
    assert registry.names("defences") == sorted(registry.names("defences"))


def test_a_name_stands_for_the_class_with_a_card() -> None:
    assert registry.get("attacks", "ageb") is Ageb
    assert registry.get("attacks", "badnets") is BadNets
    assert attacks.get("ageb") is Ageb
    assert attacks.names() == registry.names("attacks")


def test_every_name_can_be_had_once() -> None:
    found = [registry.get("attacks", name) for name in registry.names("attacks")]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("agbe", "unknown attack 'agbe'; did you mean 'ageb'?"),
        ("BadNets", "unknown attack 'BadNets'; did you mean 'badnets'?"),
        ("xyzzy", "unknown attack 'xyzzy'; known: adaptive_blend, ageb, badnets"),
        ("__init__", "unknown attack '__init__'"),
        ("../contracts", "unknown attack '../contracts'"),
    ],
)
def test_an_unknown_name(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        registry.get("attacks", name)
    assert str(caught.value).startswith(message)


def test_the_kind_is_named_in_the_singular() -> None:
    with pytest.raises(UserError, match="unknown defence 'x'"):
        registry.get("defences", "x")


def test_headlines() -> None:
    headline = "AGEB: erode the pixels on which the attention of a surrogate ViT depends most."
    assert registry.headline("attacks", "ageb") == headline
    assert registry.headline("attacks", "nothing of ours") == ""


@pytest.mark.usefixtures("plugin")
def test_other_packages_join_through_entry_points() -> None:
    from collections import OrderedDict

    assert "stranger" in registry.names("attacks")
    assert registry.names("attacks").count("badnets") == 1
    assert registry.get("attacks", "stranger") is OrderedDict
    assert registry.headline("attacks", "stranger") == ""
    with pytest.raises(UserError, match="did you mean 'stranger'"):
        registry.get("attacks", "strange")


@pytest.mark.usefixtures("plugin")
def test_other_packages_cannot_take_a_name_of_ours() -> None:
    assert registry.get("attacks", "badnets") is BadNets


@pytest.mark.usefixtures("plugin")
def test_listing_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EntryPoint, "load", lambda self: pytest.fail("loaded"))
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: pytest.fail("imported"))
    for name in registry.names("attacks"):
        registry.headline("attacks", name)
