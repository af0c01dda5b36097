"""The attacks: one paper, one file; the file's name is the attack's."""

from functools import partial

from vitrap import registry

get = partial(registry.get, "attacks")
names = partial(registry.names, "attacks")

__all__ = ["get", "names"]
