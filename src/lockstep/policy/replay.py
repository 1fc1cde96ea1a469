"""Scores of a completion that was sampled across a change of weights, piece by piece.

    prompt  t0 t1 t2 │ t3 t4        the switch came after t2 was drawn
    ╰── old weights ╯ ╰ new ╯
    cache: prompt t0 t1 (old)  │  t2 is the first token that the new weights read

The key that the engine has of t2 is computed by the new weights, for a token's cache entry is made when the
next one is drawn.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from lockstep.policy.model import EAGER, Policy, attention_of
from lockstep.policy.parameters import Snapshot
from lockstep.records.samples import Sample


@torch.no_grad()
def over_kept_caches(
    policy: Policy, sequences: Sequence[Sample], weights: Mapping[int, Snapshot | None], temperature: float
) -> list[np.ndarray]:
    """Log-probabilities of whole completions, each piece by the weights that drew it, over one cache.

    Nats, float32 [T] each.

    Args:
        sequences: with versions that go up.
        weights: of each version; None: those that the policy holds.
    """
    found: list[np.ndarray] = [np.empty(0, np.float32)] * len(sequences)
    with attention_of(policy.model, EAGER):
        for rows in _alike(sequences):
            together = [sequences[row] for row in rows]
            for row, numbers in zip(rows, _scored(policy, together, weights, temperature), strict=True):
                found[row] = numbers
    return found


def _alike(sequences: Sequence[Sample]) -> list[list[int]]:
    """Rows that can be computed side by side: of one prompt, and switched at the same tokens."""
    rows: dict[tuple, list[int]] = {}
    for row, sequence in enumerate(sequences):
        switches = tuple((span.start, span.version) for span in sequence.version_spans)
        rows.setdefault((sequence.prompt_ids.tobytes(), switches), []).append(row)
    return list(rows.values())


def _scored(
    policy: Policy, alike: Sequence[Sample], weights: Mapping[int, Snapshot | None], temperature: float
) -> list[np.ndarray]:
    """The scores of sequences of :func:`_alike`, float32 [T] each; they share one pass over the prompt."""
    lengths = [len(sequence.token_ids) for sequence in alike]
    tokens = np.zeros((len(alike), max(lengths)), np.int64)
    for row, sequence in zip(tokens, alike, strict=True):
        row[: len(sequence.token_ids)] = sequence.token_ids
    drawn = torch.as_tensor(tokens, device=policy.device)
    cache = DynamicCache()
    numbers = []
    spans = alike[0].version_spans
    # Only the last piece is padded, on the right: nothing reads what lies there.
    for span, stop in zip(spans, [span.stop for span in spans[:-1]] + [max(lengths)], strict=True):
        earlier = weights[span.version]
        with earlier.standing_in(policy.model) if earlier is not None else nullcontext():
            hidden = _read(policy, drawn, span.start, stop, cache, alike[0].prompt_ids)
            piece = drawn[:, span.start : stop]
            scores = policy.project(hidden.flatten(0, 1), piece.flatten(), temperature)
        numbers.append(scores.logprobs.view(piece.shape).numpy(force=True))
    whole = np.concatenate(numbers, axis=1)
    return [row[:length] for row, length in zip(whole, lengths, strict=True)]


def _read(
    policy: Policy, drawn: Tensor, start: int, stop: int, cache: DynamicCache, prompt: np.ndarray
) -> Tensor:
    """The hidden states that predict tokens ``start`` to ``stop``, [N, T, D], by the weights held now.

    The cache grows by what they read: each piece begins by the token before it.
    """
    hidden = []
    if not start:
        ids = torch.as_tensor(prompt.astype(np.int64), device=policy.device)
        last = _forward(policy, ids[None], cache)[:, -1:]
        cache.batch_repeat_interleave(len(drawn))
        hidden.append(last.expand(len(drawn), -1, -1))
    read = drawn[:, max(start - 1, 0) : stop - 1]
    if read.shape[1]:
        hidden.append(_forward(policy, read, cache))
    return torch.cat(hidden, dim=1)


def _forward(policy: Policy, ids: Tensor, cache: DynamicCache) -> Tensor:
    return policy.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
