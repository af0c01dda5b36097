"""The public names: all there, loaded when asked for, and nothing heavy before."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import vitrap

HEAVY = ("torch", "torchvision", "timm", "torchmetrics", "sklearn", "matplotlib")


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has after running `code`."""
    script = f"import sys\n{code}\nprint('\\nloaded', *(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_every_public_name_is_there() -> None:
    assert vitrap.__all__ == sorted(set(vitrap.__all__))
    for name in vitrap.__all__:
        found = getattr(vitrap, name)
        assert isinstance(found, ModuleType) or found.__name__ == name


def test_what_loads_lazily_is_what_is_public() -> None:
    assert set(vitrap.__all__) == {*vitrap._HOMES, *vitrap._ROOMS}


def test_what_type_checkers_see_is_what_is_public() -> None:
    tree = ast.parse(Path(vitrap.__file__).read_text(encoding="utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {a.asname: f"{n.module}.{a.name}" for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    homes = {name: f"{home}.{name}" for name, home in vitrap._HOMES.items()}
    assert seen == homes | {room: f"vitrap.{room}" for room in vitrap._ROOMS}


def test_dir_names_what_is_public() -> None:
    assert set(vitrap.__all__) <= set(dir(vitrap))


def test_star_gives_the_public_names() -> None:
    space: dict[str, object] = {}
    exec("from vitrap import *", space)
    assert set(space) - {"__builtins__"} == set(vitrap.__all__)


def test_any_other_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'vitrap' has no attribute 'nothing'"):
        _ = vitrap.nothing  # type: ignore[attr-defined]
    assert not hasattr(vitrap, "torch")


def test_importing_is_light() -> None:
    light = ("vitrap", "vitrap.errors", "vitrap.params", "vitrap.registry", "vitrap.experiment.spec", "vitrap.cli.main")
    assert loaded_by("\n".join(f"import {module}" for module in light)) == set()
    assert loaded_by("import vitrap\nvitrap.load_spec, vitrap.Spec, vitrap.UserError") == set()


def test_a_broken_spec_is_refused_without_torch() -> None:
    code = """
import vitrap
for path, overrides in [("nowhere.toml", []), (None, ["attack.name=agbe"]), (None, ["data.sise=3"])]:
    try:
        vitrap.load_spec(path, overrides)
    except vitrap.UserError:
        continue
    sys.exit(f"{path} {overrides} was read")
"""
    assert loaded_by(code) == set()


def test_help_and_lists_are_light() -> None:
    code = """
from vitrap.cli.main import main
for words in ("--help", "--version", "list attacks", "list models", "list data", "run --help"):
    sys.argv = ["vitrap", *words.split()]
    try:
        main()
    except SystemExit as leave:
        assert not leave.code, (words, leave.code)
"""
    assert loaded_by(code) == set()


def test_a_heavy_name_does_load() -> None:
    """So that a clean result above means something."""
    assert "torch" in loaded_by("import vitrap\nvitrap.open_data")
