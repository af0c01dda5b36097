"""The defences: one file per paper; the file's name is the defence's name in specs and on the command line."""

from functools import partial

from vitrap import registry

get = partial(registry.get, "defences")
names = partial(registry.names, "defences")

__all__ = ["get", "names"]
