"""The attacks: one file per paper; the file's name is the attack's name in specs and on the command line."""

from functools import partial

from vitrap import registry

get = partial(registry.get, "attacks")
names = partial(registry.names, "attacks")

__all__ = ["get", "names"]
