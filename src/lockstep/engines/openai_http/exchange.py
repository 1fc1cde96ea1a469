"""One request and its whole answer.

A deadline over everything, retries within it, and no more bytes read than were asked for. A server that says
that it is paused (weights are being loaded: vLLM from 0.33 on) is asked again until the deadline, and that is
no failed try.
"""

import asyncio
import random
import re
import ssl
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import httpx2 as httpx
from msgspec import Struct

from lockstep.engines.openai_http.options import ServerOptions, authorization
from lockstep.engines.openai_http.replies import decode, short
from lockstep.errors import EngineDied, EngineError, UsageError

R = TypeVar("R", bound=Struct)
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
FIRST_DELAY_S, LONGEST_DELAY_S, LONGEST_RETRY_AFTER_S = 0.25, 8.0, 60.0
PAUSED = re.compile(rb"engine[_ ]paused|engine is paused", re.IGNORECASE)
"""What vLLM's server says with status 503 between a pause and its end (``RetryableRequestError``)."""
REFUSAL_BYTES, REFUSAL_SHOWN = 1 << 14, 500
SHORTEST_KEY = 8
"""A shorter value is no key, and would be found in every text."""


@cache
def _certificates() -> ssl.SSLContext:
    """What every connection is verified with; reading the authorities takes tens of milliseconds."""
    return httpx.create_ssl_context(trust_env=False)


@dataclass(frozen=True)
class _Again:
    """An answer after which another try may be worth it."""

    refusal: EngineError
    wait_s: float
    """The least time before that."""
    paused: bool
    """The server will take requests again once its weights are loaded."""


class Exchange:
    """Requests to one server. Used from one event loop.

    Args:
        key: sent with every request, and taken out of whatever the server sends back.
    """

    def __init__(self, options: ServerOptions, key: str) -> None:
        self.options = options
        header = authorization(options, key)
        sent = header.get("Authorization", "").rpartition(" ")[2]  # of ``basic`` another form of the key
        self._secrets = [form.encode() for form in {key, sent} if len(form) >= SHORTEST_KEY]
        self._free = asyncio.Semaphore(options.max_connections)
        self._http = httpx.AsyncClient(
            base_url=options.base_url,
            # Not compressed: a few bytes could be gigabytes.
            headers={"Accept-Encoding": "identity", **header},
            # The deadline over everything is :meth:`ask`'s.
            timeout=httpx.Timeout(None, connect=options.connect_timeout_s),
            limits=httpx.Limits(max_connections=options.max_connections),
            # No proxy and no .netrc of the environment: requests and key go to the recipe's server alone.
            trust_env=False,
            verify=_certificates(),
        )

    async def ask(self, path: str, kind: type[R], limit: int, body: dict[str, Any] | None = None) -> R:
        """The answer to a GET, or to a POST of ``body``.

        Within ``timeout_s`` from here on, waiting for a free connection aside.

        Args:
            limit: bytes that the answer may have.

        Raises:
            EngineDied: when no answer was received.
            EngineError, UsageError: when it refused, or answered what is no such reply.
        """
        failure: EngineError | UsageError | None = None
        async with self._free:
            try:
                async with asyncio.timeout(self.options.timeout_s):
                    attempt = 0
                    while attempt <= self.options.retries:
                        try:
                            answer = await self._once(path, limit, body)
                        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
                            got = (
                                f"{type(error).__name__} after {attempt + 1} tries: "
                                f"{str(error)[:REFUSAL_SHOWN]}"
                            )
                            failure = self._no_answer(path, got)
                            least = 0.0
                            paused = False
                        else:
                            if isinstance(answer, bytes):
                                return decode(answer, kind, f"engine at {self.options.base_url}{path}")
                            failure = answer.refusal
                            least = answer.wait_s
                            paused = answer.paused
                        attempt += not paused
                        if attempt <= self.options.retries:
                            most = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**attempt)  # full jitter
                            await asyncio.sleep(max(random.uniform(0.0, most), least))
            except TimeoutError:
                failure = failure or self._no_answer(path, f"no whole answer in {self.options.timeout_s:g} s")
        assert failure is not None
        raise failure

    async def _once(self, path: str, limit: int, body: dict[str, Any] | None) -> "bytes | _Again":
        """One try: the body, or why another may be worth it."""
        async with self._http.stream("GET" if body is None else "POST", path, json=body) as response:
            if not response.is_success:
                said = await self._read(response, REFUSAL_BYTES)
                refusal = self._refusal(path, response, said)
                if isinstance(refusal, UsageError) or response.status_code not in RETRIED:
                    raise refusal
                paused = response.status_code == 503 and bool(PAUSED.search(said))
                return _Again(refusal, max(_retry_after(response), FIRST_DELAY_S * paused), paused)
            encoding = response.headers.get("content-encoding", "identity").lower()
            if encoding != "identity":
                raise self._odd(
                    path, f"a body compressed with {short(encoding)}", "one that is not, as asked for"
                )
            content = await self._read(response, limit + 1)
            if len(content) > limit:
                raise self._odd(
                    path,
                    f"more than {limit} bytes, beginning {short(content)}",
                    "an answer to what was asked",
                )
            return content

    async def _read(self, response: httpx.Response, most: int) -> bytes:
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            # One byte more than is allowed is enough to refuse it, and the rest is never read.
            if len(content) >= most:
                break
        read = bytes(content[:most])
        for secret in self._secrets:
            # An error page may say back what was sent.
            read = read.replace(secret, b"(the key)")
        return read

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def _no_answer(self, path: str, got: str) -> EngineDied:
        hint = "is the server up? Its log says more"
        return EngineDied(
            f"engine at {self.options.base_url}{path}", got=got, expected="an answer", hint=hint
        )

    def _refusal(self, path: str, response: httpx.Response, body: bytes) -> EngineError | UsageError:
        usage = 400 <= response.status_code < 500 and response.status_code not in RETRIED
        hint = (
            "export the key in the variable that engine.options.api_key_env names"
            if response.status_code == 401
            else "see its log"
        )
        return (UsageError if usage else EngineError)(
            f"engine at {self.options.base_url}{path}",
            got=f"status {response.status_code}: {body.decode(errors='replace')[:REFUSAL_SHOWN]}",
            expected="status 200",
            hint=hint,
        )

    def _odd(self, path: str, got: str, expected: str) -> EngineError:
        boundary = f"engine at {self.options.base_url}{path}"
        hint = "is this an OpenAI-compatible server? Its log says more"
        return EngineError(boundary, got=got, expected=expected, hint=hint)


def _retry_after(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return min(float(value), LONGEST_RETRY_AFTER_S) if value.isascii() and value.isdecimal() else 0.0
