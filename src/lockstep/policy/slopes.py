"""Derivatives of single log-probabilities against whole parameters: one backward pass for each token.

Of many tokens at once, and of directions nobody has named yet, ``pulls.py`` has the sums from one pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lockstep.policy.model import Policy
from lockstep.policy.parameters import Snapshot, parameters_of, whole
from lockstep.records.samples import Group


@dataclass(frozen=True)
class Slope:
    """One token's log-probability against every parameter at once."""

    token: int
    """Its place among all tokens that were asked about."""
    moves: np.ndarray
    """⟨∂ log p / ∂W, D⟩ for each parameter W and its direction D, nats, float64 [names]."""


def slopes(
    policy: Policy,
    groups: Sequence[Group],
    tokens: Int[np.ndarray, "N"],
    temperature: float,
    names: Sequence[str],
    towards: Snapshot | None,
    before_each: Callable[[], None],
) -> list[Slope]:
    """Computes :meth:`Trainer.slopes`."""
    parameters = parameters_of(policy.model)
    chosen = [parameters[name] for name in names]
    moves = [whole(p.detach()).float() for p in chosen]
    if towards is not None:
        moves = [(towards.values[name] - whole(parameters[name].detach())).float() for name in names]
    starts = np.r_[0, np.cumsum([len(group.completions[0]) for group in groups])]
    owners = np.searchsorted(starts, tokens, side="right") - 1
    found = []
    with torch.enable_grad(), _requiring_grad(chosen):
        for number in sorted(set(owners.tolist())):
            # One row, however long, for the whole completion: its tokens share the forward pass, and each
            # has a backward pass of its own.
            (row,) = policy.rows([groups[number]], 1 << 20)
            logprobs = policy.scores(row.to(policy.device), temperature).logprobs
            for token in tokens[owners == number].tolist():
                before_each()
                at = logprobs[token - int(starts[number])]
                # Unused: a parameter that this token's number does not depend on, an expert that was not
                # chosen.
                grads = torch.autograd.grad(at, chosen, retain_graph=True, allow_unused=True)
                products = [
                    0.0 if g is None else float((whole(g).float() * m).sum())
                    for g, m in zip(grads, moves, strict=True)
                ]
                found.append(Slope(token, np.array(products)))
    return found


@contextmanager
def _requiring_grad(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Frozen parameters have gradients too until the context ends: an engine may hold any of them wrong."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
