"""A value head: what the policy expects of a state, from the hidden state that predicts the next token."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ValueHead(nn.Module):
    """One linear map of the last hidden state, fp32; 0 everywhere before it has learned.

    It is no part of the model: not published to an engine, not among a checkpoint's weights.

    Args:
        width: D, of the hidden states.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, device=device))
        self.bias = nn.Parameter(torch.zeros((), device=device))

    def forward(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T"]:
        """The value of each state. Its gradient goes into the head alone."""
        return hidden.detach().float() @ self.weight + self.bias
