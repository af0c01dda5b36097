"""Digests of code: which files they count, and what moves them.

Two oracles say what a file imports: `modulefinder`, which reads Python's bytecode, and Python itself, which imports it.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from modulefinder import ModuleFinder
from pathlib import Path

import pytest

import vitrap.experiment.code as code
from vitrap import registry
from vitrap.experiment.code import PACKAGE, closure, code_digest

ATTACKS = [name for name in registry.names("attacks") if (PACKAGE / "attacks" / f"{name}.py").is_file()]
DEFENCES = [name for name in registry.names("defences") if (PACKAGE / "defences" / f"{name}.py").is_file()]
NEW = ("brand_new.py", "brand_new.txt", "brand_new_room/__init__.py")


def forget() -> None:
    code.code_digest.cache_clear()
    code._used.cache_clear()
    code._read.cache_clear()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package; whoever edits it puts it back."""
    root = tmp_path_factory.mktemp("copy") / "vitrap"
    shutil.copytree(PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def digests(root: Path) -> dict[str, str]:
    """Each digest that a key takes, by whose key it is."""
    code.code_digest.cache_clear()
    attacks = {name: f"attacks/{name}.py" for name in ATTACKS}
    return {
        "clean": code.training_code(root=root),
        "measure": code.measuring_code(root),
        **{f"victim of {name}": code.training_code(file, root=root) for name, file in attacks.items()},
        **{f"trigger of {name}": code.fitting_code(file, root) for name, file in attacks.items()},
        **{f"rows on {name}": code_digest(file, root=root) for name, file in attacks.items()},
        **{f"rows of {name}": code.defending_code(f"defences/{name}.py", root) for name in DEFENCES},
    }


def moved(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


read = code._read.__wrapped__


@cache
def read_once(file: Path, content: bytes) -> code.Source:
    return read(file)


@pytest.fixture
def read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edited file is read anew, and the others are not."""
    monkeypatch.setattr(code, "_read", lambda file: read_once(file, file.read_bytes()))


def edited(file: Path, root: Path) -> dict[str, str]:
    """The digests while there is one statement more in a file, or one byte more in another kind of file."""
    content = file.read_bytes()
    try:
        file.write_bytes(content + (b"\nEDITED = 1\n" if file.suffix == ".py" else b"\0"))
        return digests(root)
    finally:
        file.write_bytes(content)


# ---- the package's own code


def test_a_new_empty_file_anywhere_moves_nothing(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "vitrap"
    shutil.copytree(tree, root)
    before = digests(root)
    folders = [root, *(folder for folder in root.rglob("*") if folder.is_dir())]
    for folder in folders:
        for name in NEW:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("")
    assert len(folders) > 12
    forget()
    assert digests(root) == before


@pytest.fixture(scope="module")
def users(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """For each file of the package, the digests that count it, as `modulefinder` and the rooms of this list have it."""
    hollow = tmp_path_factory.mktemp("hollow") / "vitrap"
    shutil.copytree(tree, hollow)
    for own in hollow.rglob("__init__.py"):  # they are run on the way to any module, and no module asks them a name
        own.write_text("")

    def found(*files: str) -> set[str]:
        finder = ModuleFinder([str(hollow.parent)])
        for file in files:
            finder.import_hook(f"vitrap.{file.removesuffix('.py').replace('/', '.')}")
        ours = (m.__file__ for m in finder.modules.values() if m.__file__)  # pyright: ignore[reportAttributeAccessIssue]
        return {str(Path(file).relative_to(hollow)) for file in ours if not file.endswith("__init__.py")}

    stages = {f"experiment/{n}.py" for n in ("stages", "facts", "streams", "network")}
    triggers = {"experiment/trigger_file.py"}
    opening = found("data/sources.py", "models/classifier.py") | {"data/digits.npz"}
    training = opening | found("train/loop.py", "experiment/predict.py", "metrics/accuracy.py")
    measuring = found("experiment/measure.py", "experiment/pictures.py")
    counted = {
        "clean": training | stages,
        "measure": measuring | {"experiment/run.py", "experiment/record.py"},
    }
    for name in ATTACKS:
        own = found(f"attacks/{name}.py")
        own |= {"data/digits.npz"} & (opening if "data/sources.py" in own else set())
        counted[f"victim of {name}"] = training | stages | triggers | own
        counted[f"trigger of {name}"] = opening | stages | triggers | own
        counted[f"rows on {name}"] = own
    for name in DEFENCES:
        own = found("experiment/measure_defences.py", f"defences/{name}.py")
        opening_runs = {"experiment/defend.py", "experiment/retraining.py"}
        counted[f"rows of {name}"] = training | stages | triggers | opening_runs | own
    files = [str(file.relative_to(tree)) for file in tree.rglob("*") if file.is_file()]
    return {file: {name for name, those in counted.items() if file in those} for file in files}


@pytest.mark.usefixtures("read_again")
def test_an_edited_file_moves_exactly_the_keys_of_its_users(tree: Path, users: dict[str, set[str]]) -> None:
    before = digests(tree)
    found = {file: moved(before, edited(tree / file, tree)) for file in users}
    assert found == users
    assert any(found.values())
    assert not all(found.values())


ALL = {"clean", "measure", *(f"rows of {d}" for d in DEFENCES)}
ALL |= {f"{what} {a}" for what in ("victim of", "trigger of", "rows on") for a in ATTACKS}
OF_AGEB = {"victim of ageb", "trigger of ageb", "rows on ageb"}


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("attacks/ageb.py", OF_AGEB),
        ("tensors/morphology.py", OF_AGEB),
        ("defences/strip.py", {"rows of strip"}),
        ("models/dropout.py", {"rows of psbd"}),
        ("metrics/stealth.py", {"measure"}),
        ("metrics/detection.py", {f"rows of {d}" for d in DEFENCES}),
        ("metrics/accuracy.py", {n for n in ALL if not n.startswith(("trigger of", "rows on"))}),
        ("experiment/run.py", {"measure"}),
        ("experiment/stages.py", {n for n in ALL if n != "measure" and not n.startswith("rows on")}),
        ("tensors/pixels.py", ALL),
        ("contracts.py", ALL),
        ("registry.py", set()),
        ("__init__.py", set()),
        ("tensors/__init__.py", set()),
        ("report/tables.py", set()),
        ("cli/main.py", set()),
        ("data/prepare.py", set()),
    ],
)
@pytest.mark.usefixtures("read_again")
def test_who_uses_a_file(tree: Path, file: str, wanted: set[str]) -> None:
    assert moved(digests(tree), edited(tree / file, tree)) == wanted


@pytest.mark.parametrize(
    "say",
    [
        lambda text: "# a comment\n" + text,
        lambda text: '"""Another docstring."""\n' + text.split('"""', 2)[2],
        lambda text: text.replace("\n\n\n", "\n\n\n\n"),
    ],
    ids=["comment", "docstring", "layout"],
)
@pytest.mark.usefixtures("read_again")
def test_words_about_the_code_move_nothing(tree: Path, say: Callable[[str], str]) -> None:
    before = digests(tree)
    texts = {file: file.read_text("utf-8") for file in (tree / "train" / "loop.py", tree / "attacks" / "ageb.py")}
    try:
        for file, text in texts.items():
            assert say(text) != text
            file.write_text(say(text), "utf-8")
        assert digests(tree) == before
    finally:
        for file, text in texts.items():
            file.write_text(text, "utf-8")


RUNTIME = """
import json, sys, types
from pathlib import Path
root, names = Path(sys.argv[1]), sys.argv[2:]
import vitrap.experiment.code
assert "torch" not in sys.modules, "a digest of code is to be had without torch"
found = {}
for name in names:
    for loaded in [m for m in sys.modules if m.partition(".")[0] == "vitrap"]:
        del sys.modules[loaded]
    for folder in [root, *(f for f in root.rglob("*") if f.is_dir())]:  # in place of what packages run by themselves
        package = ".".join(["vitrap", *folder.relative_to(root).parts])
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    __import__(name)
    files = [getattr(m, "__file__", None) for n, m in sys.modules.items() if n.partition(".")[0] == "vitrap"]
    found[name] = sorted(str(Path(f).relative_to(root)) for f in files if f)
print(json.dumps(found))
"""


def test_what_python_loads_is_counted() -> None:
    """Each root, imported for good with nothing loaded of vitrap's; the stubs are in place of packages' own files."""
    roots = [
        "data/sources.py",
        "models/classifier.py",
        "train/loop.py",
        "experiment/predict.py",
        "experiment/measure.py",
    ]
    roots += [f"attacks/{name}.py" for name in ATTACKS] + [f"defences/{name}.py" for name in DEFENCES]
    names = {f"vitrap.{file.removesuffix('.py').replace('/', '.')}": file for file in roots}
    asked = [sys.executable, "-c", RUNTIME, str(PACKAGE), *names]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, loaded in json.loads(done.stdout).items():
        counted = {str(file.relative_to(PACKAGE)) for file in closure(names[name])}
        assert names[name] in loaded
        assert set(loaded) <= counted, name


def test_no_front_door_and_no_other_method_is_in_a_key() -> None:
    files = {file for name in ATTACKS for file in closure(*code.TRAINING, f"attacks/{name}.py")}
    rooms = {file.relative_to(PACKAGE).parts[0] for file in files}
    assert not rooms & {"cli", "report", "defences", "registry.py", "__init__.py"}
    for name in DEFENCES:
        parts = [file.relative_to(PACKAGE).parts for file in closure(*code.DEFENDING, f"defences/{name}.py")]
        assert [part for part in parts if part[0] in ("attacks", "defences")] == [("defences", f"{name}.py")]


def test_the_files_that_are_named_are_there() -> None:
    for file in (
        *code.TRAINING,
        *code.STAGES,
        *code.TRIGGERS,
        *code.OPENING_RUNS,
        *code.MEASURING,
        *code.RECORDING,
        *code.DEFENDING,
    ):
        assert (PACKAGE / file).is_file()
    with pytest.raises(FileNotFoundError):
        code_digest("train/nothing.py")
    with pytest.raises(FileNotFoundError):
        code_digest("errors.py", without_imports=("train/nothing.py",))


def test_a_file_that_is_no_python_troubles_its_users_alone(tree: Path) -> None:
    before, file = code.defending_code("defences/psbd.py", tree), tree / "defences" / "strip.py"
    text = file.read_text("utf-8")
    try:
        file.write_text(text + "\ndef :\n", "utf-8")
        forget()
        assert code.defending_code("defences/psbd.py", tree) == before
        with pytest.raises(SyntaxError):
            code.defending_code("defences/strip.py", tree)
    finally:
        file.write_text(text, "utf-8")


# ---- a package made for the test


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write files below a folder, by default one that stands for the package."""

    def make(files: dict[str, str], folder: str = "vitrap") -> Path:
        for name, text in files.items():
            place = tmp_path / folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, "utf-8")
        forget()
        return tmp_path / folder

    return make


TOY = {
    "__init__.py": "import typing\nif typing.TYPE_CHECKING:\n    from vitrap.c import promised as promised\n",
    "b.py": "x = 1",
    "c.py": "x = 1",
    "room/__init__.py": "from vitrap.room.d import name\n",
    "room/d.py": "x = 1",
    "room/e.py": "x = 1",
    "room/table.csv": "1,2",
}
ROOM = {"room/__init__.py", "room/d.py"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("import vitrap.b", {"b.py"}),
        ("import vitrap.b as other, vitrap.c", {"b.py", "c.py"}),
        ("from vitrap import b, c", {"b.py", "c.py"}),
        ("from vitrap.b import x", {"b.py"}),
        ("from vitrap.b import *", {"b.py"}),
        ("from .b import x", {"b.py"}),
        ("from . import b", {"b.py"}),
        ("def f():\n    from vitrap.b import x", {"b.py"}),
        ("try:\n    import vitrap.b\nexcept ImportError:\n    import vitrap.c", {"b.py", "c.py"}),
        ("if TYPE_CHECKING:\n    import vitrap.b", set()),
        ("import typing\nif typing.TYPE_CHECKING:\n    import vitrap.b\nelse:\n    import vitrap.c", {"c.py"}),
        ("if not TYPE_CHECKING:\n    import vitrap.b", {"b.py"}),
        ("from vitrap.room import e", {"room/e.py"}),
        ("from vitrap.room.e import x", {"room/e.py"}),
        ("from vitrap.room import name", ROOM),
        ("from vitrap.room import *", ROOM),
        ("from vitrap import room", set()),
        ("from vitrap import room\nroom.name(1)", ROOM),
        ("from vitrap import room as here\nhere.e.x", {"room/e.py"}),
        ("import vitrap\nvitrap.room.e.x", {"room/e.py"}),
        ("import vitrap.room as here\nhere.name", ROOM),
        ("from vitrap import promised", {"__init__.py", "c.py"}),
        ("import vitrap\nvitrap.promised", {"__init__.py", "c.py"}),
        ("from vitrap import *", {"__init__.py", "c.py"}),
        ("import torch, numpy.b\nfrom b import x", set()),
        ('"""import vitrap.b"""\n# import vitrap.b\nx = "import vitrap.b"', set()),
    ],
)
def test_what_an_import_counts(make: Make, text: str, wanted: set[str]) -> None:
    root = make({**TOY, "a.py": text})
    assert {str(file.relative_to(root)) for file in closure("a.py", root=root)} == wanted | {"a.py"}


def test_a_relative_import_goes_up_and_a_cycle_ends(make: Make) -> None:
    files = {
        "room/e.py": "from ..b import x\nfrom . import d",
        "b.py": "import vitrap.a",
        "a.py": "import vitrap.room.e",
    }
    root = make({**TOY, **files})
    wanted = {"room/e.py", "room/d.py", "b.py", "a.py"}
    assert {str(file.relative_to(root)) for file in closure("a.py", root=root)} == wanted


def test_a_file_alone_counts_without_what_it_imports(make: Make) -> None:
    root = make({**TOY, "a.py": "import vitrap.b"})
    first = code_digest("c.py", without_imports=("a.py",), root=root)
    make({"b.py": "x = 2"})
    assert code_digest("c.py", without_imports=("a.py",), root=root) == first
    assert code_digest("c.py", "a.py", root=root) != first
    make({"a.py": "import vitrap.b as c"})
    assert code_digest("c.py", without_imports=("a.py",), root=root) != first


@pytest.mark.parametrize(
    "text", ['open(Path(__file__).with_name("table.csv"))', 'files("vitrap.room").joinpath("table.csv")']
)
def test_data_beside_a_file_count_by_their_content(make: Make, text: str) -> None:
    root = make({**TOY, "room/e.py": text, "room/other.csv": "1", "table.csv": "no neighbour"})
    first = code_digest("room/e.py", root=root)
    make({"room/other.csv": "2", "table.csv": "edited"})
    assert code_digest("room/e.py", root=root) == first
    make({"room/table.csv": "1,3"})
    assert code_digest("room/e.py", root=root) != first


CODE = "def double(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    "same",
    [
        '"""What it is."""\n' + CODE,
        "# why\ndef double(x):\n    # because\n    return 2 * x  # so\n",
        'def double(x):\n    """Twice."""\n    return 2 * x\n',
        "\n\ndef double( x ):\n\n    return (2*x)\n",
    ],
)
def test_comments_docstrings_and_layout_change_no_digest(make: Make, same: str) -> None:
    first = code_digest("a.py", root=make({"a.py": CODE}))
    assert code_digest("a.py", root=make({"a.py": same})) == first


PARAM = 'size: int = param(3, "side", symbol="b", source="paper", low=1)\n'


@pytest.mark.parametrize(
    "same", ['size: int = param(3, "side of the element", symbol="B", unit="px", source="code", low=1)\n']
)
def test_what_a_parameter_says_of_itself_changes_no_digest(make: Make, same: str) -> None:
    first = code_digest("a.py", root=make({"a.py": PARAM}))
    assert code_digest("a.py", root=make({"a.py": same})) == first


@pytest.mark.parametrize(
    "other", [PARAM.replace("3", "5"), PARAM.replace("low=1", "low=2"), PARAM.replace("size", "side")]
)
def test_its_name_default_and_range_do(make: Make, other: str) -> None:
    first = code_digest("a.py", root=make({"a.py": PARAM}))
    assert code_digest("a.py", root=make({"a.py": other})) != first


@pytest.mark.parametrize(
    "other",
    [
        "def double(x):\n    return 3 * x\n",
        "def double(y):\n    return 2 * y\n",
        "def twice(x):\n    return 2 * x\n",
        CODE + "import os\n",
        "def double(x=1):\n    return 2 * x\n",
        "def double(x):\n    return '2 * x'\n",
    ],
)
def test_code_changes_the_digest(make: Make, other: str) -> None:
    first = code_digest("a.py", root=make({"a.py": CODE}))
    assert code_digest("a.py", root=make({"a.py": other})) != first


# ---- a third party's attack


PLUGIN = {
    "__init__.py": "",
    "attack.py": "import vitrap.b\nimport plugin.parts as p\ndef f():\n    from . import more\n    return 'mask.bin'",
    "parts.py": "import plugin.deep.est",
    "more.py": "x = 1",
    "deep/__init__.py": "",
    "deep/est.py": "from vitrap import promised",
    "unused.py": "x = 1",
    "mask.bin": "0110",
}


@pytest.mark.parametrize("regular", [True, False], ids=["package", "namespace package"])
def test_a_plug_in_counts_by_its_own_files_and_what_it_uses_of_vitrap(make: Make, regular: bool) -> None:
    files = {name: text for name, text in PLUGIN.items() if regular or "__init__" not in name}
    root, own = make(TOY), make(files, "elsewhere/plugin")
    attack = str(own / "attack.py")
    wanted = {own / name for name in ("attack.py", "parts.py", "more.py", "deep/est.py", "mask.bin")}
    assert set(closure(attack, root=root)) == wanted | {root / "b.py", root / "__init__.py", root / "c.py"}
    first = code_digest(attack, root=root)
    for name in files:
        if name.endswith("__init__.py"):
            continue
        make({name: files[name] + "\nEDITED = 1"}, "elsewhere/plugin")
        assert (code_digest(attack, root=root) != first) == (own / name in wanted), name
        make({name: files[name]}, "elsewhere/plugin")
    make({"new.py": ""}, "elsewhere/plugin")
    assert code_digest(attack, root=root) == first


def test_a_plug_in_has_one_digest_wherever_it_is_installed(make: Make) -> None:
    root, here, there = make(TOY), make(PLUGIN, "here/plugin"), make(PLUGIN, "far/away/plugin")
    assert code_digest(str(here / "attack.py"), root=root) == code_digest(str(there / "attack.py"), root=root)


def test_vitrap_has_one_digest_wherever_it_is_installed(tree: Path) -> None:
    assert digests(tree) == digests(PACKAGE)


def test_a_single_file_may_lie_anywhere(make: Make) -> None:
    root, own = make(TOY), make({"attack.py": CODE, "b.py": "x = 1"}, "elsewhere")
    first = code_digest(str(own / "attack.py"), root=root)
    make({"attack.py": "# why\n" + CODE, "b.py": "x = 2"}, "elsewhere")
    assert code_digest(str(own / "attack.py"), root=root) == first
    make({"attack.py": CODE + "x = 1"}, "elsewhere")
    assert code_digest(str(own / "attack.py"), root=root) != first
