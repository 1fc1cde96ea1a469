"""Weights moved far on purpose, so that what does not arrive shows."""

from lockstep.parity.pair import Pair
from lockstep.policy.variants import Perturbed

PROBE_VERSION = 10**9
"""Version number of perturbed weights: no training run counts as far."""


def perturbed(pair: Pair) -> Perturbed:
    """Noise on every parameter of the trainer, large against what arithmetic brings."""
    return Perturbed(pair.trainer.snapshot(), pair.noise.perturbation, pair.seed)
