"""Flags that several verbs have. Nothing but typer is imported: ``--help`` answers at once."""

from typing import Annotated

import typer

KeyEnv = Annotated[
    str, typer.Option(metavar="NAME", help="Confirm the recipe's api_key_env where its name is not that of a key.")
]
"""``--api-key-env``: a recipe alone can have no other variable sent to a server than one that is named like a key."""
