"""Tokens and their log-probabilities, as they travel between an engine and the trainer.

Per-token values travel as packed little-endian arrays in ``bytes``, never as lists of Python objects. The
engine's worker runs in a foreign environment with the standard library and msgspec alone, so packing uses
:mod:`array`; the trainer reads the same bytes with ``numpy.frombuffer`` and no copy.
"""

import math
from array import array
from collections.abc import Iterable
from typing import Annotated, Literal

from msgspec import Meta, Struct

from lockstep.records.versions import VersionSpan

FinishReason = Literal["stop", "length", "abort"]

CLAMPED_LOGPROB = -9999.0
"""What vLLM's servers put in the place of −inf and NaN; no honest log-probability is as low."""
INT32 = "<i4"
FLOAT32 = "<f4"

NonNegative = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(gt=0)]


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids as int32 bytes."""
    return array("i", ids).tobytes()


def pack_logprobs(logprobs: Iterable[float | None]) -> bytes:
    """Log-probabilities (nats) as float32 bytes.

    A missing value becomes NaN, which stays visible; nothing is dropped.
    """
    return array("f", (float("nan") if value is None else value for value in logprobs)).tobytes()


def finite_logprob(value: float | None) -> float | None:
    """A reported log-probability, or None for what stands for none: NaN, an infinity, a clamped −inf."""
    return value if value is not None and math.isfinite(value) and value > CLAMPED_LOGPROB else None


def unpack_ids(packed: bytes) -> list[int]:
    """The token ids of :func:`pack_ids`, for code that must hand an engine a Python list."""
    ids = array("i")
    ids.frombytes(packed)
    return ids.tolist()


class SamplingParams(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How tokens are drawn. Field names are vLLM's; 0 and 1 are the neutral values.

    Example: ``SamplingParams(max_tokens=5, temperature=0.7, n=8, seed=17)``.
    """

    max_tokens: Positive
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """1 keeps every token."""
    top_k: NonNegative = 0
    """0 keeps every token."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[NonNegative, float] = {}
    """Token id → what is added to its logit."""
    stop_token_ids: tuple[NonNegative, ...] = ()
    """Sampling stops after any of these; the stop token is kept in the completion."""
    seed: int | None = None
    n: Positive = 1
    """Completions per prompt."""

    @property
    def truncates(self) -> bool:
        """True when some tokens cannot be drawn at all, and the rest is renormalised; never of greedy."""
        return self.temperature > 0.0 and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)

    @property
    def penalises(self) -> bool:
        """True when logits are edited: by how often a token has occurred, or by a bias."""
        return (
            bool(self.logit_bias)
            or self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def needs(self) -> tuple[str, ...]:
        """Capabilities without which an engine would draw otherwise, or not at all; neutral values need none.

        Of :data:`lockstep.records.capabilities.CAPABILITIES`.
        """
        asked = {
            "per_request_seed": self.seed is not None,
            "logit_bias": bool(self.logit_bias),
            "repetition_penalty": self.repetition_penalty != 1.0,
            "count_penalties": self.presence_penalty != 0.0 or self.frequency_penalty != 0.0,
            "top_k_min_p": self.top_k > 0 or self.min_p > 0.0,
        }
        return tuple(name for name, is_asked in asked.items() if is_asked)


class Completion(Struct, frozen=True):
    """One sampled continuation of one prompt.

    Example: 5 tokens under weights 3, ended by a stop token::

        Completion(prompt_index=2, sample_index=7, token_ids=<20 bytes>, logprobs=<20 bytes>,
                   finish_reason="stop", version_spans=(VersionSpan(start=0, stop=5, version=3),), missing=0)
    """

    prompt_index: int
    """Position of the prompt in the request that asked for it."""
    sample_index: int
    """0 … n−1 among the samples of that prompt."""
    token_ids: bytes
    """int32 [T]: exactly the tokens that were sampled, a stop token included. Never re-tokenised."""
    logprobs: bytes
    """float32 [T], nats. NaN where the engine gave none, ±inf, NaN or the −9999 of a clamping server."""
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...]
    """Which weights sampled which tokens; the spans tile [0, T)."""
    missing: int = 0
    """How many of the T log-probabilities are NaN."""
    prompt_tokens: int = 0
    """Length of the prompt as the engine counts it; 0 where it does not say."""


class Scores(Struct, frozen=True):
    """An engine's own log-probabilities of given token ids (score B), at T = 1 over the full vocabulary."""

    logprobs: bytes
    """float32 [T − 1], nats: entry i is the log-probability of token i + 1 given tokens 0 … i."""
    missing: int = 0
