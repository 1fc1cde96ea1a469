"""What goes into an objective and what comes out.

An objective is a pure function of one microbatch: ``function(inputs, **options)`` → :class:`LossOutputs`. It
is called once a microbatch and knows nothing of models, optimizers or files. ``registry.py`` says which there
are.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class LossInputs:
    """The tokens of one microbatch, flat: whole sequences, one after the other.

    A token that the model did not sample (``loss_mask`` False) has weight and advantage 0, and the trainer's
    own number in the place of the engine's, so that nothing there can reach a sum.
    """

    logprobs: Float[Tensor, "T"]
    """The trainer's, under the weights now; the one field with a gradient; nats."""
    old_logprobs: Float[Tensor, "T"]
    """Denominator of the policy ratio: one of the next two, as ``objective.old_logprobs`` says."""
    engine_logprobs: Float[Tensor, "T"]
    """As the engine reported them, under the weights that sampled; nats."""
    sampling_logprobs: Float[Tensor, "T"]
    """The trainer's, under the weights that sampled; nats."""
    advantages: Float[Tensor, "T"]
    token_weights: Float[Tensor, "T"]
    """Sum to 1 over the *whole* minibatch, so that the losses of its microbatches add up."""
    corrections: Float[Tensor, "T"]
    """What ``objective.correction`` makes of each token for the mismatch of engine and trainer; else 1."""
    loss_mask: Bool[Tensor, "T"]
    """True where the model sampled the token."""
    sequence_ids: Int[Tensor, "T"]
    """The minibatch's sequence that each token is of. Ascending; a microbatch holds some of them whole."""
    reference_logprobs: Float[Tensor, "T"] | None = None
    """A frozen reference model's, nats; there for objectives that need them."""
    values: Float[Tensor, "T"] | None = None
    """A value head's, differentiable; there for objectives that need them."""

    def mean(self, per_token: Float[Tensor, "T"]) -> Float[Tensor, ""]:
        """The mean over the minibatch's tokens, by weight and correction; this microbatch's share of it."""
        return (self.token_weights * self.corrections * per_token).sum()


@dataclass(frozen=True, eq=False)
class LossOutputs:
    """The loss and what it did to each token."""

    loss: Float[Tensor, ""]
    """This microbatch's share; those of a minibatch are added up."""
    clipped: Bool[Tensor, "T"]
    """Tokens whose gradient the objective removed."""
