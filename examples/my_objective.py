"""An objective of your own: CISPO, the clipped importance weight of MiniMax-M1 (arXiv:2506.13585, eq. 4).

    PYTHONPATH=examples lockstep train recipes/quickstart.toml \\
        --set objective.name=my_objective:cispo --set objective.options.high=0.28

GRPO drops a token from the gradient once its ratio leaves the clip range. CISPO keeps every token: the ratio
is only a weight, held below a cap and without a gradient of its own, on plain REINFORCE:

    loss = − Σ_t w_t · sg(min(r_t, 1 + high)) · A_t · log π(t)
    r_t = exp(log π − log π_old), sg: no gradient

docs/guides/your-own-objective.md says what the inputs hold and what is checked.
"""

import torch

from lockstep.objectives.base import LossInputs, LossOutputs


def cispo(inputs: LossInputs, *, high: float = 0.28) -> LossOutputs:
    """The loss of one microbatch.

    Args:
        high: how far above 1 a ratio may weigh. ``[objective.options]`` of the recipe is passed here by name.
    """
    # Everything is flat, [T]: all tokens of some whole sequences. Only `logprobs` carries a gradient.
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs).detach()
    weight = ratio.clamp(max=1.0 + high)
    surrogate = weight * inputs.advantages * inputs.logprobs
    # `mean` is Σ token_weights · corrections · x: the tokens that a tool put there weigh 0, and the shares of
    # a minibatch's microbatches add up. A sum of your own has to take both factors in.
    loss = -inputs.mean(surrogate)
    # `clipped` is a figure, clip_fraction: tokens without a gradient. CISPO leaves none out.
    return LossOutputs(loss=loss, clipped=torch.zeros_like(inputs.loss_mask))
