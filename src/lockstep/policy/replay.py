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
from lockstep.records.versions import VersionSpan


@torch.no_grad()
def over_kept_caches(
    policy: Policy, sequences: Sequence[Sample], weights: Mapping[int, Snapshot | None], temperature: float
) -> list[np.ndarray]:
    """Log-probabilities of whole completions, each piece by the weights that drew it, over one cache.

    Nats, float32 [T] each.

    Args:
        weights: of each version; None: those that the policy holds.
    """
    caches = [DynamicCache() for _ in sequences]
    found = [np.full(len(sequence.token_ids), np.nan, np.float32) for sequence in sequences]
    versions = sorted({span.version for sequence in sequences for span in sequence.version_spans})
    with attention_of(policy.model, EAGER):
        for version in versions:
            earlier = weights[version]
            with earlier.standing_in(policy.model) if earlier is not None else nullcontext():
                for sequence, cache, numbers in zip(sequences, caches, found, strict=True):
                    for span in (span for span in sequence.version_spans if span.version == version):
                        numbers[span.start : span.stop] = _piece(policy, sequence, span, cache, temperature)
    return found


def _piece(
    policy: Policy, sequence: Sample, span: VersionSpan, cache: DynamicCache, temperature: float
) -> np.ndarray:
    """The span's log-probabilities, by the weights held now; the cache grows by what they read."""
    tokens = sequence.token_ids
    n = span.stop - span.start
    first = span.start == 0
    read = (
        np.r_[sequence.prompt_ids, tokens[: span.stop - 1]]
        if first
        else tokens[span.start - 1 : span.stop - 1]
    )
    hidden = policy.model.base_model(
        input_ids=_ids(policy, read)[None], past_key_values=cache, use_cache=True
    ).last_hidden_state[0]
    drawn = _ids(policy, tokens[span.start : span.stop])
    return policy.project(hidden[-n:], drawn, temperature).logprobs.numpy(force=True)


def _ids(policy: Policy, ids: np.ndarray) -> Tensor:
    return torch.as_tensor(ids.astype(np.int64), device=policy.device)
