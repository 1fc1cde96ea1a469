"""What a worker may answer: how large, of which type, and what must hold in it.

Checked once, where a reply arrives.

A reply that breaks any of it is the worker's fault or another version's, never the request's: it is a
:class:`ProtocolError`, and what the worker says next is not believed either.
"""

from collections.abc import Sequence

import numpy as np

from lockstep.errors import ProtocolError
from lockstep.records.capabilities import CAPABILITIES
from lockstep.records.messages import (
    MAX_FRAME_BYTES,
    Abort,
    Aborted,
    Count,
    Counted,
    Draw,
    Drawn,
    Failure,
    Load,
    Loaded,
    Ready,
    Reply,
    Request,
    Score,
    Scored,
)
from lockstep.records.tokens import FLOAT32, INT32, Completion, SamplingParams, Scores

REPLY_TO: dict[type, type] = {Draw: Drawn, Score: Scored, Load: Loaded, Abort: Aborted, Count: Counted}
PLAIN_BYTES = 4 * 1024 * 1024
"""Room for what does not grow with the request: a resolved configuration, counters, receipts, a failure."""
RECORD_BYTES = 512
"""Room for a completion or a sequence without its tokens: field names, numbers, its place in the list."""
TOKEN_BYTES = 64
"""Room for a sampled token: id and log-probability take 8, a version span of its own 40."""


def describe(request: Request | None) -> str:
    """What is waited for, for people. None: the worker's first message."""
    match request:
        case Draw():
            asked = sum(params.n for params in request.params)
            longest = max((params.max_tokens for params in request.params), default=0)
            return f"sample ({len(request.prompts)} prompts, {asked} completions of at most {longest} tokens)"
        case Score():
            return (
                f"score ({len(request.sequences)} sequences, {sum(map(len, request.sequences)) // 4} tokens)"
            )
        case Load():
            return f"load (weight version {request.update.version}, {request.mode})"
        case Abort() | Count():
            return type(request).__name__.lower()
    return "start"


def reply_limit(request: Request | None) -> int:
    """Bytes that an honest reply cannot exceed."""
    asked = 0
    if isinstance(request, Draw):
        asked = sum(params.n * (RECORD_BYTES + params.max_tokens * TOKEN_BYTES) for params in request.params)
    elif isinstance(request, Score):
        asked = sum(RECORD_BYTES + len(sequence) for sequence in request.sequences)
    return min(PLAIN_BYTES + asked, MAX_FRAME_BYTES)


def check_reply(request: Request | None, reply: Reply) -> None:
    """Refuse what no honest worker says to ``request``.

    Raises:
        ProtocolError: names the first thing that does not hold.
    """
    if isinstance(reply, Failure):
        return
    expected = Ready if request is None else REPLY_TO[type(request)]
    if not isinstance(reply, expected):
        raise _broken(request, type(reply).__name__, expected.__name__)
    match request, reply:
        case None, Ready():
            missing = sorted(CAPABILITIES.keys() - reply.capabilities.keys())
            if missing:
                raise _broken(
                    request, f"no word on {', '.join(missing)}", "every capability, supported or not"
                )
        case Draw(), Drawn():
            check_completions(describe(request), request.params, reply.completions)
        case Score(), Scored():
            _check_scores(request, reply.scores)
        case Load(), Loaded() if reply.receipt.version != request.update.version:
            raise _broken(
                request, f"a receipt for version {reply.receipt.version}", f"version {request.update.version}"
            )
        case Abort(), Aborted() if reply.n_requests < 0:
            raise _broken(request, f"{reply.n_requests} requests ended", "none or more")


def check_completions(
    where: str,
    params: Sequence[SamplingParams],
    completions: Sequence[Completion],
    vocabulary: int | None = None,
) -> None:
    """Every completion asked for, in order.

    Whole tokens, one number each; spans that tile; missing numbers counted.

    Args:
        vocabulary: how many ids there are; None where that is not known.

    Raises:
        ProtocolError: names the first that is not so.
    """
    places = [(prompt, sample) for prompt, asked in enumerate(params) for sample in range(asked.n)]
    if len(completions) != len(places):
        raise _wrong(where, f"{len(completions)} completions", str(len(places)))
    for completion, (prompt, sample) in zip(completions, places, strict=True):
        which = f"completion {completion.sample_index} of prompt {completion.prompt_index}"
        if (completion.prompt_index, completion.sample_index) != (prompt, sample):
            raise _wrong(where, which, f"completion {sample} of prompt {prompt} in its place")
        size = len(completion.token_ids)
        numbers = len(completion.logprobs)
        if size % 4 or numbers != size:
            raise _wrong(
                where,
                f"{which}: {size} bytes of ids, {numbers} of log-probabilities",
                "4 bytes each for every token",
            )
        if size // 4 > params[prompt].max_tokens:
            raise _wrong(where, f"{which}: {size // 4} tokens", f"at most {params[prompt].max_tokens}")
        if completion.prompt_tokens < 0:
            raise _wrong(where, f"{which}: a prompt of {completion.prompt_tokens} tokens", "none or more")
        _check_spans(where, which, completion)
    ids = np.frombuffer(b"".join(c.token_ids for c in completions), INT32)
    if ids.size and ids.min() < 0:
        raise _wrong(where, f"token id {ids.min()}", "none below 0")
    if ids.size and vocabulary is not None and ids.max() >= vocabulary:
        raise _wrong(
            where, f"token id {ids.max()}", f"ids below {vocabulary}, the size of the model's vocabulary"
        )
    _check_numbers(where, [c.logprobs for c in completions], [c.missing for c in completions])


def _check_spans(where: str, which: str, completion: Completion) -> None:
    at = 0
    n_tokens = len(completion.token_ids) // 4
    for span in completion.version_spans:
        if span.start != at or not at < span.stop <= n_tokens or span.version < 0:
            raise _wrong(where, f"{which}: {span}", f"versions that tile its {n_tokens} tokens")
        at = span.stop
    if at != n_tokens:
        raise _wrong(where, f"{which}: versions of {at} tokens", f"versions that tile its {n_tokens} tokens")


def _check_scores(request: Score, scores: Sequence[Scores]) -> None:
    where = describe(request)
    sizes = [max(len(sequence) - 4, 0) for sequence in request.sequences]  # bytes; the first has no score
    if [len(found.logprobs) for found in scores] != sizes:
        raise _wrong(
            where, f"{len(scores)} rows of {[len(s.logprobs) for s in scores][:8]}… bytes", f"{sizes[:8]}…"
        )
    _check_numbers(where, [found.logprobs for found in scores], [found.missing for found in scores])


def _check_numbers(where: str, packed: Sequence[bytes], missing: Sequence[int]) -> None:
    """NaN and nothing else stands for a missing number, and each row's count of them is right."""
    numbers = np.frombuffer(b"".join(packed), FLOAT32)
    if np.isinf(numbers).any():
        raise _wrong(where, "an infinite log-probability", "NaN where there is none")
    ends = np.cumsum([len(row) // 4 for row in packed], dtype=np.int64)
    counted = np.diff(np.concatenate([[0], np.cumsum(np.isnan(numbers))])[np.concatenate([[0], ends])])
    if counted.tolist() != list(missing):
        row = next(i for i, (n, said) in enumerate(zip(counted.tolist(), missing, strict=True)) if n != said)
        raise _wrong(where, f"row {row}: {missing[row]} missing numbers", f"{counted[row]}, as there are NaN")


def _broken(request: Request | None, got: str, expected: str) -> ProtocolError:
    return _wrong(describe(request), got, expected)


def _wrong(where: str, got: str, expected: str) -> ProtocolError:
    hint = "the engine was ended: its worker is broken, or of another Lockstep"
    return ProtocolError(f"engine, reply to {where}", got=got, expected=expected, hint=hint)
