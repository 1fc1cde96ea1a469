"""The ``engine.options`` of a server over HTTP: where it is, its deadline, and which variable holds its key.

A recipe is written down whole with every run, so it may hold no secret; and a recipe that someone else wrote
must not get at a variable of the environment that is no key.
"""

import base64
import os
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from lockstep.errors import UsageError
from lockstep.records.semantics import Distribution

KEY_NAMES = ("_API_KEY", "_TOKEN")
"""How a variable's name ends that a recipe alone may name."""
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
URL_HINT = "--set engine.options.base_url=http://127.0.0.1:8000"
HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")


class ServerOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """The recipe's ``engine.options`` for this engine."""

    base_url: str
    """Up to and without ``/v1``; with no user, password or query."""
    model: str = ""
    """The model's name, as the server calls it; empty: the first that it lists."""
    api_key_env: str = "LOCKSTEP_API_KEY"
    """The environment variable that holds the key; the key itself goes into no file. Its name ends in
    ``_API_KEY`` or ``_TOKEN``, or is confirmed on the command line (``--api-key-env``)."""
    auth: Literal["bearer", "basic"] = "bearer"
    """How the key is sent. ``basic``: the variable holds ``user:password``."""
    timeout_s: Seconds = 600.0
    """How long one request may take, from its sending to its whole answer, retries included."""
    connect_timeout_s: Seconds = 5.0
    retries: Annotated[int, Meta(ge=0, le=100)] = 4
    max_connections: Annotated[int, Meta(ge=1, le=10_000)] = 64
    distribution: Distribution | None = None
    """Which distribution the server's log-probabilities are of, where it cannot be found out by scoring."""


def options_of(raw: dict[str, Any], confirmed: str = "") -> ServerOptions:
    """The options, checked; nothing is sent.

    Args:
        confirmed: the variable that ``--api-key-env`` names; empty where the flag was not given.

    Raises:
        UsageError: for an unknown or a missing option, a URL that is none, a variable that holds no key.
    """
    try:
        options = msgspec.convert(raw, ServerOptions)
    except msgspec.ValidationError as error:
        raise UsageError(
            "engine.options of an HTTP engine",
            got=str(error),
            expected="base_url and the like",
            hint=URL_HINT,
        ) from error
    _refuse_url(options)
    name = options.api_key_env
    if confirmed and confirmed != name:
        expected = f"{name!r}, which the recipe's engine.options.api_key_env names"
        raise UsageError(
            "flag --api-key-env", got=repr(confirmed), expected=expected, hint=f"--api-key-env {name}"
        )
    if name and not confirmed and not name.endswith(KEY_NAMES):
        raise UsageError(
            "engine.options.api_key_env",
            got=repr(name),
            expected="a variable whose name ends in _API_KEY or _TOKEN: its value is sent to the server",
            hint=f"--api-key-env {name}   if that is what you mean",
        )
    return options


def _refuse_url(options: ServerOptions) -> None:
    url = options.base_url
    fault = ""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port  # read for its error: it is no number, or none of a port's
        if parts.username is not None or parts.password is not None or "@" in parts.netloc:
            fault = "a user or a password in it; a recipe is written down with every run"
        elif parts.query or parts.fragment or "?" in url or "#" in url:
            fault = "a query or a fragment in it"
        elif parts.scheme not in ("http", "https"):
            fault = f"the scheme {parts.scheme!r}" if parts.scheme else "no scheme"
        elif not HOST.fullmatch(host) or len(host) > 253 or ".." in host or host.startswith((".", "-")):
            fault = "no host that could be"
        elif any(character <= " " or character > "~" for character in url):
            fault = "a character that no URL has"
    except ValueError as error:
        fault = str(error)
    if not fault:
        return
    secret = "user" in fault or "query" in fault
    raise UsageError(
        "engine.options.base_url",
        got=fault if secret else f"{url[:200]!r}: {fault}",
        expected="http://HOST:PORT or https://HOST",
        hint=f"export {options.api_key_env}=user:password; --set engine.options.auth=basic"
        if secret
        else URL_HINT,
    )


def key_of(options: ServerOptions) -> str:
    """The key, empty where there is none.

    Raises:
        UsageError: for one that no header can carry. It is not shown.
    """
    key = os.environ.get(options.api_key_env, "") if options.api_key_env else ""
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise UsageError(
            f"environment variable {options.api_key_env}",
            got="a value with a character that no header carries",
            expected="a key: printable ASCII without spaces around it",
            hint=f"export {options.api_key_env}=…",
        )
    return key


def authorization(options: ServerOptions, key: str) -> dict[str, str]:
    """The header that carries the key; none without one."""
    if not key:
        return {}
    return {
        "Authorization": f"Basic {base64.b64encode(key.encode()).decode()}"
        if options.auth == "basic"
        else f"Bearer {key}"
    }
