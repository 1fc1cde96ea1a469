"""Layer 1: the power of the draws. Many tokens are drawn, one each after one id, and weighed against tempered
distributions.

A draw y from p is weighed by w = p(y)^λ / Σ p^(1+λ), what the distribution tempered by 1/(1 + λ) gives it
over what p gives it. Under p the expectation of Π w is 1 at every token, whatever came before, so that by
Markov's inequality Π w exceeds 1/α with a chance of at most α: no approximation, and the mean of several such
products is one again. Two samples are drawn, after one random id, where SmolLM2 has var(log p) of 11 nats² at
T = 1 and of 4 at T = 0.7 (a second id doubles what the engine computes):

* ``singles``: n = 1, one token each, every one of them a request of its own. The better of two draws per
  request is far out here, where a longer completion counts as one draw too and costs as many passes as it has
  tokens;
* ``crowd``: n samples a prompt, one token each. The trainer needs one distribution for all samples of a
  prompt, so that thousands of draws cost it a few dozen passes: what a temperature that is a little off
  needs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from statistics import NormalDist

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from lockstep.parity.pair import Pair
from lockstep.parity.search_tolerances import DRAWS_POWER
from lockstep.parity.tolerances import DRAWS_FALSE_ALARM
from lockstep.policy.truncation import CHUNK
from lockstep.records.samples import Group, Samples
from lockstep.records.tokens import SamplingParams
from lockstep.training.trainer import Trainer

TILTS = {"singles": (-0.25, 0.25), "crowd": (-0.045, 0.045)}
"""λ of each sample: the better of two draws is like 1/T = 1.25 over one token, and 5 % like 1.045 over
thousands."""
SINGLES = 16
"""One in so many of the tokens drawn is a single."""
CROWD = 64
"""Samples of each prompt of the crowd."""
MOST_DRAWS = 4.0
"""The crowd may have so many times the tokens of ``parity.draw_tokens``, where distributions are peaked."""


@dataclass(frozen=True)
class Weighed:
    """Draws of one sample."""

    n: int
    log_products: tuple[float, ...]
    """log Π w under each λ."""
    tilts: tuple[float, ...]
    excess: np.ndarray
    """log p + entropy of each draw, float64 [N]."""
    variance: float
    """Σ var(log p), nats²."""
    better: tuple[float, float]
    """Mean and variance of log Π w under the second λ if each draw were the better of two."""

    @property
    def excess_nats(self) -> float:
        """The mean excess: above 0 when draws are too likely, below when too unlikely."""
        return float(self.excess.mean()) if self.n else 0.0

    def smallest_temperature(self, threshold: float) -> float:
        """The least |1/T − 1| that would have been seen with a chance of ``DRAWS_POWER``."""
        z = NormalDist().inv_cdf(DRAWS_POWER)
        # Prompts whose next token is certain tell nothing: the size that would show is then beyond all
        # bounds, and no division by 0.
        v = max(self.variance, 1e-12)
        # Where 1/T is off by δ, log Π w has the mean |t|·δ·v − t²·v/2 and the variance t²·v: the δ at which
        # it lies z of its standard deviations above the threshold.
        return min((threshold + z * abs(t) * v**0.5 + t * t * v / 2) / (abs(t) * v) for t in self.tilts)


@dataclass(frozen=True)
class BothWeighed:
    """Both samples, weighed."""

    singles: Weighed
    crowd: Weighed

    @property
    def parts(self) -> tuple[Weighed, ...]:
        """Both."""
        return self.singles, self.crowd

    @property
    def log_evidence(self) -> float:
        """log of the mean of all products: above −log α with a chance of at most α."""
        products = [product for part in self.parts for product in part.log_products]
        return float(np.logaddexp.reduce(products) - np.log(len(products)))

    @property
    def threshold(self) -> float:
        """What the log of one product must come to for the mean of all to show."""
        return float(np.log(sum(len(part.tilts) for part in self.parts) / DRAWS_FALSE_ALARM))

    @property
    def odd(self) -> bool:
        """True when chance does not explain the draws."""
        return self.log_evidence > -np.log(DRAWS_FALSE_ALARM)

    @property
    def smallest_temperature(self) -> float:
        """See :meth:`Weighed.smallest_temperature`, of the sample that sees more."""
        return min(part.smallest_temperature(self.threshold) for part in self.parts)

    @property
    def power_of_two(self) -> float:
        """The chance with which the better of two draws behind n = 1 would have been seen."""
        mean, variance = self.singles.better
        return 1.0 - NormalDist(mean, max(variance, 1e-12) ** 0.5).cdf(self.threshold)

    def oddity(self) -> str:
        """For people."""
        likeliest = max(self.parts, key=lambda part: max(part.log_products))
        how = "n = 1" if likeliest is self.singles else f"n = {CROWD}"
        return (
            f"of {likeliest.n} tokens drawn with {how} log p exceeds minus the entropy "
            f"by {likeliest.excess_nats:+.3f} nats in the mean; "
            f"the chance is e^{-self.log_evidence:.0f} at most"
        )

    def told(self) -> str:
        """What would have been seen, for people."""
        two = self.power_of_two
        seen = (
            f"the better of 2 behind n = 1 with a chance of {two:.0%}"
            if two < DRAWS_POWER
            else "the better of 2 behind n = 1"
        )
        return (
            f"over {self.crowd.n + self.singles.n} draws a temperature off "
            f"by {self.smallest_temperature:.1%}, and {seen}"
        )


@torch.no_grad()
def draw_many(pair: Pair, sampling: SamplingParams, n_tokens: int) -> BothWeighed:
    """Draw the singles and the crowd, ``n_tokens`` in all, and weigh them; then as much more of a crowd as
    ``parity.draws_see`` needs.

    How much more follows from the prompts' distributions and not from what was drawn: the chance of a false
    alarm stays what it was.
    """
    one = replace(sampling, max_tokens=1, stop_token_ids=())
    rng = np.random.default_rng(pair.seed)
    singles = max(8, n_tokens // SINGLES)
    prompts = max(4, (n_tokens - singles) // CROWD)
    first = _after_one_id(pair, rng, singles, one, pair.seed + 1)
    # Each sample's seeds begin past the last one's: two requests under one seed are not independent.
    second = _after_one_id(pair, rng, prompts, replace(one, n=CROWD), pair.seed + 2 + singles)
    drawn = weigh_many(pair.trainer, first, second)
    missing = min((drawn.smallest_temperature / pair.recipe.parity.draws_see) ** 2, MOST_DRAWS) - 1.0
    if missing <= 0.0:
        return drawn
    more = math.ceil(missing * prompts)
    seed = pair.seed + 3 + singles + CROWD * prompts
    third = _after_one_id(pair, rng, more, replace(one, n=CROWD), seed)
    return with_fields(drawn, crowd=added([drawn.crowd, _weighed(pair.trainer, third, TILTS["crowd"])]))


def _after_one_id(
    pair: Pair, rng: np.random.Generator, n: int, sampling: SamplingParams, seed: int
) -> Samples:
    # One arbitrary token as the prompt: distributions are wide behind those, and draws from wide ones tell
    # more.
    ids = rng.integers(0, pair.trainer.vocabulary, (n, 1)).astype(np.int32)
    return _requested(pair, list(ids), sampling, seed)


def draw_groups(pair: Pair, prompts: Sequence[np.ndarray], sampling: SamplingParams) -> Samples:
    """Samples as training asks for them: several of one request."""
    return _requested(pair, list(prompts), sampling, pair.seed + 3)


def _requested(pair: Pair, prompts: list[np.ndarray], sampling: SamplingParams, seed: int) -> Samples:
    """Seeds n apart: an engine counts a request's samples on from its seed."""
    params = [replace(sampling, seed=seed + row * sampling.n) for row in range(len(prompts))]
    completions = pair.engine.sample(prompts, params)
    return Samples.of(prompts, completions, sampling)


@torch.no_grad()
def weigh_many(trainer: Trainer, singles: Samples, crowd: Samples) -> BothWeighed:
    """Weigh both samples under the trainer's distributions."""
    return BothWeighed(_weighed(trainer, singles, TILTS["singles"]), _weighed(trainer, crowd, TILTS["crowd"]))


def _weighed(trainer: Trainer, sample: Samples, tilts: tuple[float, ...]) -> Weighed:
    """Tokens by their prompt: each prompt's distribution is computed once."""
    ids = np.array([s.token_ids[0] for s in sample], np.int64)
    # A crowd's draws share their prompt.
    contexts, owners = np.unique(np.stack(sample.prompts), axis=0, return_inverse=True)
    # Any token stands for the drawn ones: the state that predicts it does not depend on it.
    hidden = torch.cat(trainer.hidden([Group(prompt, [np.zeros(1, np.int32)]) for prompt in contexts]))
    parts = []
    for start in range(0, len(contexts), CHUNK):
        logprobs = (trainer.logits(hidden[start : start + CHUNK]) / sample.temperature).log_softmax(-1)
        mine = (owners >= start) & (owners < start + len(logprobs))
        parts.append(
            weigh(logprobs, torch.from_numpy(owners[mine] - start), torch.from_numpy(ids[mine]), tilts)
        )
    return added(parts)


def weigh(logprobs: Tensor, rows: Tensor, ids: Tensor, tilts: tuple[float, ...]) -> Weighed:
    """Draws ``ids`` [N] from the rows ``rows`` [N] of ``logprobs`` [L, V], float32."""
    rows, ids = rows.to(logprobs.device), ids.to(logprobs.device)
    p = logprobs.exp()
    # 0 · log 0 is 0 in an entropy, and NaN in floating point.
    finite = logprobs.masked_fill(p == 0.0, 0.0)
    # Sums over thousands of draws decide; in fp32 their error would pass for evidence.
    mean = (p * finite).sum(-1).double()
    variance = (p * finite.square()).sum(-1).double() - mean.square()
    drawn = logprobs[rows, ids].double()
    partition = [((1.0 + t) * logprobs).logsumexp(-1).double() for t in tilts]  # log Σ p^(1+λ), [L]
    products = tuple(float((t * drawn - z[rows]).sum()) for t, z in zip(tilts, partition, strict=True))
    times = torch.bincount(rows, minlength=len(logprobs)).double()
    return Weighed(
        n=len(ids),
        log_products=products,
        tilts=tilts,
        excess=(drawn - mean[rows]).numpy(force=True),
        variance=float((variance * times).sum()),
        better=_better(logprobs, tilts[-1], partition[-1], times),
    )


def _better(logprobs: Tensor, tilt: float, partition: Tensor, times: Tensor) -> tuple[float, float]:
    """Mean and variance of log Π w if each draw were the likelier of two: P(x) = p(x)·(2·P(less likely) +
    p(x))."""
    ordered = logprobs.double().sort(-1).values
    p = ordered.exp()
    chance = p * (2.0 * (p.cumsum(-1) - p) + p)
    # Impossible tokens have a chance of 0, which times −∞ is to be 0 and would be NaN.
    weight = tilt * ordered.clamp(min=-1e4) - partition[:, None]
    mean = (chance * weight).sum(-1)
    variance = (chance * weight.square()).sum(-1) - mean.square()
    return float((mean * times).sum()), float((variance * times).sum())


def added(parts: Sequence[Weighed]) -> Weighed:
    """Several portions of one sample as one."""
    return Weighed(
        n=sum(part.n for part in parts),
        log_products=tuple(
            float(sum(column)) for column in zip(*(part.log_products for part in parts), strict=True)
        ),
        tilts=parts[0].tilts,
        excess=np.concatenate([part.excess for part in parts]),
        variance=sum(part.variance for part in parts),
        better=(sum(part.better[0] for part in parts), sum(part.better[1] for part in parts)),
    )
