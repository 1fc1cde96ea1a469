"""The canary: known tokens that engine and trainer both score, after every weight sync.

Neither a payload's checksum nor a compare of tensors proves a sync: an engine may keep a packed copy of a
tensor whose visible value is new. Only scoring tokens does.
"""

from dataclasses import dataclass, field

import numpy as np

from lockstep.parity.pair import Pair
from lockstep.parity.tolerances import CANARY_FLOOR, CANARY_MOST, CANARY_MULTIPLE
from lockstep.records.samples import Group, Samples

SEQUENCE_TOKENS = 8
"""Scored in each sequence: context enough for every part of the model to matter."""


@dataclass(frozen=True, eq=False)
class TrainerSide:
    """What the trainer says of a canary, and under which weights."""

    scores: np.ndarray
    """Score C, float32 [T]."""
    mark: int
    """The mark of the trainer's weights then (``Trainer.weights_mark``)."""


@dataclass(eq=False)
class Canary:
    """A few sequences, and what the trainer last gave them.

    Each sequence is a group with a one-token prompt, so that every token after the first is scored.
    """

    groups: list[Group]
    temperature: float = 1.0
    """The temperature of the trainer's scores; the engine re-scores at 1."""
    scores: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    """The trainer's scores under the weights of the last measurement, float32 [T]."""
    served: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    """The engine's scores of that measurement, float32 [T]."""
    mark: int = 0
    """The mark of the trainer's weights at that measurement."""
    clean_gap_nats: float = 0.0
    """Mean |trainer − engine| that the ladder measured, of these tokens or all re-scored: the larger."""

    @classmethod
    def of(cls, sampled: Samples, n_tokens: int) -> "Canary":
        """The last tokens of sampled sequences, about ``n_tokens`` in all."""
        n = min(len(sampled.sequences), max(1, n_tokens // SEQUENCE_TOKENS))
        # One more of each, which is its prompt.
        chosen = [ids[-(n_tokens // n + 1) :] for ids in sampled.sequences[:n]]
        return cls([Group(ids[:1], [ids[1:]]) for ids in chosen])

    @property
    def owners(self) -> np.ndarray:
        """Which sequence each token belongs to, int [T]."""
        return np.repeat(np.arange(len(self.groups)), [len(group.completions[0]) for group in self.groups])

    def engine_scores(self, pair: Pair) -> np.ndarray:
        """Score B, float32 [T]."""
        return np.concatenate(pair.engine.score([np.r_[g.prompt, g.completions[0]] for g in self.groups]))

    def trainer_scores(self, pair: Pair) -> np.ndarray:
        """Score C, float32 [T]."""
        return np.concatenate(pair.trainer.score(self.groups, self.temperature))

    def trainer_side(self, pair: Pair) -> TrainerSide:
        """The trainer's half of a measurement: it only reads the weights, and may run beside their load."""
        return TrainerSide(self.trainer_scores(pair), pair.trainer.weights_mark())

    def measure(self, pair: Pair, side: TrainerSide | None = None) -> "CanaryResult":
        """Score on both sides now, and remember the scores for the next time.

        Args:
            side: the trainer's, where it was taken while the engine was loading the same weights.
        """
        side = self.trainer_side(pair) if side is None else side
        trainer = side.scores
        engine = self.engine_scores(pair)
        before = self.scores
        self.scores = trainer
        served = self.served
        self.served = engine
        marked = self.mark
        self.mark = side.mark
        gap = trainer - engine
        shift = np.abs(trainer - before) if before.size else np.full(1, np.nan)
        return CanaryResult(
            gap_abs_mean_nats=float(np.abs(gap).mean()),
            gap_abs_max_nats=float(np.abs(gap).max()),
            shift_abs_mean_nats=float(shift.mean()),
            gap_to_previous_abs_mean_nats=float(np.abs(before - engine).mean())
            if before.size
            else float("nan"),
            trainer_moved=before.size > 0 and marked != self.mark and _most(shift > 0.0, trainer < 0.0),
            engine_moved=not served.size or not np.array_equal(served, engine),
            limit_nats=CANARY_MULTIPLE * max(self.clean_gap_nats, CANARY_FLOOR),
            n_tokens=gap.size,
        )


@dataclass(frozen=True)
class CanaryResult:
    """One proof of one sync."""

    gap_abs_mean_nats: float
    gap_abs_max_nats: float
    shift_abs_mean_nats: float
    """How far the trainer's scores moved since the last measurement: what missing the update would show."""
    gap_to_previous_abs_mean_nats: float
    """Mean |engine − trainer before the update|: small when the update was not delivered at all."""
    trainer_moved: bool
    """True when its weights are others than before, and so are its numbers of most tokens."""
    engine_moved: bool
    """False when the engine gives every token the very number it gave before the update."""
    limit_nats: float
    n_tokens: int

    @property
    def refuted(self) -> bool:
        """True when the engine does not serve the weights that it was sent; a NaN anywhere refutes."""
        return self._stuck or not self.gap_abs_mean_nats <= self.limit_nats

    @property
    def proven(self) -> bool:
        """True when it does, and a missing update would have shown by moving the canary past the limit."""
        return not self.refuted and self.shift_abs_mean_nats > self.limit_nats

    @property
    def _stuck(self) -> bool:
        return self.trainer_moved and not self.engine_moved

    @property
    def not_delivered(self) -> bool:
        """True when the engine matches the weights before the update better than those after it."""
        return self._stuck or self.gap_to_previous_abs_mean_nats < self.gap_abs_mean_nats


def _most(moved: np.ndarray, uncertain: np.ndarray) -> bool:
    """True where enough tokens moved, of those that can: one the model is certain of stands at 0 always."""
    return bool(moved.any()) and float(moved.sum()) >= CANARY_MOST * float(uncertain.sum())
