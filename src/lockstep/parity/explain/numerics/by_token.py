"""Layer 4: departures whose effect on each token is had outright, beside those of tensors.

=====================  ===========================================  =========================================
how                    families                                     cost
=====================  ===========================================  =========================================
which token it is      a constant; first tokens; long prompts;      nothing
                       drift along the completion
whole distributions    temperature; top-p, top-k; three penalties;  one pass over hidden states, for all
                       a cap on the logits
a step along it        rotary base, positions, norm epsilon,        one forward pass each
                       windows; prompts without their first token
=====================  ===========================================  =========================================
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lockstep.parity.pair import Pair
from lockstep.parity.search_tolerances import SCORE_STEP
from lockstep.policy.truncation import CHUNK
from lockstep.policy.variant_settings import (
    LogitsCapped,
    NormEpsilon,
    PositionsDivided,
    RotaryBase,
    SlidingWindow,
)
from lockstep.policy.variants import Variant
from lockstep.records.samples import Samples
from lockstep.training.trainer import Trainer

TEMPERATURE = "temperature"
CONSTANT = "a constant"
FIRST = "first tokens off"
LONG = "rows of long prompts off"
DRIFT = "drift along the completion"
ROTARY_BASE = "logarithm of the rotary base"
POSITIONS = "positions divided"
EPSILON = "decimal logarithm of the norms' epsilon"
CUT = "share of prompts without their first token"
TOP_P = 0.95
TOP_K = 50
KEPT_AT_MOST = 256
TRUNCATED_P, TRUNCATED_K = f"share of a top-p of {TOP_P}", f"share of a top-k of {TOP_K}"
"""A truncation is none of degree: a share of it says how much of its effect the numbers have."""
REPETITION, PRESENCE, FREQUENCY = "repetition penalty", "presence penalty", "frequency penalty"
CAP = "a cap on the logits"
CAP_UNIT = 30.0
"""θ is (CAP_UNIT / cap)² where the model has none, for tanh moves a logit z by −z³ / (3 cap²); else a share
of the cap."""
EPSILONS_STEP = 1.0

OF_DISTRIBUTIONS = (TEMPERATURE, TRUNCATED_P, TRUNCATED_K, REPETITION, PRESENCE, FREQUENCY, CAP)


@dataclass(frozen=True)
class Setting:
    """One number of the model, or a choice of it."""

    variant: Callable[[float], Variant]
    """The trainer with it moved by θ."""
    step: float
    """θ of the forward pass that shows what it does."""
    of_degree: bool = True
    """False for what is there or not: θ is then the share of its effect."""


def indicators(sample: Samples) -> dict[str, np.ndarray]:
    """∂ log p_i / ∂θ of what moves tokens for where they stand: float64 [T] each."""
    positions = sample.positions
    lengths = np.array([len(prompt) for prompt in sample.prompts])
    slopes = {
        CONSTANT: np.ones(positions.size),
        FIRST: (positions == 0).astype(np.float64),
        LONG: (lengths > np.median(lengths))[sample.owners].astype(np.float64),
    }
    longest = int(positions.max(initial=0))
    if longest:
        slopes[DRIFT] = positions / longest - 0.5
    return slopes


def settings_of(trainer: Trainer, longest: int) -> dict[str, Setting]:
    """Those that this trainer can take.

    Args:
        longest: positions of the longest sequence, of which a window is a part.
    """
    settings: dict[str, Setting] = {}
    if not np.isnan(base := trainer.rotary_base):
        settings[ROTARY_BASE] = Setting(lambda theta: RotaryBase(base * float(np.exp(theta))), SCORE_STEP)
        settings[POSITIONS] = Setting(lambda theta: PositionsDivided(1.0 + theta), SCORE_STEP)
    if not np.isnan(epsilon := trainer.norm_epsilon):
        settings[EPSILON] = Setting(lambda theta: NormEpsilon(epsilon * 10.0**theta), EPSILONS_STEP)
    if trainer.shares_prompts:
        for window in {longest // 2, longest // 4} - {0, 1}:
            settings[f"share of a window of {window}"] = Setting(
                lambda _, w=window: SlidingWindow(w), 1.0, of_degree=False
            )
    return settings


def stepped(pair: Pair, sample: Samples, here: np.ndarray, families: tuple[str, ...] | None = None) -> dict:
    """∂ log p_i / ∂θ by a step along each setting, float64 [T] each.

    Args:
        here: the trainer's scores as it is.
        families: those that are asked for; None for all.
    """
    longest = max(len(ids) for ids in sample.sequences)
    slopes = {}
    for family, setting in settings_of(pair.trainer, longest).items():
        if families is None or family in families:
            moved = moved_by(pair, sample, family, setting.step, here)
            slopes[family] = (moved - here).astype(np.float64) / setting.step
    long_enough = all(len(prompt) > 1 for prompt in sample.prompts)
    if long_enough and (families is None or CUT in families):
        cut = replace(sample, samples=[replace(s, prompt_ids=s.prompt_ids[1:]) for s in sample])
        slopes[CUT] = (cut.scored(pair.trainer) - here).astype(np.float64)
    return slopes


def moved_by(pair: Pair, sample: Samples, family: str, theta: float, here: np.ndarray) -> np.ndarray | None:
    """The trainer's scores with a setting moved by θ, float [T]; None where the family has no variant."""
    longest = max(len(ids) for ids in sample.sequences)
    setting = settings_of(pair.trainer, longest).get(family)
    if setting is not None:
        with pair.trainer.holding(setting.variant(theta)):
            moved = sample.scored(pair.trainer)
        return moved if setting.of_degree else here + theta * (moved - here)
    if family == TEMPERATURE:
        return np.concatenate(pair.trainer.score(sample.groups, sample.temperature * (1.0 + theta)))
    cap = _capped(pair.trainer, theta) if family == CAP else None
    if cap is None:
        return None
    with pair.trainer.holding(LogitsCapped(cap)):
        return sample.scored(pair.trainer)


def of_distributions(pair: Pair, sample: Samples) -> dict[str, np.ndarray]:
    """∂ log p_i / ∂θ of what acts on whole distributions, float64 [T] each, by one pass."""
    hidden = torch.cat(list(pair.trainer.hidden(sample.apart().groups)))
    targets = torch.from_numpy(sample.token_ids.astype(np.int64)).to(hidden.device)
    seen = _Seen.of(sample, hidden.device)
    parts: dict[str, list[Tensor]] = {family: [] for family in OF_DISTRIBUTIONS}
    for first in range(0, len(targets), CHUNK):
        rows = slice(first, first + CHUNK)
        slopes = _slopes(pair.trainer, hidden[rows], targets[rows], seen.rows(rows), sample.temperature)
        for family, values in slopes:
            parts[family].append(values)
    return {family: torch.cat(each).double().numpy(force=True) for family, each in parts.items()}


@dataclass(frozen=True, eq=False)
class _Seen:
    """The tokens before each, once each, padded to one width."""

    ids: Tensor
    """int64 [T, W]; −1 where there are no more."""
    counts: Tensor
    """How often the completion had it, float32 [T, W]."""

    @classmethod
    def of(cls, sample: Samples, device: torch.device) -> "_Seen":
        ids, counts = [], []
        for one in sample:
            for place in range(len(one.token_ids)):
                before = one.token_ids[:place]
                known = np.unique(np.r_[one.prompt_ids, before]).astype(np.int64)
                times = np.bincount(np.searchsorted(known, before), minlength=known.size)
                ids.append(torch.from_numpy(known))
                counts.append(torch.from_numpy(times.astype(np.float32)))
        pad = torch.nn.utils.rnn.pad_sequence
        padded = pad(ids, batch_first=True, padding_value=-1).to(device)
        return cls(padded, pad(counts, batch_first=True).to(device))

    def rows(self, rows: slice) -> "_Seen":
        return _Seen(self.ids[rows], self.counts[rows])


def _slopes(
    trainer: Trainer, hidden: Tensor, targets: Tensor, seen: _Seen, temperature: float
) -> Iterator[tuple[str, Tensor]]:
    """The slopes of a few tokens in each family: (family, float32 [t])."""
    raw = trainer.logits(hidden)
    logprobs = (raw / temperature).log_softmax(-1)
    p = logprobs.exp()
    at = targets[:, None]

    def of_logits(move: Tensor) -> Tensor:
        return (move.gather(1, at)[:, 0] - (p * move).sum(-1)) / temperature

    yield TEMPERATURE, -of_logits(raw)
    kept = p.topk(min(KEPT_AT_MOST, p.shape[1]), -1).values.cumsum(-1)
    crossing = (kept < TOP_P).sum(-1).clamp(max=kept.shape[1] - 1)
    # The tokens that are held may come short of the mass, and rounding may take it past 1.
    yield TRUNCATED_P, -kept.gather(1, crossing[:, None])[:, 0].clamp(TOP_P, 1.0).log()
    yield TRUNCATED_K, -kept[:, min(TOP_K, kept.shape[1]) - 1].clamp(max=1.0).log()
    # What a penalty moves: the logits of the tokens seen before, and no others.
    there = seen.ids >= 0
    which = seen.ids.clamp(min=0)
    z = raw.gather(1, which)
    share = p.gather(1, which) * there
    drawn = (seen.ids == at).float()
    moves = {REPETITION: -z.abs(), PRESENCE: -(seen.counts > 0).float(), FREQUENCY: -seen.counts}
    for family, move in moves.items():
        yield family, ((drawn - share) * move).sum(-1) / temperature
    yield CAP, of_logits(_cap_slope(raw, trainer.softcap))


def _cap_slope(raw: Tensor, cap: float | None) -> Tensor:
    """∂z / ∂θ of every logit."""
    if cap is None:
        return -(raw**3) / (3.0 * CAP_UNIT**2)
    # In float32 a logit may reach the cap itself, whose atanh is infinite.
    share = (raw / cap).clamp(-1.0 + 1e-6, 1.0 - 1e-6)
    return raw - cap * share.atanh() * (1.0 - share.square())


def _capped(trainer: Trainer, theta: float) -> float | None:
    """The cap that θ stands for; None where it stands for none."""
    if trainer.softcap is not None:
        return trainer.softcap * (1.0 + theta)
    return CAP_UNIT / float(np.sqrt(theta)) if theta > 0.0 else None


def all_slopes(pair: Pair, sample: Samples, here: np.ndarray) -> dict[str, np.ndarray]:
    """The slopes of every family of this module, by family, float64 [T] each."""
    return indicators(sample) | of_distributions(pair, sample) | stepped(pair, sample, here)


def slopes_of(pair: Pair, sample: Samples, family: str, here: np.ndarray) -> np.ndarray | None:
    """The slopes of one family; None where it is none of this module's, or cannot be on these tokens."""
    if family in OF_DISTRIBUTIONS:
        return of_distributions(pair, sample)[family]
    known = indicators(sample)
    return known[family] if family in known else stepped(pair, sample, here, (family,)).get(family)
