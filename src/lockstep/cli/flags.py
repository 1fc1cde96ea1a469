"""Flags that several verbs have. Nothing but typer is imported: ``--help`` answers at once."""

from pathlib import Path
from typing import Annotated

import typer

EXIT_CODES = {"PASS": 0, "FAIL": 1, "NOT_RUN": 3}
"""Exit code by what was judged; an error has its class's own (``errors.py``)."""

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a key of the recipe.")
]
EngineName = Annotated[
    str | None, typer.Option(help="vllm, transformers, openai or auto, in place of the recipe's.")
]
EngineUrl = Annotated[
    str | None, typer.Option(help="A running OpenAI-compatible server in place of an engine.")
]
TrainerModel = Annotated[
    str | None, typer.Option(help="The trainer's model, in place of a recipe or of the recipe's.")
]
SearchS = Annotated[
    float | None, typer.Option(help="Seconds to look for a cause; the recipe's parity.search_s.")
]
Power = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="With --depth full: take as many tokens as show a temperature off by this share, and half of "
        "the tensors scaled by it, 99 % of the time (.01). How long it takes is said first.",
    ),
]
"""The recipe's ``parity.directions_see``."""
Plant = Annotated[
    list[str] | None, typer.Option(metavar="FAULT", help="Break the backend on purpose (stale_head, …).")
]
SignKey = Annotated[
    Path | None, typer.Option(help="Sign the certificate with this key: 32 bytes or more, mode 0600.")
]
VerifyKey = Annotated[Path | None, typer.Option(help="The certificate must be signed with this key.")]

KeyEnv = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Confirm the recipe's api_key_env where its name is not that of a key."
    ),
]
"""``--api-key-env``: a recipe alone can have no variable sent to a server but one named like a key."""
