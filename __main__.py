"""`python -m ridgeline` is the `ridgeline` command."""

from .cli import command

command()
