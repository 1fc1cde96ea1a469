"""Layer 1: was repetition penalised though nobody asked for it?

A penalty edits the logits of the tokens seen before and of no others (``hypotheses.edit``). Of a distribution
a fit needs the logits of those, and the mass of the rest.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lockstep.parity.explain.fitting import Fitted, fitted, miss_of
from lockstep.parity.explain.semantics.held import Held, every_part
from lockstep.parity.explain.semantics.hypotheses import penalised
from lockstep.parity.explain.semantics.sampler import Explained
from lockstep.records.samples import Samples

PENALTIES = {
    "repetition_penalty": 1.0 + np.geomspace(0.02, 1.0, 8),
    "presence_penalty": np.geomspace(0.05, 2.0, 8),
    "frequency_penalty": np.geomspace(0.05, 2.0, 8),
}


class PenaltyFit:
    """Numbers of some tokens under penalties.

    Args:
        logits: float32 [N, V].
        ids: int64 [N], what was drawn.
        seen: for each token those of prompt and completion before it, int64 [S_n], each once.
        counts: how often each of them is in the completion, int64 [S_n].
    """

    def __init__(
        self, logits: Tensor, ids: Tensor, seen: list[Tensor], counts: list[Tensor], temperature: float
    ) -> None:
        pad = torch.nn.utils.rnn.pad_sequence
        self.temperature = temperature
        device = logits.device
        self.seen = pad(seen, batch_first=True, padding_value=-1).to(device)
        self.counts = pad(counts, batch_first=True).to(device).float()
        self.z = logits.gather(1, self.seen.clamp(min=0))
        mask = torch.zeros_like(logits, dtype=torch.bool)
        for row, tokens in enumerate(seen):
            mask[row, tokens] = True
        self.rest = (logits / temperature).masked_fill(mask, float("-inf")).logsumexp(-1)
        self.drawn = logits.gather(1, ids[:, None])[:, 0]
        self.was_seen = self.seen == ids[:, None]

    def scores(
        self, repetition_penalty: float = 1.0, presence_penalty: float = 0.0, frequency_penalty: float = 0.0
    ) -> Tensor:
        """The drawn tokens' log-probabilities, float32 [N]."""
        z = penalised(
            self.z,
            self.counts,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
        )
        held = torch.where(self.seen < 0, float("-inf"), z)
        whole = torch.logaddexp(self.rest, (held / self.temperature).logsumexp(-1))
        edited = torch.where(self.was_seen, z, 0.0).sum(1)
        return torch.where(self.was_seen.any(1), edited, self.drawn) / self.temperature - whole


class Seen(NamedTuple):
    """What came before each of N tokens."""

    ids: list[Tensor]
    """The tokens of prompt and completion, each once: int64 [seen] for each of N."""
    counts: list[Tensor]
    """How often the completion has each of them."""


def hidden_penalty(sample: Samples, held: Held, limit: float, seen: Seen | None = None) -> Explained | None:
    """The one penalty that explains the numbers; None where none does.

    Args:
        held: of ``sample``.
        seen: :func:`seen_before`, where it is known already.
        limit: a fit is an explanation when it misses by at most this, nats.
    """
    fit = PenaltyFit(held.logits, held.ids, *(seen or seen_before(sample)), sample.temperature)

    def miss(**penalty: float) -> float:
        return miss_of(fit.scores(**penalty) - held.engine)

    without = miss()
    fits: dict[str, Fitted] = {}
    for name, grid in PENALTIES.items():
        values = [float(v) for v in grid]
        fits[name] = fitted(values, lambda v, name=name: miss(**{name: v}), without, tries=36)
    name = min(fits, key=lambda name: fits[name].miss)
    best = fits[name]
    if not best.miss <= limit < without:
        return None
    return Explained("hidden_penalties", f"{name.replace('_', ' ')} {best.value:.3g}", best.miss)


def seen_before(sample: Samples) -> Seen:
    """What came before each of the tokens that are fitted."""
    groups = sample.groups
    owners = sample.owners
    positions = sample.positions
    seen, counts = [], []
    for token in every_part(len(owners)):
        group = groups[owners[token]]
        before = group.completions[0][: positions[token]]
        ids = np.unique(np.r_[group.prompt, before])
        seen.append(torch.from_numpy(ids.astype(np.int64)))
        counts.append(torch.from_numpy((before[None, :] == ids[:, None]).sum(1)))
    return Seen(seen, counts)
