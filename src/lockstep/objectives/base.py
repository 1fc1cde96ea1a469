"""What goes into an objective and what comes out."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LossInputs:
    """Tokens of one microbatch, flat.

    ``token_weights`` carries the normalisation over the *whole* minibatch, so that the losses of its microbatches add up.
    """

    trainer_logprobs: Float[Tensor, "T"]
    """Under the weights now; differentiable; nats."""
    old_logprobs: Float[Tensor, "T"]
    """Under the weights that sampled; no gradient; nats."""
    advantages: Float[Tensor, "T"]
    """Of the completion each token belongs to."""
    token_weights: Float[Tensor, "T"]
    """Sum to 1 over a minibatch."""


@dataclass(frozen=True, eq=False)
class LossOutputs:
    """The loss and what it did to each token."""

    loss: Float[Tensor, ""]
    clipped: Bool[Tensor, "T"]
    """Tokens whose gradient the clip removed."""
