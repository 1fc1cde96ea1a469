"""How token losses become one number: the weight of each token in a minibatch. Numpy, no gradient.

Names are verl's. Of token losses {1} and {2, 2, 2}, with 4 the most that a completion may have:

    token-mean                1.75    (1 + 2 + 2 + 2) / 4                 every token alike (DAPO)
    seq-mean-token-mean       1.5     (1 + 2) / 2                         every completion alike (GRPO)
    seq-mean-token-sum        3.5     (1 + 6) / 2                         a completion is one action (RLOO)
    seq-mean-token-sum-norm   0.875   (1 + 6) / 2 / 4                     by a constant length (Dr. GRPO)

The denominator is of the minibatch's tokens in the loss, whatever a correction makes of them: one that masks
tokens takes their loss away and does not make the others count for more. verl's rejection edits its response
mask, so that there the denominator shrinks with it.
"""

import numpy as np

from lockstep.config.objective import Aggregation


def token_weights(
    loss_mask: np.ndarray, lengths: np.ndarray, aggregation: Aggregation, max_tokens: int
) -> np.ndarray:
    """The weight of each token.

    Args:
        loss_mask: bool [T]; where it is False the weight is 0. A sequence without a token in the loss has no
            share in it.
        lengths: int [S], tokens of each sequence, those outside the loss among them; they sum to T.
        max_tokens: the most that a completion may have; for ``seq-mean-token-sum-norm``.

    Returns:
        float32 [T].

    Raises:
        ValueError: when no token is in the loss.
    """
    owners = np.repeat(np.arange(len(lengths)), lengths)
    counts = np.bincount(owners, loss_mask, minlength=len(lengths))
    if not counts.any():
        raise ValueError("token weights: got no token in the loss, expected at least one")
    n_sequences = np.count_nonzero(counts)
    per_sequence = {
        "token-mean": np.full(len(counts), 1.0 / counts.sum()),
        "seq-mean-token-mean": 1.0 / (np.maximum(counts, 1) * n_sequences),
        "seq-mean-token-sum": np.full(len(counts), 1.0 / n_sequences),
        "seq-mean-token-sum-norm": np.full(len(counts), 1.0 / (n_sequences * max_tokens)),
    }[aggregation]
    return np.where(loss_mask, per_sequence[owners], 0.0).astype(np.float32)
