"""`python -m vitrap`: the `vitrap` command."""

from vitrap.cli.main import process

process()
