"""How names find attacks and defences: `attacks/ageb.py` is the attack "ageb"; other packages register entry points.

Names and headlines are read from files as text; nothing is imported before a class is asked for.
"""

import ast
import importlib
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from vitrap.errors import unknown

Kind = Literal["attacks", "defences"]
HERE = Path(__file__).parent


def _files(kind: Kind) -> dict[str, Path]:
    """Our own files of a kind, by name."""
    return {path.stem: path for path in sorted((HERE / kind).glob("*.py")) if not path.stem.startswith("_")}


def _plugins(kind: Kind) -> dict[str, EntryPoint]:
    """The entry points of other packages, by name."""
    return {point.name: point for point in entry_points(group=f"vitrap.{kind}")}


def names(kind: Kind) -> list[str]:
    """All registered names of a kind, sorted."""
    return sorted({*_files(kind), *_plugins(kind)})


def variants(method: type[Any]) -> list[Any]:
    """An attack or a defence with its defaults: one for each choice of its parameter `setting`, where it has one."""
    choices = next((f.metadata["param"].choices for f in fields(method) if f.name == "setting"), ())
    return [method(setting=choice) for choice in choices] or [method()]


def headline(kind: Kind, name: str) -> str:
    """The first line of the docstring of the file that defines `name`; "" for an entry point."""
    path = _files(kind).get(name)
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path else None
    return doc.splitlines()[0] if doc else ""


def headlines(kind: Kind) -> dict[str, str]:
    """The headline of every registered name of a kind."""
    return {name: headline(kind, name) for name in names(kind)}


def get(kind: Kind, name: str) -> type[Any]:
    """The class that `name` stands for.

    Raises:
        UserError: `name` is not registered; the message names the nearest that is.
    """
    if name in _files(kind):
        module = importlib.import_module(f"vitrap.{kind}.{name}")
        # The file's one class with a card; the rest of the file are its helpers.
        own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
        (method,) = [c for c in own if "card" in vars(c)]
        return method
    plugins = _plugins(kind)
    if name in plugins:
        return plugins[name].load()
    raise unknown(kind.removesuffix("s"), name, names(kind))
