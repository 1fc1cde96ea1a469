"""Alarms: one sentence, with its likely layer, when a figure leaves what the certificate predicts.

A run may go wrong in ways that no gate refuses: data older than its bound, groups that teach nothing, a
policy that collapses. Each step's figures are looked at in the order of the layers, for what lies in an
earlier one explains the later; the first that is off is told, once, and again only after it has been well in
between.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lockstep.parity.tolerances import (
    ALARM_DRIFT_MULTIPLE,
    ALARM_ENTROPY_LEFT,
    ALARM_ESS,
    ALARM_FLAT_GROUPS,
    ALARM_LENGTH_LEFT,
    GATE_MEDIAN_MULTIPLE,
    NEGLIGIBLE_NATS,
    PHANTOM_CLIP_FRACTION,
)
from lockstep.records.alarms import Alarm

Figures = Mapping[str, float]


class Rule(NamedTuple):
    """What is looked at of each step."""

    name: str
    layer: str
    """Where to look, if it is off."""
    sentence_of: Callable[[Figures], str]
    """What is off; empty where nothing is."""


@dataclass(eq=False)
class Watch:
    """Looks at each step's figures.

    Args:
        gap_p50: what the ladder measured, nats, 0 of sides that agree bit for bit; None where it did not
            pass.
        ess: the mismatch ESS that it measured.
        unfelt: a median |gap| that the gate never refuses, nats.
        max_lag: the bound on a token's age, in versions.
        known_layer: of an override: the layer that is known to be broken, whatever is seen of it.
        first: figures of the run's first step, which a collapse is held against; None: of the first looked
            at.
    """

    gap_p50: float | None = None
    ess: float = 1.0
    unfelt: float = 0.0
    max_lag: int = 0
    known_layer: str = ""
    first: Figures | None = None
    _told: str = ""

    def look(self, step: int, figures: Figures) -> Alarm | None:
        """The alarm of a step, if it has one that was not told for the step before."""
        if self.first is None:
            self.first = dict(figures)
        for name, layer, sentence_of in self._rules():
            sentence = sentence_of(figures)
            if sentence:
                known = name == self._told
                self._told = name
                return None if known else Alarm(step=step, name=name, layer=layer, sentence=sentence)
        self._told = ""
        return None

    def _rules(self) -> tuple[Rule, ...]:
        return (
            Rule("mismatch", self.known_layer or "weights", self._mismatch),
            Rule("gap drift", "numerics", self._drift),
            Rule("lag", "objective", self._lag),
            Rule("flat groups", "task", self._flat),
            Rule("entropy collapse", "objective", self._entropy),
            Rule("length collapse", "task", self._length),
        )

    def _mismatch(self, figures: Figures) -> str:
        ess = figures.get("mismatch_ess", 1.0)
        phantom = figures.get("phantom_clip_fraction", 0.0)
        least = min(ALARM_ESS, 1.0 - ALARM_DRIFT_MULTIPLE**2 * (1.0 - self.ess))
        if ess >= least and phantom <= PHANTOM_CLIP_FRACTION:
            return ""
        ratio, gap = (figures.get(name, math.nan) for name in ("mismatch_ratio_mean", "gap_abs_p50_nats"))
        return (
            f"engine and trainer are not the same policy: mismatch ESS {ess:.3f}, mean ratio {ratio:.3f}, "
            f"{phantom:.1%} of the tokens clipped for the mismatch alone, |gap| p50 {gap:.1e} nats"
        )

    def _drift(self, figures: Figures) -> str:
        if self.gap_p50 is None:
            return ""
        now = figures.get("gap_abs_p50_nats", 0.0)
        least = max(self.gap_p50, self.unfelt / GATE_MEDIAN_MULTIPLE)
        limit = max(ALARM_DRIFT_MULTIPLE * least, NEGLIGIBLE_NATS)
        if now <= limit:
            return ""
        drifts = f"the gap drifts: |gap| p50 {now:.1e} nats, the ladder measured {self.gap_p50:.1e}"
        fresh = figures.get("lag_0_gap_abs_p50_nats")
        if fresh is None:
            return drifts
        where = (
            "so the two sides differ now"
            if fresh > limit
            else "so it is what earlier versions drew that is scored otherwise than it was drawn"
        )
        return f"{drifts}; where nothing is stale {fresh:.1e}, {where}"

    def _lag(self, figures: Figures) -> str:
        mean = figures.get("lag_steps", 0.0)
        oldest = figures.get("lag_max_steps", mean)
        if oldest <= self.max_lag:
            return ""
        told = f"up to {oldest:.0f}" if "lag_max_steps" in figures else f"on average {mean:.2f}"
        return f"tokens are {told} versions old, at most {self.max_lag}"

    def _flat(self, figures: Figures) -> str:
        flat = figures.get("flat_group_fraction", 0.0)
        if flat < ALARM_FLAT_GROUPS:
            return ""
        reward = figures.get("reward_mean", math.nan)
        return f"{flat:.0%} of the groups have equal rewards and teach nothing; mean reward {reward:.3f}"

    def _entropy(self, figures: Figures) -> str:
        return self._fell(figures, "entropy_mean_nats", ALARM_ENTROPY_LEFT, "entropy")

    def _length(self, figures: Figures) -> str:
        return self._fell(figures, "completion_tokens_mean", ALARM_LENGTH_LEFT, "mean length")

    def _fell(self, figures: Figures, name: str, left: float, said: str) -> str:
        assert self.first is not None
        first = self.first.get(name)
        now = figures.get(name)
        if first is None or now is None or now >= left * first:
            return ""
        return f"{said} has fallen from {first:.3g} to {now:.3g}"
