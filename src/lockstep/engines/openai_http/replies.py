"""What a server may answer: types, bounds, and how large it may be.

All of it comes from someone else's process.

A field that Lockstep does not read may be anything. One that it reads is of its type and within its bounds,
or the reply is refused with the field's name. ``NaN`` and the infinities, which are no JSON and which some
servers write, are missing numbers.
"""

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from lockstep.errors import EngineError

R = TypeVar("R", bound=Struct)
MAX_ID = 2**31 - 1
TOKEN_NAME = re.compile(r"token_id:([0-9]{1,10})")

TokenId = Annotated[int, Meta(ge=0, le=MAX_ID)]
Natural = Annotated[int, Meta(ge=0, le=MAX_ID)]
Logprob = Annotated[float, Meta(ge=-1e30, le=1e30)]
"""Wide: what is no log-probability is for layer semantics to say. It fits a float32."""
Name = Annotated[str, Meta(min_length=1, max_length=1000)]


class Card(Struct, frozen=True):
    """One model that a server lists."""

    id: Name
    owned_by: str | None = None
    max_model_len: Annotated[int, Meta(gt=0, le=MAX_ID)] | None = None


class Models(Struct, frozen=True):
    """``GET /v1/models``."""

    data: Annotated[list[Card], Meta(min_length=1)]


class Version(Struct, frozen=True):
    """``GET /version``."""

    version: Annotated[str, Meta(max_length=200)] = "unknown"


class ServerInfo(Struct, frozen=True):
    """``GET /server_info``, of vLLM in its development mode."""

    vllm_config: dict[str, Any]


class Logprobs(Struct, frozen=True):
    """The tokens of one choice and their log-probabilities."""

    tokens: list[str] | None = None
    token_logprobs: list[Logprob | None] | None = None


class ScoredToken(Struct, frozen=True):
    """One token of one position of ``prompt_logprobs``."""

    logprob: Logprob | None = None


class ServerChoice(Struct, frozen=True):
    """One completion."""

    index: Natural
    token_ids: list[TokenId] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    prompt_logprobs: list[dict[str, ScoredToken] | None] | None = None


class Usage(Struct, frozen=True):
    """What the server counted."""

    prompt_tokens: Natural | None = None


class CompletionsReply(Struct, frozen=True):
    """``POST /v1/completions``."""

    choices: list[ServerChoice]
    usage: Usage | None = None


ABOUT_BYTES = 1 << 20
"""Most bytes of a reply about the server itself, and of what a completion has besides its tokens."""
TOKEN_BYTES = 1 << 10
"""Bytes of one token, generously: id and log-probability twice each, its text with each character escaped."""
ECHO_BYTES = 64
"""Bytes of one prompt token that the server repeats with each choice."""
CONFIG_BYTES = 16 << 20
SHOWN = 80
NO_JSON = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|-?\b(?:NaN|Infinity)\b', re.DOTALL)
"""A string, kept as it is, or a literal that is no JSON. Possessive, so that no text takes a second pass."""


def completion_bytes(prompt: int, tokens: int, n: int = 1, scored: int = 0) -> int:
    """The most that an answer may have.

    Args:
        prompt: tokens of the prompt.
        tokens: asked for at most, in each choice.
        n: choices.
        scored: positions whose log-probability was asked for.
    """
    return ABOUT_BYTES + n * (ECHO_BYTES * prompt + TOKEN_BYTES * tokens) + TOKEN_BYTES * scored


def decode(body: bytes, kind: type[R], boundary: str) -> R:
    """The reply, checked.

    Raises:
        EngineError: names the field, what was there and what should have been.
    """
    try:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            strict = NO_JSON.sub(lambda found: found[0] if found[0].startswith(b'"') else b"null", body)
            return msgspec.json.decode(strict, type=kind)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `")
        where = where.rstrip("`").removeprefix("$").lstrip(".")
        expected = message.partition(", got")[0].replace(
            "Object missing required field", "an object with the field"
        )
        boundary = f"{boundary}, field {where}" if where else boundary
        got = _value_at(body, where)
    except RecursionError:
        got = f"a reply nested without end: {short(body)}"
        expected = "a reply that is not nested so deeply"
    except (msgspec.DecodeError, ValueError) as error:
        got = f"{short(body)} ({error})"
        expected = "JSON"
    expected = expected.replace("Expected ", "")
    raise EngineError(
        boundary, got=got, expected=expected, hint="is this an OpenAI-compatible server? Its log says more"
    )


def short(text: bytes | str) -> str:
    """The beginning of what a server wrote, on one line."""
    if isinstance(text, bytes):
        text = text[: 8 * SHOWN].decode(errors="replace")
    return repr(text[:SHOWN]) + ("…" if len(text) > SHOWN else "")


def _value_at(body: bytes, where: str) -> str:
    """The value of a field, as far as it can be found."""
    try:
        value = msgspec.json.decode(body)
        for name, index in re.findall(r"(\w+)|\[(\d+)\]", where):
            value = value[int(index)] if index else value[name]
    except (msgspec.DecodeError, ValueError, RecursionError, LookupError, TypeError):
        return short(body)
    try:
        return short(msgspec.json.encode(value))
    except RecursionError:
        return f"{type(value).__name__} nested without end"


def token_id(name: str) -> int | None:
    """The id that a token's name says (``token_id:42``); None where it names none."""
    match = TOKEN_NAME.fullmatch(name)
    return int(match[1]) if match and int(match[1]) <= MAX_ID else None
