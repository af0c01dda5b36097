"""The house limits, held over the source of the package: each rule is a function from sources to complaints.

Import layers stand in pyproject.toml and are held by import-linter. Every rule here is also shown a small
sample that it must catch, and where it makes an exception, one that it must let pass.
"""

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest

SRC = Path(__file__).parents[1] / "src"

FILE_LINES = 320  # of code: docstrings, comments, imports and blank lines do not count
METHOD_LINES = {"attacks": 200, "defences": 200}
FUNCTION_LINES = 45  # of code, from `def` to the last line
TWIN_STATEMENTS = 5
VAGUE = {"util", "utils", "helper", "helpers", "common", "misc", "base", "manager", "managers"}
SEARCHING = {"vitrap/defences/neural_cleanse.py"}
"""Defences that search for a trigger: their optimiser moves masks and patterns, and no weights."""
PRINTING = {"print", "rich.print", "sys.stdout.write"}
SEEDING = {
    "random.seed",
    "numpy.random.seed",
    "torch.seed",
    "torch.manual_seed",
    "torch.random.seed",
    "torch.random.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
}
UNPICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
HOMES = "home|root|Users|tmp|mnt|opt|var|scratch|work|workspace"
MACHINE_PATH = re.compile(rf"(?<![\w./~$}}-])(/({HOMES})/|[A-Z]:\\\w)")


@dataclass(frozen=True)
class Source:
    """A file of the package: `path` begins with "vitrap/"."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @cached_property
    def aliases(self) -> dict[str, str]:
        """What each imported name stands for: `np` for `numpy`, `nn` for `torch.nn`."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    root = name.name.partition(".")[0]
                    found[name.asname or root] = name.name if name.asname else root
            elif isinstance(node, ast.ImportFrom):
                for name in node.names:
                    found[name.asname or name.name] = f"{self.origin(node)}.{name.name}"
        return found

    def origin(self, node: ast.ImportFrom) -> str:
        """The absolute name of the module that `from ... import` names."""
        if not node.level:
            return node.module or ""
        here = self.module.split(".")
        package = here if self.path.endswith("__init__.py") else here[:-1]
        return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])

    def name(self, node: ast.AST) -> str:
        """The dotted name of an expression with aliases resolved, "" where it is no plain name."""
        if isinstance(node, ast.Subscript):
            return self.name(node.value)
        if isinstance(node, ast.Attribute):
            left = self.name(node.value)
            return left and f"{left}.{node.attr}"
        return self.aliases.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    def at(self, node: ast.AST, complaint: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {complaint}"

    @cached_property
    def code(self) -> set[int]:
        """Numbers of the lines that hold code: no docstring, comment, import or blank line."""
        silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        lines = {n for t in tokens if t.type not in silent for n in range(t.start[0], t.end[0] + 1)}
        for node in ast.walk(self.tree):
            value = node.value if isinstance(node, ast.Expr) else None
            text = isinstance(value, ast.Constant) and isinstance(value.value, str)
            if text or isinstance(node, ast.Import | ast.ImportFrom):
                lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        return lines

    def calls(self) -> Iterator[tuple[str, ast.Call]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield self.name(node.func), node

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


Rule = Callable[[Sequence[Source]], Iterator[str]]


def files_are_short(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        limit = METHOD_LINES.get(PurePosixPath(source.path).parts[1], FILE_LINES)
        if (lines := len(source.code)) > limit:
            yield f"{source.path}: {lines} lines of code, the limit is {limit}"


def functions_are_short(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        for node in source.functions():
            whole = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            if (lines := len(source.code.intersection(whole))) > FUNCTION_LINES:
                yield source.at(node, f"{node.name} has {lines} lines of code, the limit is {FUNCTION_LINES}")


def assignments_do_one_thing(sources: Sequence[Source]) -> Iterator[str]:
    """No tuple of two calls on the right of one assignment: each has a line of its own."""
    for source in sources:
        for node in ast.walk(source.tree):
            unpacked = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
            parts = node.value.elts if unpacked and isinstance(node.value, ast.Tuple) else []
            if sum(any(isinstance(inner, ast.Call) for inner in ast.walk(part)) for part in parts) > 1:
                yield source.at(node, "two calls in one assignment; give each a line")


def names_say_something(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        for part in PurePosixPath(source.path).with_suffix("").parts:
            if part.strip("_").rpartition("_")[2] in VAGUE:
                yield f"{source.path}: {part!r} says nothing of what is inside"


def imports_have_no_cycle(sources: Sequence[Source]) -> Iterator[str]:
    """Counts every import, also one inside a function or for type checking only."""
    modules = {source.module for source in sources}
    graph = {source.module: set(imported(source, modules)) - {source.module} for source in sources}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "import cycle: " + " <- ".join(error.args[1])


def imported(source: Source, modules: set[str]) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in modules)
        elif isinstance(node, ast.ImportFrom):
            origin = source.origin(node)
            for name in node.names:
                child = f"{origin}.{name.name}"
                yield from {child if child in modules else origin} & modules


def bodies_stand_once(sources: Sequence[Source]) -> Iterator[str]:
    """Equal up to layout, comments, docstring and annotations of the signature."""
    seen = defaultdict(list)
    for source in sources:
        for node in source.functions():
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            statements = [n for stmt in body for n in ast.walk(stmt) if isinstance(n, ast.stmt)]
            if len(statements) >= TWIN_STATEMENTS:
                seen["\n".join(map(ast.dump, body))].append(source.at(node, node.name))
    for places in seen.values():
        if len(places) > 1:
            yield "the same body: " + ", ".join(places)


def only_the_cli_prints(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        if not source.path.startswith("vitrap/cli/"):
            yield from (source.at(node, name) for name, node in source.calls() if name in PRINTING)


def defences_train_on_the_common_floor(sources: Sequence[Source]) -> Iterator[str]:
    """No optimiser, and so no training loop, of a defence's own, unless it searches for a trigger."""
    for source in sources:
        if source.path.startswith("vitrap/defences/") and source.path not in SEARCHING:
            own = (call for call in source.calls() if call[0].startswith("torch.optim"))
            yield from (source.at(node, f"{name}: train with vitrap.train.tuning") for name, node in own)


def no_seed_is_global(sources: Sequence[Source]) -> Iterator[str]:
    """Seeding inside `with torch.random.fork_rng()` leaves the global state alone and may stay."""
    for source in sources:
        blocks = (node for node in ast.walk(source.tree) if isinstance(node, ast.With))
        forked = {inner for block in blocks if forks(source, block) for inner in ast.walk(block)}
        for name, node in source.calls():
            if name in SEEDING and node not in forked:
                yield source.at(node, f"{name} changes the state of every other user")


def forks(source: Source, block: ast.With) -> bool:
    entered = (item.context_expr for item in block.items)
    return any(isinstance(e, ast.Call) and source.name(e.func).endswith(".fork_rng") for e in entered)


def classes_do_not_inherit(sources: Sequence[Source]) -> Iterator[str]:
    """A base of our own may only be a protocol or an error."""
    bases = {
        f"{source.module}.{node.name}": (source, node)
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef)
    }

    def names(source: Source, node: ast.ClassDef) -> Iterator[str]:
        for name in map(source.name, node.bases):
            full = name if "." in name else f"{source.module}.{name}"
            room, _, last = full.rpartition(".")
            behind = (own for own in bases if own.startswith(f"{room}.") and own.endswith(f".{last}"))
            yield full if full in bases else next(behind, full)

    def may_be_a_base(name: str) -> bool:
        if name not in bases:
            return name.endswith((".Protocol", "Exception", "Error"))
        return any(map(may_be_a_base, names(*bases[name])))

    for source, node in bases.values():
        for name in names(source, node):
            if name in bases and not may_be_a_base(name):
                yield source.at(node, f"{node.name} inherits from {name}")


def nothing_is_unpickled(sources: Sequence[Source]) -> Iterator[str]:
    """Other people's files must not run code here: safetensors, npy and `weights_only=True` do not."""
    for source in sources:
        for target in source.aliases.values():
            if target.partition(".")[0] in UNPICKLING:
                yield f"{source.path}: imports {target}"
        for name, node in source.calls():
            on = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is True}
            if "allow_pickle" in on or (name == "torch.load" and "weights_only" not in on):
                yield source.at(node, f"{name} may unpickle")


def no_path_of_a_machine(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        for number, line in enumerate(source.text.splitlines(), 1):
            if match := MACHINE_PATH.search(line):
                yield f"{source.path}:{number}: {match[0]!r} is somebody's machine"


def function(lines: int, name: str = "f") -> str:
    return f"def {name}(x):\n" + "    x += 1\n" * (lines - 1)


CAUGHT: list[tuple[Rule, dict[str, str]]] = [
    (files_are_short, {"train/loop.py": "x = 1\n" * (FILE_LINES + 1)}),
    (files_are_short, {"attacks/badnets.py": "x = 1\n" * (METHOD_LINES["attacks"] + 1)}),
    (functions_are_short, {"a.py": function(FUNCTION_LINES + 1)}),
    (functions_are_short, {"a.py": "async " + function(FUNCTION_LINES + 1)}),
    (assignments_do_one_thing, {"a.py": "x, y = f(1), g(2)"}),
    (assignments_do_one_thing, {"a.py": "x, y, z = f(1), 0, g(2)"}),
    (names_say_something, {"data/utils.py": ""}),
    (names_say_something, {"data/_image_helpers.py": ""}),
    (names_say_something, {"common/images.py": ""}),
    (imports_have_no_cycle, {"a.py": "import vitrap.b", "b.py": "from vitrap import a"}),
    (imports_have_no_cycle, {"a.py": "from vitrap.b import B", "b.py": "def f():\n    from .a import A"}),
    (imports_have_no_cycle, {"r/__init__.py": "from .a import A", "r/a.py": "from vitrap.r import A"}),
    (bodies_stand_once, {"a.py": function(6, "f"), "b.py": function(6, "g").replace("+=", " += ")}),
    (bodies_stand_once, {"a.py": "\n".join(f'def {n}(x):\n    "{n}"\n' + "    x()\n" * 5 for n in "fg")}),
    (only_the_cli_prints, {"data/images.py": "def f(x):\n    print(x)"}),
    (only_the_cli_prints, {"report/page.py": "from rich import print\nprint(1)"}),
    (defences_train_on_the_common_floor, {"defences/a.py": "import torch\ntorch.optim.SGD([w], lr=1)"}),
    (defences_train_on_the_common_floor, {"defences/a.py": "from torch.optim import Adam as A\nA([w])"}),
    (no_seed_is_global, {"a.py": "import torch\ntorch.manual_seed(0)"}),
    (no_seed_is_global, {"a.py": "import numpy as np\nnp.random.seed(0)"}),
    (no_seed_is_global, {"a.py": "from random import seed as s\ns(0)"}),
    (no_seed_is_global, {"a.py": "import torch\nwith torch.no_grad():\n    torch.cuda.manual_seed_all(0)"}),
    (classes_do_not_inherit, {"a.py": "class A: ...\nclass B(A): ..."}),
    (classes_do_not_inherit, {"a.py": "class A(M): ...", "b.py": "from . import a\nclass B(a.A): ..."}),
    (classes_do_not_inherit, {"r/a.py": "class A: ...", "b.py": "from vitrap.r import A\nclass B(A): ..."}),
    (classes_do_not_inherit, {"a.py": "class A(P): ...\nclass B(A[int]): ..."}),
    (nothing_is_unpickled, {"a.py": "import pickle as p"}),
    (nothing_is_unpickled, {"a.py": "from joblib import load"}),
    (nothing_is_unpickled, {"a.py": "import torch\ntorch.load(f)"}),
    (nothing_is_unpickled, {"a.py": "from torch import load\nload(f, weights_only=False)"}),
    (nothing_is_unpickled, {"a.py": "import numpy\nnumpy.load(f, allow_pickle=True)"}),
    (no_path_of_a_machine, {"a.py": 'FOLDER = "/home/ada/cifar"'}),
    (no_path_of_a_machine, {"a.py": "# C:\\data"}),
]

ALLOWED: list[tuple[Rule, dict[str, str]]] = [
    (files_are_short, {"attacks/badnets.py": "x = 1\n" * METHOD_LINES["attacks"]}),
    (files_are_short, {"attacks/badnets.py": '"""A\n\npaper.\n"""\n\n# why\n' + "x = 1\n" * METHOD_LINES["attacks"]}),
    (functions_are_short, {"a.py": function(FUNCTION_LINES)}),
    (assignments_do_one_thing, {"a.py": "x, y = f(1), 2\nx = f(1), g(2)\nx, y = h(f(1), g(2))"}),
    (names_say_something, {"metrics/base_rates.py": ""}),
    (imports_have_no_cycle, {"r/__init__.py": "from .a import A", "r/a.py": "import vitrap.b", "b.py": ""}),
    (bodies_stand_once, {"a.py": function(5, "f") + function(5, "g")}),
    (only_the_cli_prints, {"cli/main.py": "print(1)", "report/page.py": "console.print(1)"}),
    (defences_train_on_the_common_floor, {"attacks/a.py": "import torch\ntorch.optim.SGD([w], lr=1)"}),
    (no_seed_is_global, {"a.py": "import torch\nwith torch.random.fork_rng():\n    torch.manual_seed(0)"}),
    (no_seed_is_global, {"a.py": "import torch\ntorch.Generator().manual_seed(0)\ng.manual_seed(0)"}),
    (classes_do_not_inherit, {"a.py": "import typing\nclass A(typing.Protocol): ...\nclass B(A): ..."}),
    (classes_do_not_inherit, {"a.py": "class A(ValueError): ...\nclass B(A): ...\nclass C(B): ..."}),
    (classes_do_not_inherit, {"a.py": "from torch.utils.data import Dataset as D\nclass Dataset(D): ..."}),
    (nothing_is_unpickled, {"a.py": "import torch\ntorch.load(f, weights_only=True)"}),
    (no_path_of_a_machine, {"a.py": '"https://arxiv.org/home/x", "images/tmp/x", "~/opt/x"'}),
]

RULES = list(dict.fromkeys(rule for rule, _ in CAUGHT))


@pytest.fixture(scope="module")
def package() -> list[Source]:
    sources = [Source(p.relative_to(SRC).as_posix(), p.read_text("utf-8")) for p in sorted(SRC.rglob("*.py"))]
    assert sources
    return sources


def sample(files: dict[str, str]) -> list[Source]:
    return [Source(f"vitrap/{path}", text) for path, text in files.items()]


def label(value: object) -> str:
    return getattr(value, "__name__", "")


@pytest.mark.parametrize("rule", RULES, ids=label)
def test_package_keeps(rule: Rule, package: list[Source]):
    assert not list(rule(package))


@pytest.mark.parametrize(("rule", "files"), CAUGHT, ids=label)
def test_rule_catches(rule: Rule, files: dict[str, str]):
    assert len(list(rule(sample(files)))) == 1


@pytest.mark.parametrize(("rule", "files"), ALLOWED, ids=label)
def test_rule_lets_pass(rule: Rule, files: dict[str, str]):
    assert not list(rule(sample(files)))


def test_every_rule_is_held():
    """A rule is what goes from sources to complaints; one without a sample would never run."""
    signature = [Sequence[Source], Iterator[str]]
    held = {f for f in globals().values() if [*getattr(f, "__annotations__", {}).values()] == signature}
    assert set(RULES) == held
