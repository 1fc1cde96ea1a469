"""Flags that several verbs have. Nothing but typer is imported: ``--help`` answers at once."""

from pathlib import Path
from typing import Annotated

import typer

Plant = Annotated[list[str] | None, typer.Option(metavar="FAULT", help="Break the backend on purpose (stale_head, …).")]
SignKey = Annotated[Path | None, typer.Option(help="Sign the certificate with this key: 32 bytes or more, mode 0600.")]

KeyEnv = Annotated[
    str, typer.Option(metavar="NAME", help="Confirm the recipe's api_key_env where its name is not that of a key.")
]
"""``--api-key-env``: a recipe alone can have no other variable sent to a server than one that is named like a key."""
