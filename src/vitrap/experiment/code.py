"""Digests the code that a result rests on: a file and all files that it imports, which are parsed, not run.

A stage's key includes such a digest, so it changes when one of these files is edited, and only then: a new file that
nobody imports changes no key. Comments, docstrings, layout and what a `param` says of itself do not count.

Imports of vitrap's own files count, and so do those within another package that has an attack or a defence. They count
wherever they stand, inside functions, too, but not under `if TYPE_CHECKING:`. Other libraries do not count; a stage's
key names the versions of those that matter.
"""

import ast
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path, PurePath

PACKAGE = Path(__file__).parents[1]
NAME = __name__.partition(".")[0]

OPENING = ("data/sources.py", "models/classifier.py")
"""Files that open data and networks."""
TRAINING = (*OPENING, "train/loop.py", "experiment/predict.py", "metrics/accuracy.py")
"""Files that train a model and measure its curves."""
STAGES = tuple(f"experiment/{name}.py" for name in ("stages", "facts", "streams", "network"))
"""Files that make stages. They import every part of a run, so they count without their imports."""
TRIGGERS = ("experiment/trigger_file.py",)
"""The file that writes and reads triggers. It counts where there is an attack, without its imports."""
MEASURING = ("experiment/measure.py", "experiment/pictures.py")
"""Files that measure a victim."""
RECORDING = ("experiment/run.py", "experiment/record.py")
"""Files that write the measures into a record. They count without their imports."""
OPENING_RUNS = ("experiment/defend.py", "experiment/retraining.py")
"""Files that load a finished run for a defender, and train for one. They count without their imports."""
TEXTS = {"doc", "symbol", "unit", "source"}
"""What a `param` says of itself, beside its default and its range."""
DEFENDING = (*TRAINING, "experiment/measure_defences.py")
"""Files that measure a defence; those of training are among them, since a network is trained again after a filter."""


@dataclass(frozen=True)
class ImportedName:
    """A dotted name that a file imports, or reaches through something imported.

    Attributes:
        level: how many packages up the name starts, 1 being the file's own; 0 where it is absolute.
        parts: the name.
    """

    level: int
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """What a file says, as far as digests need it.

    Attributes:
        digest: of its syntax tree, or of its bytes where it is no Python.
        imports: the names that it imports.
        type_imports: what it imports under `if TYPE_CHECKING:`, by the name it has here. A package that loads its names
            on first use declares there where they come from.
        data: the files beside it that it names.
    """

    digest: str
    imports: tuple[ImportedName, ...] = ()
    type_imports: Mapping[str, ImportedName] = field(default_factory=dict)
    data: tuple[Path, ...] = ()


def training_code(*attack: str, root: Path = PACKAGE) -> str:
    """A digest of the code that trains a model: on clean data, or on data poisoned by the attack in a file."""
    return code_digest(*TRAINING, *attack, without_imports=(*STAGES, *(TRIGGERS if attack else ())), root=root)


def fitting_code(attack: str, root: Path = PACKAGE) -> str:
    """A digest of the code that makes the trigger of the attack in a file."""
    return code_digest(*OPENING, attack, without_imports=(*STAGES, *TRIGGERS), root=root)


def measuring_code(root: Path = PACKAGE) -> str:
    """A digest of the code that measures a victim and writes its record."""
    return code_digest(*MEASURING, without_imports=RECORDING, root=root)


def defending_code(defence: str, root: Path = PACKAGE) -> str:
    """A digest of the defence in a file, and of the code that measures it."""
    return code_digest(*DEFENDING, defence, without_imports=(*STAGES, *TRIGGERS, *OPENING_RUNS), root=root)


def running_code(root: Path = PACKAGE) -> str:
    """A digest of all code that any run may use, whatever its attack and its defences."""
    methods = [str(file) for kind in ("attacks", "defences") for file in sorted((root / kind).glob("*.py"))]
    return code_digest("sweeps/jobs.py", "sweeps/on_ray.py", *methods, root=root)


@cache
def code_digest(*files: str, without_imports: tuple[str, ...] = (), root: Path = PACKAGE) -> str:
    """Sixteen hex digits that change whenever the code of `files`, or code that they import, changes.

    Args:
        files: paths below `root`, or absolute ones; each counts with all that it imports.
        without_imports: files that count without what they import.
        root: the folder of the package.

    Raises:
        FileNotFoundError: one of the files is not there.
        SyntaxError: one of them is no Python.
    """
    found = set(closure(*files, root=root)) | {root / file for file in without_imports}
    whole = sha256()
    for name, digest in sorted((_name(file, root), _read(file).digest) for file in found):
        whole.update(f"{name}\0{digest}\0".encode())
    return whole.hexdigest()[:16]


def closure(*files: str, root: Path = PACKAGE) -> list[Path]:
    """The files, all files of their own package and of vitrap that they import, directly or not, and their data."""
    waiting = [root / file for file in files]
    found: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _used(file, root)
    return sorted(found)


@cache
def _used(file: Path, root: Path) -> tuple[Path, ...]:
    """The files that a file imports directly, and the data files that it names."""
    source = _read(file)
    reached = [found for imported in source.imports for found in _reached(imported, file, root)]
    return tuple(dict.fromkeys([*source.data, *reached]))


def _reached(imported: ImportedName, file: Path, root: Path) -> Iterator[Path]:
    """The files that a name mentioned in `file` comes from; none where it is another library's."""
    for folder, parts in _starts(imported, file, root):
        found, left = _walk(folder, parts)
        if found is not None:
            yield found
        # The name is one of a package: if the package loads it on first use, the file that it comes from counts.
        if found is not None and left:
            for name, origin in _read(found).type_imports.items():
                if left in (name, "*"):
                    yield from _reached(origin, found, root)


def _starts(imported: ImportedName, file: Path, root: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The folders in which an imported name may start, each with the rest of the name."""
    if imported.level:
        yield file.parents[imported.level - 1], imported.parts
    elif imported.parts[0] == NAME:
        yield root, imported.parts[1:]
    elif not file.is_relative_to(root):
        for folder in file.parents:
            if folder.name == imported.parts[0]:
                yield folder, imported.parts[1:]


def _walk(folder: Path, parts: tuple[str, ...]) -> tuple[Path | None, str]:
    """The file that a dotted name leads to; where it is a package's `__init__.py`, also the name looked up there.

    Packages on the way to it do not count.
    """
    for part in parts:
        inner, module = folder / part, folder / f"{part}.py"
        if module.is_file() and not (inner / "__init__.py").is_file():
            return module, ""
        if not inner.is_dir():
            own = folder / "__init__.py"
            return (own, part) if own.is_file() else (None, "")
        folder = inner
    return None, ""


@cache
def _read(file: Path) -> Source:
    """Parse a file, without running it."""
    content = file.read_bytes()
    if file.suffix != ".py":
        return Source(sha256(content).hexdigest())
    tree = _without_texts(ast.parse(content, str(file)))
    nodes, type_nodes = _split(tree)
    return Source(
        sha256(ast.dump(tree).encode()).hexdigest(),
        tuple(dict.fromkeys(_imported_names(nodes))),
        dict(pair for node in type_nodes for pair in _imported(node)),
        tuple(sorted(_data(nodes, file))),
    )


def _split(tree: ast.Module) -> tuple[list[ast.AST], list[ast.AST]]:
    """The nodes of a file outside of `if TYPE_CHECKING:`, and those inside."""
    nodes = list[ast.AST]()
    type_nodes = list[ast.AST]()
    waiting = deque[ast.AST]([tree])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, ast.If) and _dotted(node.test)[-1:] == ["TYPE_CHECKING"]:
            type_nodes += (inner for statement in node.body for inner in ast.walk(statement))
            waiting.extend(node.orelse)
        else:
            nodes.append(node)
            waiting.extend(ast.iter_child_nodes(node))
    return nodes, type_nodes


def _imported_names(nodes: Sequence[ast.AST]) -> Iterator[ImportedName]:
    """The names that a file imports, and those that it uses through them: `vitrap.tensors.erode` of `import vitrap`."""
    bound = dict[str, ImportedName]()
    for node in nodes:
        for name, imported in _imported(node):
            bound[name] = imported
            yield imported
        if isinstance(node, ast.Import):
            yield from (ImportedName(0, tuple(alias.name.split("."))) for alias in node.names)
    for node in nodes:
        if isinstance(node, ast.Attribute) and (parts := _dotted(node)) and parts[0] in bound:
            start = bound[parts[0]]
            yield ImportedName(start.level, (*start.parts, *parts[1:]))


def _imported(node: ast.AST) -> Iterator[tuple[str, ImportedName]]:
    """Each name that an import statement binds, and what it stands for."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            parts = tuple(alias.name.split("."))
            yield (alias.asname, ImportedName(0, parts)) if alias.asname else (parts[0], ImportedName(0, parts[:1]))
    elif isinstance(node, ast.ImportFrom):
        module = tuple(node.module.split(".")) if node.module else ()
        for alias in node.names:
            yield alias.asname or alias.name, ImportedName(node.level, (*module, alias.name))


def _dotted(node: ast.AST) -> list[str]:
    """The parts of a dotted name such as `a.b.c`; none of any other expression."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (left := _dotted(node.value)):
        return [*left, node.attr]
    return []


def _data(nodes: Sequence[ast.AST], file: Path) -> Iterator[Path]:
    """The files beside `file` whose name is a string in it, as in `Path(__file__).with_name("digits.npz")`."""
    for text in {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}:
        can_be_a_file = text.isprintable() and PurePath(text).name == text and len(text.encode()) < 256
        if can_be_a_file:
            beside = file.parent / text
            if beside.is_file() and beside.suffix != ".py":
                yield beside


def _name(file: Path, root: Path) -> str:
    """A file's name in a digest: its path from its package on, so that it does not matter where that is installed."""
    if file.is_relative_to(root):
        return f"{NAME}/{file.relative_to(root).as_posix()}"
    top = file.parent
    while (top / "__init__.py").is_file():
        top = top.parent
    return file.relative_to(top).as_posix()


def _without_texts(tree: ast.Module) -> ast.Module:
    """The tree without docstrings, and without the texts of hyper-parameters: neither changes a result."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _dotted(node.func)[-1:] == ["param"]:
            node.args = node.args[:1]
            node.keywords = [keyword for keyword in node.keywords if keyword.arg not in TEXTS]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return tree
