"""A log's columns by name, and what a row holds in them: typed arrays, or an error that names the value."""

from array import array
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from lockstep.records.tokens import SamplingParams

COLUMNS = {
    "prompt": ("prompt_token_ids", "prompt_ids", "prompts", "input_ids"),
    "tokens": (
        "token_ids",
        "completion_token_ids",
        "completion_ids",
        "response_ids",
        "responses",
        "output_ids",
    ),
    "logprobs": (
        "engine_logprobs",
        "logprobs",
        "rollout_log_probs",
        "token_logprobs",
        "old_logprobs",
        "response_logprobs",
    ),
}
"""Names by which Lockstep, TRL, verl and others log them; the first that holds lists counts."""
MASKS = (
    "response_mask",
    "completion_mask",
    "loss_mask",
    "action_mask",
    "sampled_mask",
    "tool_mask",
    "env_mask",
)
"""1 where the model sampled the token, 0 where a tool, the environment or padding put it. One for each token
of the completion, or of prompt and completion. ``masks.py`` holds them against the numbers."""
ATTENTION = ("attention_mask", "prompt_attention_mask", "prompt_mask", "completion_attention_mask")
"""1 where a token is none of the padding, which is taken away."""
SETTINGS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)

LARGEST_ID = 2**31 - 1
SHOWN = 40

LogRow = Mapping[str, Any]
"""A row by column: lists as JSON has them, or numpy arrays; scalars."""


class UnusableError(Exception):
    """What stands in one column of a row, and what should."""

    def __init__(self, column: str, got: str, expected: str) -> None:
        self.column = column
        self.got = got
        self.expected = expected
        super().__init__(column, got, expected)


def ids_of(name: str, row: LogRow) -> np.ndarray:
    """Token ids, int32."""
    expected = f"a list of ids from 0 to {LARGEST_ID}"
    values = _list(name, row, expected)
    if isinstance(values, np.ndarray):
        ids = values if values.dtype.kind in "iu" or not len(values) else None
    else:
        try:
            # array takes whole numbers and no others, but True for 1.
            ids = np.asarray(array("q", values), np.int64) if bool not in map(type, values) else None
        except (TypeError, OverflowError):
            ids = None
    if ids is None or (len(ids) and not 0 <= ids.min() <= ids.max() <= LARGEST_ID):
        raise UnusableError(
            name,
            _culprit(values, _is_id),
            expected,
        )
    return ids.astype(np.int32)


def logprobs_of(names: dict[str, str], row: LogRow, n_tokens: int) -> np.ndarray:
    """Log-probabilities, float64; NaN for null."""
    name = names["logprobs"]
    expected = "a list of numbers; null, NaN and the infinities are counted as missing"
    values = _list(name, row, expected)
    if len(values) != n_tokens:
        raise UnusableError(
            name,
            f"{len(values)} log-probabilities",
            f"one for each of {n_tokens} tokens in {names['tokens']}",
        )
    if isinstance(values, np.ndarray) and values.dtype.kind != "b":
        return values.astype(np.float64)
    try:
        if bool in map(type, values):
            raise TypeError
        return np.asarray(array("d", [np.nan if v is None else v for v in values]), np.float64)
    except (TypeError, OverflowError):
        # JSON bounds no whole number, and a double does.
        culprit = _culprit(values, lambda v: v is None or (_is_number(v) and abs(v) < 1e300))
        raise UnusableError(name, culprit, expected) from None


def mask_of(name: str, row: LogRow, n_prompt: int, n_tokens: int) -> np.ndarray:
    """bool [T]; of one over prompt and completion the completion's part."""
    bits = _bits(name, row)
    if len(bits) not in (n_tokens, n_prompt + n_tokens):
        expected = f"one for each of {n_tokens} tokens, or of {n_prompt} + {n_tokens} with the prompt"
        raise UnusableError(name, f"{len(bits)} values", expected)
    return bits[len(bits) - n_tokens :]


def unpadded_of(names: dict[str, str], row: LogRow, n_prompt: int, n_tokens: int) -> tuple[slice, slice]:
    """What of prompt and completion is no padding, as the attention masks say."""
    kept = [slice(0, n_prompt), slice(0, n_tokens)]
    for name in (name for name in ATTENTION if name in names):
        bits = _bits(name, row)
        parts = {
            n_prompt + n_tokens: (bits[:n_prompt], bits[n_prompt:]),
            n_tokens: (None, bits),
            **({n_prompt: (bits, None)} if not name.startswith("completion") else {}),
        }.get(len(bits))
        if parts is None:
            expected = f"one for each of {n_prompt} + {n_tokens} tokens of prompt and completion"
            raise UnusableError(name, f"{len(bits)} values", expected)
        for side, part in enumerate(parts):
            # Of a prompt all 0: a mask of the loss.
            if part is None or part.all() or (side == 0 and not part.any()):
                continue
            at = np.flatnonzero(part)
            start, stop = (int(at[0]), int(at[-1]) + 1) if at.size else (0, 0)
            if not part[start:stop].all():
                raise UnusableError(
                    name,
                    f"0 between 1s, at place {start + int(part[start:stop].argmin())}",
                    "pads at the ends only",
                )
            kept[side] = slice(max(kept[side].start, start), min(kept[side].stop, stop))
    return kept[0], kept[1]


def ends_with(prompt: np.ndarray, tokens: np.ndarray) -> bool:
    """True when the ids end in the completion's, with a prompt before them."""
    return len(prompt) > len(tokens) and np.array_equal(prompt[len(prompt) - len(tokens) :], tokens)


def prompt_alone(prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The prompt alone, of ids that hold prompt and completion together."""
    if not ends_with(prompt, tokens):
        raise UnusableError(
            "input_ids",
            "ids that do not end in the completion",
            "prompt and completion together, as in the first row",
        )
    return prompt[: len(prompt) - len(tokens)]


def told_of(row: LogRow) -> tuple:
    """The settings of a row, in the order of ``SETTINGS``; None where it has none."""
    told = tuple(row.get(name) for name in SETTINGS)
    for name, value in zip(SETTINGS, told, strict=True):
        # A NaN equals nothing, not even itself.
        if not isinstance(value, int | float | None) or abs(value or 0) > LARGEST_ID or value != value:
            got = "an array" if isinstance(value, list) else ascii(value)[:SHOWN]
            raise UnusableError(name, got, f"a number, at most {LARGEST_ID}")
    return told


def sampling_of(default: SamplingParams, told: tuple) -> SamplingParams:
    """The settings that :func:`told_of` gave of a row; ``default`` for those that it does not have."""
    changes = {name: value for name, value in zip(SETTINGS, told, strict=True) if value is not None}
    if changes.get("top_k") == -1:  # vLLM's word for none
        changes["top_k"] = 0
    try:
        return msgspec.convert(msgspec.structs.asdict(default) | changes, SamplingParams)
    except msgspec.ValidationError as error:
        column = next((name for name in SETTINGS if f"$.{name}" in str(error)), "of settings")
        raise UnusableError(column, str(error)[:200], f"numbers in {', '.join(SETTINGS)}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    """True of a token id, also as a whole float: a null elsewhere in the column made floats of its ids."""
    whole = isinstance(value, np.floating) and value.is_integer()
    is_id = whole or isinstance(value, np.integer) or type(value) is int
    return is_id and bool(0 <= value <= LARGEST_ID)


def _bits(name: str, row: LogRow) -> np.ndarray:
    expected = "a list of 0 and 1, or of false and true"
    values = _list(name, row, expected)
    try:
        bits = np.asarray(values if isinstance(values, np.ndarray) else array("d", values), np.float64)
    except (TypeError, OverflowError, ValueError):
        raise UnusableError(name, _culprit(values, lambda v: v in (0, 1)), expected) from None
    if not np.isin(bits, (0.0, 1.0)).all():
        raise UnusableError(name, _culprit(values, lambda v: v in (0, 1)), expected)
    return bits == 1.0


def _list(name: str, row: LogRow, expected: str) -> Any:
    values = row.get(name)
    if not isinstance(values, list | np.ndarray):
        got = "nothing" if values is None else f"{type(values).__name__} {ascii(values)[:SHOWN]}"
        raise UnusableError(name, got, expected)
    return values


def _culprit(values: Any, fits: Any) -> str:
    """The first value that does not fit, and where it stands."""
    for at, value in enumerate(values):
        if not fits(value):
            shown = (
                "an array"
                if isinstance(value, list)
                else "an object"
                if isinstance(value, dict)
                else ascii(value)[:SHOWN]
            )
            return f"{shown} at place {at}"
    return f"values of type {getattr(values, 'dtype', 'bool')}"
