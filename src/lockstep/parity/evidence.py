"""The tokens that layers 1, 2 and 4 judge, drawn once, and their scores.

=========  ==============================================  =======================================
sample     drawn with                                      scores at hand
=========  ==============================================  =======================================
own        the recipe's own sampling                       A, C at the recipe's temperature
neutral    T = 1, nothing truncated or penalised           A, B, C at T = 1
telling    settings under which the hypotheses differ      A (own, or a sample at another T)
=========  ==============================================  =======================================

On ``neutral`` every hypothesis of layer 1 says the same, so a gap there is none of semantics; and there score
B, which V1 engines have at T = 1 only, is of the same distribution as A and C.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace
from torch import Tensor

from lockstep.metrics.reduce import quantiles_abs
from lockstep.parity.pair import Pair, draw
from lockstep.parity.probes import probe_prompts
from lockstep.parity.tolerances import DISTINGUISHING_TEMPERATURE, TELLING_LOG_T, Tolerance
from lockstep.policy.variants import Steady
from lockstep.records.samples import Samples
from lockstep.records.tokens import SamplingParams


@dataclass(eq=False)
class Floors:
    """The trainer against itself on ``own``, nats."""

    repeat: np.ndarray
    """C again, the same rows: float32 [T]."""
    alone: np.ndarray
    """C′ of every other sequence, each in a row of its own: float32 [tokens of those]."""
    half: np.ndarray
    """Which tokens those are: bool [T]."""

    def steady(self, pair: Pair) -> bool:
        """True when arithmetic explains both."""
        return within(pair.trainer_noise, self.repeat) and within(pair.trainer_noise, self.alone)


@dataclass(eq=False)
class Evidence:
    """See the module's table. Arrays are float32 [T] of their sample."""

    own: Samples
    neutral: Samples
    telling: Samples
    rescored: np.ndarray
    """Score B of ``neutral``."""
    trainer: np.ndarray
    """Score C of ``neutral`` at T = 1."""
    own_trainer: np.ndarray
    """Score C of ``own`` at the recipe's temperature."""
    floors: Floors
    _states: dict[int, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def by_trainer(cls, sample: Samples, trainer: np.ndarray) -> "Evidence":
        """One sample of an engine that cannot be asked again: the trainer's scores stand in for its
        re-scores.

        Args:
            trainer: score C of the sample, float32 [T]. Its floors are taken to be 0.
        """
        none = np.zeros(trainer.size, np.float32)
        floors = Floors(repeat=none, alone=none.copy(), half=np.ones(trainer.size, bool))
        return cls(
            own=sample,
            neutral=sample,
            telling=sample,
            rescored=trainer,
            trainer=trainer,
            own_trainer=trainer,
            floors=floors,
        )

    @property
    def samples(self) -> list[Samples]:
        """Each sample once."""
        return list({id(s): s for s in (self.own, self.neutral, self.telling)}.values())

    def confirmed(self, pair: Pair) -> bool:
        """True when the trainer scores as the engine re-scores."""
        return within(pair.noise, self.rescored - self.trainer)

    def states(self, pair: Pair, sample: Samples) -> list[Tensor]:
        """The hidden states behind one of the samples, asked of the model once for all that layer 1 asks.

        What the trainer holds, it holds for the whole layer.
        """
        if id(sample) not in self._states:
            self._states[id(sample)] = pair.trainer.hidden(sample.groups)
        return self._states[id(sample)]

    @property
    def n_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(s.engine_logprobs.size for s in self.samples)


def gather(pair: Pair) -> Evidence:
    """Draw and score. A trainer that is not steady is steadied for scores C."""
    parity = pair.recipe.parity
    prompts = probe_prompts(pair, parity.probe_prompts, pair.seed)
    plain = SamplingParams(max_tokens=parity.probe_tokens)
    sampling = replace(pair.recipe.sampling, max_tokens=parity.probe_tokens, stop_token_ids=())
    own = draw(pair, prompts, sampling, pair.seed)
    neutral = own if sampling == plain else draw(pair, prompts, plain, pair.seed)
    own_trainer = own.scored(pair.trainer)
    floors = _floors(pair, own, own_trainer)
    with steadied(pair, floors):
        own_trainer = own_trainer if floors.steady(pair) else own.scored(pair.trainer)
        at_one = own_trainer if own is neutral else neutral.scored(pair.trainer)
    # An engine that cannot re-score is judged by the trainer alone; layers path and weights are then NOT_RUN.
    rescores = pair.engine.ready.capabilities["rescore"].supported
    rescored = neutral.rescored(pair.engine) if rescores else at_one
    return Evidence(own, neutral, _telling(pair, own), rescored, at_one, own_trainer, floors)


def _floors(pair: Pair, own: Samples, trainer: np.ndarray) -> Floors:
    # Every other sequence: those alone in a row are a pass each.
    half = own.owners % 2 == 0
    alone = np.concatenate(
        [s for group in own.groups[::2] for s in pair.trainer.score([group], own.sampling.temperature)]
    )
    return Floors(own.scored(pair.trainer) - trainer, alone - trainer[half], half)


@contextmanager
def steadied(pair: Pair, floors: Floors) -> Iterator[None]:
    """For the layers before numerics: dropout off, a sequence a row if the trainer is unsteady otherwise."""
    if floors.steady(pair):
        yield
        return
    with pair.trainer.holding(Steady()):
        yield


def within(noise: Tolerance, gap: np.ndarray) -> bool:
    """True when arithmetic alone explains ``gap``; a NaN it does not."""
    quantiles = quantiles_abs(gap)
    return quantiles["p50"] <= noise.p50 and quantiles["p999"] <= noise.p999


def _telling(pair: Pair, own: Samples) -> Samples:
    """The recipe's own sample where raw and sampled differ in it, else a few at another temperature."""
    if (
        abs(np.log(own.sampling.temperature)) >= TELLING_LOG_T
        or own.sampling.truncates
        or own.sampling.penalises
    ):
        return own
    half = own.prompts[: max(4, len(own.prompts) // 2)]
    return draw(pair, half, replace(own.sampling, temperature=DISTINGUISHING_TEMPERATURE), pair.seed + 1)
