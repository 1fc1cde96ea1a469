"""Read rollouts that another framework logged: token ids, log-probabilities, sampling settings."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lockstep.errors import UsageError
from lockstep.parity.pair import Sampled
from lockstep.records.tokens import Completion, SamplingParams, finite_logprob, pack_ids, pack_logprobs

COLUMNS = {
    "prompt": ("prompt_token_ids", "prompt_ids", "input_ids", "prompts"),
    "tokens": ("token_ids", "completion_token_ids", "completion_ids", "response_ids", "responses", "output_ids"),
    "logprobs": ("engine_logprobs", "logprobs", "rollout_log_probs", "token_logprobs", "old_logprobs", "response_logprobs"),
}
"""Names by which Lockstep, TRL, verl and others log them; the first that is there counts."""
SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class Row(msgspec.Struct, frozen=True):
    """One completion, by role."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float | None]


def read_logged(path: Path, default: SamplingParams) -> list[Sampled]:
    """Read a Parquet or JSONL file, one sample for each sampling setting in it.

    Args:
        default: for settings that a row does not have.

    Raises:
        UsageError: for a file that is not there, a column that is missing, or tokens and log-probabilities of two lengths.
    """
    rows = _rows(path)
    if not rows:
        raise _unusable(path, "no row", "at least one completion")
    names = {role: name for role, known in COLUMNS.items() for name in reversed(known) if name in rows[0]}
    for role, known in COLUMNS.items():
        if role not in names:
            raise _unusable(path, f"columns {', '.join(rows[0])}", f"one of {', '.join(known)}")
    found: dict[bytes, Sampled] = {}
    for number, row in enumerate(rows, 1):
        try:
            told = msgspec.convert({role: row.get(name) for role, name in names.items()}, Row)
            sampling = _sampling(default, row)
        except msgspec.ValidationError as error:
            raise _unusable(path, f"in row {number}: {error}", f"numbers in {', '.join(names.values())}") from error
        if len(told.tokens) != len(told.logprobs):
            expected = f"one for each of {len(told.tokens)} tokens"
            raise _unusable(path, f"{len(told.logprobs)} log-probabilities in row {number}", expected)
        if not told.prompt:
            raise _unusable(path, f"no prompt in row {number}", "at least one token")
        if told.tokens:
            part = found.setdefault(msgspec.json.encode(sampling), Sampled([], [], sampling))
            part.prompts.append(np.array(told.prompt, np.int32))
            part.completions.append(_completion(number, told.tokens, told.logprobs))
    if not found:
        raise _unusable(path, "no token", "at least one completion that is not empty")
    return list(found.values())


def _sampling(default: SamplingParams, row: dict[str, Any]) -> SamplingParams:
    changes = {name: row[name] for name in SETTINGS if row.get(name) is not None}
    if changes.get("top_k") == -1:  # vLLM's word for none
        changes["top_k"] = 0
    return msgspec.convert(msgspec.structs.asdict(default) | changes, SamplingParams)


def _completion(number: int, ids: list[int], values: list[float | None]) -> Completion:
    finite = [finite_logprob(value) for value in values]
    return Completion(number, 0, pack_ids(ids), pack_logprobs(finite), "length", (), finite.count(None))


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise _unusable(path, "no such file", "a .parquet or .jsonl file")
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        return [msgspec.json.decode(line) for line in path.read_bytes().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise _unusable(path, str(error).splitlines()[0], "Parquet, or one JSON object a line") from error


def _unusable(path: Path, got: str, expected: str) -> UsageError:
    return UsageError(f"rollouts {path}", got=got, expected=expected, hint="token ids and log-probabilities of each completion")
