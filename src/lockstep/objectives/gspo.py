"""GSPO: the clipped surrogate with one ratio for a whole sequence.

Zheng et al., "Group Sequence Policy Optimization", 2025, arXiv:2507.18071, eq. 5 and 7. The ratio is the
geometric mean of the tokens' ratios, s = exp(mean_t(now − old)): a sequence is clipped whole or not at all.
It moves far less than a token's, so the range is far narrower than GRPO's.

The gradient goes through each token's own log-probability (the paper's GSPO-token, eq. 14, which has GSPO's
value and gradient where a sequence's advantages are alike), so that each aggregation applies:
``seq-mean-token-mean`` is the paper's.
"""

import torch

from lockstep.objectives.base import LossInputs, LossOutputs


def gspo(inputs: LossInputs, *, low: float, high: float) -> LossOutputs:
    """``−Σ w · min(s·A, clip(s, 1 − low, 1 + high)·A)``, s the sequence's ratio."""
    log_ratio = inputs.logprobs - inputs.old_logprobs
    sequence = torch.exp(inputs.mean_of_sequences(log_ratio.detach()))
    ratio = sequence * torch.exp(inputs.logprobs - inputs.logprobs.detach())
    free = ratio * inputs.advantages
    held = ratio.clamp(1.0 - low, 1.0 + high) * inputs.advantages
    return LossOutputs(loss=-inputs.mean(torch.minimum(free, held)), clipped=(held < free).detach())
