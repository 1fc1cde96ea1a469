"""Loss inputs by hand."""

import torch

from lockstep.objectives.base import LossInputs


def inputs_of(now, old, advantages, **others):
    """Tokens of one sequence, all of them sampled, with the same weight and no correction."""
    given = {
        "engine_logprobs": old,
        "sampling_logprobs": old,
        "step_logprobs": old,
        "token_weights": torch.full_like(old, 1.0 / len(old)),
        "corrections": torch.ones_like(old),
        "loss_mask": torch.ones_like(old, dtype=torch.bool),
        "sequence_ids": torch.zeros_like(old, dtype=torch.int64),
    }
    return LossInputs(logprobs=now, old_logprobs=old, advantages=advantages, **(given | others))
