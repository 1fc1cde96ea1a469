"""Which distribution explains an engine's log-probabilities?

Every candidate is computed from the trainer's logits and fitted.

The candidates are the ways in which engines are known to report: at the sampler's temperature or at 1, with
or without penalties and biases, truncated and renormalised or not. Those that a sampling setting cannot tell
apart are one candidate. The order of operations is vLLM's (vllm/v1/sample/sampler.py): bias, penalties,
temperature, min-p, top-k, top-p, log-softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lockstep.parity.explain.fitting import miss_of
from lockstep.policy.truncation import CHUNK, kept
from lockstep.records.samples import Group
from lockstep.records.semantics import LogprobSemantics
from lockstep.records.tokens import SamplingParams
from lockstep.training.trainer import Trainer


@dataclass(frozen=True)
class Fit:
    """How well one candidate explains the engine's numbers."""

    semantics: LogprobSemantics
    p50: float
    """median |candidate − engine|, nats; infinite where the candidate holds a drawn token impossible."""
    largest: float
    miss: float
    """The median, or the tail where that is worse (``fitting.miss_of``)."""
    gap: np.ndarray = field(repr=False, compare=False)
    """engine − candidate, float32 [T]; infinite where the candidate holds the token impossible."""


def fits(
    trainer: Trainer,
    groups: Sequence[Group],
    engine: np.ndarray,
    sampling: SamplingParams,
    enough: float = 0.0,
    states: Sequence[Tensor] | None = None,
) -> list[Fit]:
    """All candidates, the best first.

    Args:
        groups: one completion each.
        engine: what the engine reported, float32 [T].
        enough: of medians below this the tail says which is better, nats.
        states: the groups' hidden states, where they are at hand.
    """
    candidates = candidates_of(sampling)
    fitting = []
    for semantics, scores in zip(
        candidates, scored_under(trainer, groups, sampling, candidates, states), strict=True
    ):
        with np.errstate(invalid="ignore"):
            gap = engine - scores
        gap[np.isnan(gap)] = np.inf  # a candidate is not to win by what cannot be compared
        size = np.abs(gap)
        fitting.append(Fit(semantics, float(np.median(size)), float(size.max()), miss_of(size), gap))
    return sorted(fitting, key=lambda fit: (max(fit.p50, enough), fit.miss))


def scored_under(
    trainer: Trainer,
    groups: Sequence[Group],
    sampling: SamplingParams,
    candidates: Sequence[LogprobSemantics],
    states: Sequence[Tensor] | None = None,
) -> list[np.ndarray]:
    """Log-probabilities of all completions under each candidate, float32 [T] each; one completion a group."""
    hidden = states or trainer.hidden(groups)
    scored = [
        candidate_logprobs(trainer, g, sampling, candidates, h) for g, h in zip(groups, hidden, strict=True)
    ]
    return [np.concatenate(parts) for parts in zip(*scored, strict=True)]


def candidates_of(sampling: SamplingParams) -> list[LogprobSemantics]:
    """The distributions that ``sampling`` tells apart."""
    # T = 0 is greedy: there are no logits divided by it.
    temperatures = {1.0, sampling.temperature or 1.0}
    return [
        LogprobSemantics(
            distribution="model" if (temperature, truncated, penalised) == (1.0, False, False) else "sampler",
            temperature=temperature,
            truncated=truncated,
            penalised=penalised,
        )
        for temperature, truncated, penalised in product(
            temperatures, {False, sampling.truncates}, {False, sampling.penalises}
        )
    ]


@torch.no_grad()
def candidate_logprobs(
    trainer: Trainer,
    group: Group,
    sampling: SamplingParams,
    candidates: Sequence[LogprobSemantics],
    hidden: Float[Tensor, "T D"] | None = None,
) -> list[np.ndarray]:
    """The completion's log-probabilities under each candidate, float32 [T] each."""
    if hidden is None:
        (hidden,) = trainer.hidden([group])
    ids = torch.as_tensor(np.asarray(group.completions[0], np.int64), device=hidden.device)
    by_candidate: list[list[Tensor]] = [[] for _ in candidates]
    for start in range(0, len(ids), CHUNK):
        part = slice(start, start + CHUNK)
        logits = trainer.logits(hidden[part])
        edited = edit(logits, group.prompt, ids, start, sampling) if sampling.penalises else logits
        for at, candidate in enumerate(candidates):
            z = (edited if candidate.penalised else logits) / candidate.temperature
            if candidate.truncated:
                z = z.masked_fill(~kept(z.log_softmax(-1), sampling), float("-inf"))
            by_candidate[at].append(z.log_softmax(-1).gather(1, ids[part, None])[:, 0])
    return [torch.cat(parts).numpy(force=True) for parts in by_candidate]


def edit(
    logits: Float[Tensor, "L V"], prompt: np.ndarray, completion: Tensor, start: int, sampling: SamplingParams
) -> Float[Tensor, "L V"]:
    """Bias, then penalties: repetition for prompt and completion, the other two by count in the completion.

    Args:
        start: how many tokens of the completion come before the first row.
    """
    out = logits.clone()
    for token, bias in sampling.logit_bias.items():
        out[:, token] += bias
    in_prompt = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    in_prompt[torch.as_tensor(prompt.astype(np.int64), device=logits.device)] = True
    counts = torch.zeros(logits.shape[1], device=logits.device)
    for token in completion[:start]:
        counts[token] += 1
    penalties = {
        name: getattr(sampling, name)
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    }
    for row in range(len(out)):
        seen = in_prompt | (counts > 0)
        out[row] = torch.where(seen, penalised(out[row], counts, **penalties), out[row])
        counts[completion[start + row]] += 1  # after its own row: a token is penalised from the next one on
    return out


def penalised(
    logits: Tensor,
    counts: Tensor,
    *,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> Tensor:
    """Logits of tokens that were seen. ``counts``: how often each is in the completion alone."""
    # As engines do it: a quotient makes a negative logit larger, so those are multiplied.
    scaled = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    return scaled - frequency_penalty * counts - presence_penalty * (counts > 0)
