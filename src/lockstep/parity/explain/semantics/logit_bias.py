"""Layer 1: is a bias added to the logits of a few tokens, or are they banned, though nobody asked for it?

With a bias b on token x every number moves by b·[drawn = x] − log(1 + p_x·(eᵇ − 1)). Tokens are taken one at
a time, as in matching pursuit: the one whose direction [drawn = x] − p_x the miss lies along most, then its
bias, then the next. They are fitted on some tokens and proven on all.
"""

import numpy as np
import torch
from torch import Tensor

from lockstep.parity.evidence import within
from lockstep.parity.explain.fitting import fitted, miss_of
from lockstep.parity.explain.semantics.held import Held
from lockstep.parity.explain.semantics.sampler import Explained, distributions
from lockstep.parity.pair import Pair
from lockstep.parity.search_tolerances import BIAS_ENOUGH, BIAS_SUPPORT, EXPLAINS
from lockstep.records.samples import Samples
from lockstep.training.trainer import Trainer

MOST_BIASED = 6
"""Tokens."""
CANDIDATES = 4
"""Tokens of each step whose bias is fitted."""
SIZES = tuple(float(size) for size in np.geomspace(0.02, 20.0, 11))
"""A token that is 20 nats down is as good as banned."""


class BiasFit:
    """Biases that are found one after the other.

    Args:
        logprobs: float32 [N, V], of the whole distribution.
        ids: int64 [N], what was drawn.
        engine: float32 [N], what was reported for it.
    """

    def __init__(self, logprobs: Tensor, ids: Tensor, engine: Tensor) -> None:
        self.p = logprobs.exp()
        self.ids = ids
        drawn = logprobs.gather(1, ids[:, None])[:, 0]
        self.gap = (engine - drawn).double()
        # A token's direction over all draws has the squared length Σ (p − [drawn])² = Σ p² + Σ_drawn (1 −
        # 2p).
        self.length = (
            self.p.square().sum(0).index_add_(0, ids, 1.0 - 2.0 * drawn.exp()).clamp(min=1e-6).sqrt()
        )
        self.biases: dict[int, float] = {}

    def left(self, biases: dict[int, float]) -> Tensor:
        """What the numbers still differ by under the biases, float64 [N]."""
        shift = torch.zeros_like(self.gap)
        mass = torch.ones_like(self.gap)
        for token, bias in biases.items():
            shift += bias * (self.ids == token)
            mass += self.p[:, token].double() * np.expm1(bias)
        return self.gap - shift + mass.clamp(min=1e-12).log()

    def step(self) -> float:
        """Give the token that mends most its bias, be it a new one or not; the mean |left| then, nats."""
        left = self.left(self.biases)
        # The miss along [drawn = x] − p_x, for every x at once: one product with [N, V].
        along = (-(left.float() @ self.p)).index_add_(0, self.ids, left.float())
        # By the cosine and not by the product, which frequent tokens would always win.
        best = (along.abs() / self.length).topk(CANDIDATES).indices.tolist()
        now = float(left.abs().mean())
        mean, bias, token = min(
            (*self._fitted(token, float(along[token]), now), token) for token in {*self.biases, *best}
        )
        self.biases[token] = bias
        return mean

    def _fitted(self, token: int, along: float, now: float) -> tuple[float, float]:
        """The mean |left| under the best bias for ``token``, and that bias."""
        # Sizes are fitted on a logarithmic grid, which has no sign of its own.
        sign = np.sign(self.biases.get(token, along))

        def miss(size: float) -> float:
            return float(self.left(self.biases | {token: sign * size}).abs().mean())

        best = fitted(SIZES, miss, now, tries=36)
        return best.miss, float(sign * best.value)


def hidden_bias(pair: Pair, sample: Samples, held: Held) -> Explained | None:
    """Biases of a few tokens (``held``) that explain every number of ``sample``; None where none do."""
    engine = sample.engine_logprobs
    temperature = sample.temperature
    fit = BiasFit((held.logits / temperature).log_softmax(-1), held.ids, held.engine)
    now = np.inf
    after = float(fit.gap.abs().mean())
    # Till it is good enough, or a token more mends nothing.
    while BIAS_ENOUGH * pair.noise.p50 < after < now and len(fit.biases) < MOST_BIASED:
        now = after
        after = fit.step()
    if not after <= EXPLAINS * float(fit.gap.abs().mean()):
        return None
    before, left = (np.abs(scored - engine) for scored in _scored(pair.trainer, sample, fit.biases))
    # As many tokens that were off as biases could be fitted to noise with; else six numbers explain six
    # tokens.
    supported = (before > pair.noise.p50).sum() >= BIAS_SUPPORT * len(fit.biases)
    if not (
        fit.biases and supported and within(pair.noise, left) and left.mean() <= EXPLAINS * before.mean()
    ):
        return None
    decode = pair.renderer.tokenizer.decode
    # Fitted behind the temperature, and told as it is set: before it.
    named = (f"{bias * temperature:+.3g} on {decode([token])!a}" for token, bias in fit.biases.items())
    return Explained("hidden_logit_bias", f"a logit bias of {', '.join(named)}", miss_of(left))


def _scored(trainer: Trainer, sample: Samples, biases: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """The trainer's log-probabilities without the biases and under them, float32 [T] each."""
    tokens = list(biases)
    values = torch.tensor(list(biases.values()), device=trainer.device)
    plain, biased = [], []
    for z, ids in distributions(trainer, sample.groups, sample.sampling):
        plain.append(z.log_softmax(-1).gather(1, ids[:, None])[:, 0])
        z[:, tokens] += values
        biased.append(z.log_softmax(-1).gather(1, ids[:, None])[:, 0])
    return torch.cat(plain).numpy(force=True), torch.cat(biased).numpy(force=True)
