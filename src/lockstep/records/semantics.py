"""Which distribution a reported log-probability is of."""

from typing import Literal

from msgspec import Struct

from lockstep.records.tokens import SamplingParams

Distribution = Literal["model", "sampler", "sampler_untruncated"]


class LogprobSemantics(Struct, frozen=True):
    """The distribution whose log-softmax an engine reports.

    Example: vLLM V1 with ``logprobs_mode="processed_logprobs"`` at T = 0.7 and top-p 0.9:
    ``LogprobSemantics(distribution="sampler", temperature=0.7, truncated=True, penalised=False)``.
    """

    distribution: Distribution
    """``model``: the raw logits. ``sampler``: what tokens are drawn from. ``sampler_untruncated``: tempered
    and penalised, but before top-k, top-p and min-p (SGLang's default)."""
    temperature: float
    """The divisor of the logits; 1.0 for ``model`` and for greedy sampling."""
    truncated: bool
    penalised: bool

    @classmethod
    def of(cls, distribution: Distribution, sampling: SamplingParams) -> "LogprobSemantics":
        """The semantics that ``sampling`` has under an engine that reports ``distribution``."""
        if distribution == "model":
            return cls(distribution="model", temperature=1.0, truncated=False, penalised=False)
        greedy = sampling.temperature == 0.0
        return cls(
            distribution=distribution,
            temperature=1.0 if greedy else sampling.temperature,
            truncated=distribution == "sampler" and sampling.truncates,
            penalised=sampling.penalises,
        )

    def describe(self) -> str:
        """One phrase for people: ``sampler distribution at T=0.7, truncated and renormalised``."""
        parts = [f"{self.distribution.replace('_', ' ')} distribution at T={self.temperature:g}"]
        if self.truncated:
            parts.append("truncated and renormalised")
        if self.penalised:
            parts.append("with penalties")
        return ", ".join(parts)
