"""Which code a result rests on: a digest of a file and of all files that it imports, found by reading, not by running.

A key that takes such a digest moves when one of these files is edited, and only then: a new file that nobody imports
moves nothing. Comments, docstrings and layout do not count.

Of vitrap's own files, and of those of the package that a third party's attack or defence lies in, an import counts
wherever it stands, inside functions, too; but not under `if TYPE_CHECKING:`. Other libraries do not count; a stage's
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
"""The files that open data and networks."""
TRAINING = (*OPENING, "train/loop.py", "experiment/predict.py", "metrics/accuracy.py")
"""What trains a model and counts for its curves."""
STAGES = ("experiment/stages.py", "experiment/streams.py", "experiment/network.py")
"""They make stages and know every part of a run: they count without what they import."""
TRIGGERS = ("experiment/trigger_file.py",)
"""It keeps triggers and brings them back: it counts where there is an attack, without what it imports."""
MEASURING = ("experiment/measure.py", "experiment/pictures.py")
RECORDING = ("experiment/run.py", "experiment/record.py")
"""They write what was measured, and count without what they import."""
OPENING_RUNS = ("experiment/defend.py",)
"""It brings a finished run back for a defender, and counts without what it imports."""
DEFENDING = (*TRAINING, "experiment/outcomes.py")
"""Training belongs to it: a filter trains anew."""


@dataclass(frozen=True)
class Mention:
    """A dotted name that a file imports, or reaches through something imported.

    Attributes:
        level: how many packages up the name starts, 1 being the file's own; 0 where it is absolute.
        parts: the name.
    """

    level: int
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """What is read of a file.

    Attributes:
        digest: of its syntax tree, or of its bytes where it is no Python.
        mentions: what it imports.
        promised: what it imports for type checking only, by the name it gets here: a package that loads its names when
            they are first asked for says so where they come from.
        data: the files beside it that it names.
    """

    digest: str
    mentions: tuple[Mention, ...] = ()
    promised: Mapping[str, Mention] = field(default_factory=dict)
    data: tuple[Path, ...] = ()


def training_code(*attack: str, root: Path = PACKAGE) -> str:
    """A digest of what trains a model: on clean data, or on what the attack in a file makes of them."""
    return code_digest(*TRAINING, *attack, alone=(*STAGES, *(TRIGGERS if attack else ())), root=root)


def fitting_code(attack: str, root: Path = PACKAGE) -> str:
    """A digest of what makes the trigger of the attack in a file."""
    return code_digest(*OPENING, attack, alone=(*STAGES, *TRIGGERS), root=root)


def measuring_code(root: Path = PACKAGE) -> str:
    """A digest of what measures a victim and writes its record."""
    return code_digest(*MEASURING, alone=RECORDING, root=root)


def defending_code(defence: str, root: Path = PACKAGE) -> str:
    """A digest of the defence in a file, and of what measures it."""
    return code_digest(*DEFENDING, defence, alone=(*STAGES, *TRIGGERS, *OPENING_RUNS), root=root)


def running_code(root: Path = PACKAGE) -> str:
    """A digest of all that a run may come to use, whatever its attack and its defences."""
    methods = [str(file) for kind in ("attacks", "defences") for file in sorted((root / kind).glob("*.py"))]
    return code_digest("sweeps/jobs.py", "sweeps/on_ray.py", *methods, root=root)


@cache
def code_digest(*files: str, alone: tuple[str, ...] = (), root: Path = PACKAGE) -> str:
    """Sixteen hex digits that change whenever code does that `files` use.

    Args:
        files: each counts with all that it imports; named from `root`, or anywhere by their whole path.
        alone: these count without what they import.
        root: the folder of the package.

    Raises:
        FileNotFoundError: one of the files is not there.
        SyntaxError: one of them is no Python.
    """
    found = set(closure(*files, root=root)) | {root / file for file in alone}
    whole = sha256()
    for name, digest in sorted((_name(file, root), _read(file).digest) for file in found):
        whole.update(f"{name}\0{digest}\0".encode())
    return whole.hexdigest()[:16]


def closure(*files: str, root: Path = PACKAGE) -> list[Path]:
    """The files, all that they import of their own package and of vitrap, and so on, and the data beside them."""
    waiting, found = [root / file for file in files], set[Path]()
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _used(file, root)
    return sorted(found)


@cache
def _used(file: Path, root: Path) -> tuple[Path, ...]:
    """What a file imports by itself, and the data that it names."""
    source = _read(file)
    reached = [found for mention in source.mentions for found in _reached(mention, file, root)]
    return tuple(dict.fromkeys([*source.data, *reached]))


def _reached(mention: Mention, file: Path, root: Path) -> Iterator[Path]:
    """The files that a mention in `file` leads to; none where another library is meant."""
    for folder, parts in _starts(mention, file, root):
        found, left = _walk(folder, parts)
        if found is not None:
            yield found
        if found is not None and left:  # a name that a package gives away: where from, if it loads it later
            for name, promise in _read(found).promised.items():
                if left in (name, "*"):
                    yield from _reached(promise, found, root)


def _starts(mention: Mention, file: Path, root: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The folders that a mention may start from, and what of its name is left there."""
    if mention.level:
        yield file.parents[mention.level - 1], mention.parts
    elif mention.parts[0] == NAME:
        yield root, mention.parts[1:]
    elif not file.is_relative_to(root):
        for folder in file.parents:
            if folder.name == mention.parts[0]:
                yield folder, mention.parts[1:]


def _walk(folder: Path, parts: tuple[str, ...]) -> tuple[Path | None, str]:
    """The file that a name leads to, and, where that is a package's own, which name is asked of it.

    A package through which the name only leads does not count.
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
    """What a file says. Nothing in it is run."""
    content = file.read_bytes()
    if file.suffix != ".py":
        return Source(sha256(content).hexdigest())
    tree = _without_docstrings(ast.parse(content, str(file)))
    nodes, promises = _split(tree)
    return Source(
        sha256(ast.dump(tree).encode()).hexdigest(),
        tuple(dict.fromkeys(_mentions(nodes))),
        dict(pair for node in promises for pair in _imported(node)),
        tuple(sorted(_data(nodes, file))),
    )


def _split(tree: ast.Module) -> tuple[list[ast.AST], list[ast.AST]]:
    """All nodes of a file but what stands under `if TYPE_CHECKING:`; and just that."""
    nodes = list[ast.AST]()
    promises = list[ast.AST]()
    waiting = deque[ast.AST]([tree])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, ast.If) and _chain(node.test)[-1] == "TYPE_CHECKING":
            promises += (inner for statement in node.body for inner in ast.walk(statement))
            waiting.extend(node.orelse)
        else:
            nodes.append(node)
            waiting.extend(ast.iter_child_nodes(node))
    return nodes, promises


def _mentions(nodes: Sequence[ast.AST]) -> Iterator[Mention]:
    """What a file imports, and the names that it reaches through that: `vitrap.tensors.erode` after `import vitrap`."""
    bound = dict[str, Mention]()
    for node in nodes:
        for name, mention in _imported(node):
            bound[name] = mention
            yield mention
        if isinstance(node, ast.Import):
            yield from (Mention(0, tuple(alias.name.split("."))) for alias in node.names)
    for node in nodes:
        if isinstance(node, ast.Attribute) and (chain := _chain(node))[0] in bound:
            start = bound[chain[0]]
            yield Mention(start.level, (*start.parts, *chain[1:]))


def _imported(node: ast.AST) -> Iterator[tuple[str, Mention]]:
    """Each name that an import statement binds, and what it stands for."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            parts = tuple(alias.name.split("."))
            yield (alias.asname, Mention(0, parts)) if alias.asname else (parts[0], Mention(0, parts[:1]))
    elif isinstance(node, ast.ImportFrom):
        module = tuple(node.module.split(".")) if node.module else ()
        for alias in node.names:
            yield alias.asname or alias.name, Mention(node.level, (*module, alias.name))


def _chain(node: ast.AST) -> list[str]:
    """The names of `a.b.c`; [""] for what is no plain name."""
    if isinstance(node, ast.Attribute) and (left := _chain(node.value)) != [""]:
        return [*left, node.attr]
    return [node.id if isinstance(node, ast.Name) else ""]


def _data(nodes: Sequence[ast.AST], file: Path) -> Iterator[Path]:
    """The files beside `file` that it names by a text: `Path(__file__).with_name("digits.npz")`."""
    for text in {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}:
        if text.isprintable() and PurePath(text).name == text and len(text.encode()) < 256:  # as a file may be called
            beside = file.parent / text
            if beside.is_file() and beside.suffix != ".py":
                yield beside


def _name(file: Path, root: Path) -> str:
    """What a file is called in a digest: its path below its package, wherever that is installed."""
    if file.is_relative_to(root):
        return f"{NAME}/{file.relative_to(root).as_posix()}"
    top = file.parent
    while (top / "__init__.py").is_file():
        top = top.parent
    return file.relative_to(top).as_posix()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return tree
