"""What goes into an objective and what comes out.

An objective is a pure function of one microbatch: ``function(inputs, **options)`` → :class:`LossOutputs`. It
is called once a microbatch and knows nothing of models, optimizers or files. ``registry.py`` says which there
are.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class LossInputs:
    """The tokens of one microbatch, flat: whole sequences, one after the other.

    A token that the model did not sample (``loss_mask`` False) has weight and advantage 0, and the trainer's
    own number in the place of the engine's, so that nothing there can reach a sum.
    """

    logprobs: Float[Tensor, "T"]
    """The trainer's, under the weights now; with ``entropy`` and ``values`` what has a gradient; nats."""
    old_logprobs: Float[Tensor, "T"]
    """Denominator of the policy ratio: one of the next two, as ``objective.old_logprobs`` says."""
    engine_logprobs: Float[Tensor, "T"]
    """As the engine reported them, under the weights that sampled; nats."""
    sampling_logprobs: Float[Tensor, "T"]
    """The trainer's, under the weights that sampled; nats."""
    step_logprobs: Float[Tensor, "T"]
    """The trainer's, under the weights that the step began with; at lag 0 those of ``sampling_logprobs``."""
    advantages: Float[Tensor, "T"]
    token_weights: Float[Tensor, "T"]
    """The share of each token in the loss of the *whole* minibatch, as ``objective.aggregation`` says, so
    that the losses of its microbatches add up. Of the two that are means they sum to 1."""
    corrections: Float[Tensor, "T"]
    """What ``objective.correction`` makes of each token for the mismatch of engine and trainer; else 1."""
    loss_mask: Bool[Tensor, "T"]
    """True where the model sampled the token."""
    sequence_ids: Int[Tensor, "T"]
    """The minibatch's sequence that each token is of. Ascending; a microbatch holds some of them whole."""
    entropy: Float[Tensor, "T"] | None = None
    """Entropy of the tempered distribution over the whole vocabulary, differentiable, nats."""
    reference_logprobs: Float[Tensor, "T"] | None = None
    """A frozen reference model's, at the same temperature, nats; there for objectives that need them."""
    values: Float[Tensor, "T"] | None = None
    """A value head's, differentiable; there for objectives that need them."""
    old_values: Float[Tensor, "T"] | None = None
    """The value head's when the step began."""
    returns: Float[Tensor, "T"] | None = None
    """What ``values`` are to become: advantage plus old value."""
    pairs: Int[Tensor, "P 2"] | None = None
    """Chosen and rejected sequence of each pair, by ``sequence_ids``; both are in this microbatch."""
    pair_weight: float = 0.0
    """A pair's share in the loss of the minibatch: 1 over how many pairs that has."""

    @property
    def log_mismatch(self) -> Float[Tensor, "T"]:
        """The gap, trainer − engine, under the weights that sampled; 0 where none was sampled; nats."""
        return self.sampling_logprobs - self.engine_logprobs

    def mean(self, per_token: Float[Tensor, "T"]) -> Float[Tensor, ""]:
        """The mean over the minibatch's tokens, by weight and correction; this microbatch's share of it."""
        return (self.token_weights * self.corrections * per_token).sum()

    def uncorrected_mean(self, per_token: Float[Tensor, "T"]) -> Float[Tensor, ""]:
        """The same by weight alone: for what is no expectation under the policy that sampled."""
        return (self.token_weights * per_token).sum()

    def sum_of_sequences(self, per_token: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
        """The sum over each sequence's sampled tokens, at every token of it."""
        return self.of_each_sequence(per_token)[self._places]

    def mean_of_sequences(self, per_token: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
        """The mean over each sequence's sampled tokens, at every token of it."""
        counts = self.sum_of_sequences(torch.ones_like(per_token))
        # Where nothing of a sequence was sampled, 0 of 1.
        return self.sum_of_sequences(per_token) / counts.clamp(min=1.0)

    def of_each_sequence(self, per_token: Float[Tensor, "T"]) -> Float[Tensor, "S"]:
        """The sum over each sequence's sampled tokens, one number a sequence of this microbatch."""
        places = self._places
        sums = per_token.new_zeros(int(places[-1]) + 1 if places.numel() else 0)
        return sums.index_add(0, places, per_token * self.loss_mask)

    def places_of(self, sequences: Int[Tensor, "P 2"]) -> Int[Tensor, "P 2"]:
        """Where each of these ``sequence_ids`` stands in :meth:`of_each_sequence`."""
        return torch.searchsorted(torch.unique_consecutive(self.sequence_ids), sequences)

    @property
    def _places(self) -> Int[Tensor, "T"]:
        """The microbatch's own number of each token's sequence, from 0."""
        return torch.unique_consecutive(self.sequence_ids, return_inverse=True)[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class LossOutputs:
    """The loss and what it did to each token."""

    loss: Float[Tensor, ""]
    """This microbatch's share; those of a minibatch are added up."""
    clipped: Bool[Tensor, "T"]
    """Tokens whose gradient the objective removed."""
    value_loss: Float[Tensor, ""] | None = None
    """The value head's part of ``loss``; for the figures."""
    margins: Float[Tensor, "P"] | None = None
    """How much further the chosen of each pair has moved up than the rejected, nats; for the figures."""


def truncated(weight: Float[Tensor, "T"], low: float, high: float) -> Float[Tensor, "T"]:
    """A ratio as a weight: held in [low, high], without a gradient."""
    return weight.detach().clamp(low, high)
