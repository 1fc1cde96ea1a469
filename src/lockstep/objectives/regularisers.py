"""What an objective's loss is added to: the KL divergence to a reference model, and an entropy bonus.

Schulman, "Approximating KL divergence", 2020. With d = now − reference, both at the temperature that tokens
are drawn at, for a token drawn from the policy now:

    name    value              gradient at a token        of the expectation?
    k1      d                  1                          mean value yes; as a loss its gradient has mean 0
    k2      d² / 2             d                          value no; its gradient is the KL's
    k3      e^−d + d − 1       1 − e^−d                   value yes, with less variance; gradient no
    k1+     d                  d, of k2                   straight-through: k1's value, k2's gradient
    k3+     e^−d + d − 1       d, of k2                   straight-through: k3's value, k2's gradient

In the reward only the value counts.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lockstep.config.objective import KlEstimator, Objective
from lockstep.objectives.base import LossInputs


def kl(estimator: KlEstimator, now: Float[Tensor, "T"], reference: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
    """The estimate of each token, nats."""
    d = now - reference
    value = {"k1": d, "k2": d.square() / 2, "k3": torch.expm1(-d) + d}[estimator.removesuffix("+")]
    if not estimator.endswith("+"):
        return value
    slope = d.square() / 2  # the number is the estimate's, the gradient this one's
    return slope + (value - slope).detach()


def regulariser(inputs: LossInputs, objective: Objective) -> Float[Tensor, ""] | None:
    """What is added to the objective's loss; None where the recipe asks for nothing.

    By weight and not by correction: neither is an expectation under the policy that sampled.
    """
    terms = []
    if objective.kl.coef and objective.kl.place == "loss":
        assert inputs.reference_logprobs is not None
        penalty = kl(objective.kl.estimator, inputs.logprobs, inputs.reference_logprobs)
        terms.append(objective.kl.coef * inputs.uncorrected_mean(penalty))
    if objective.entropy_coef:
        assert inputs.entropy is not None
        terms.append(-objective.entropy_coef * inputs.uncorrected_mean(inputs.entropy))
    return torch.stack(terms).sum() if terms else None
