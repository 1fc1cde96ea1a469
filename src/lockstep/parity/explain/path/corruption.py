"""Layer 2: completions whose tokens the model finds absurd while the engine was sure of them.

Two engine bugs met by AI21 under RL with Jamba looked like this: a request reads another's recurrent state,
and one completion in a thousand is confident gibberish. Means and medians do not see it; the completions are
found one by one and shown.
"""

from dataclasses import dataclass

import numpy as np

from lockstep.parity.pair import Pair
from lockstep.parity.tolerances import ABSURD_NATS, CORRUPTED_AT_MOST
from lockstep.records.samples import Samples

SHOWN = 2
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Corrupted:
    """Completions that hold tokens which the re-scores find absurd."""

    rows: list[int]
    n_rows: int
    n_tokens: int
    text: str
    """What the worst of them reads as; escaped, for it comes from a model."""

    def evidence(self) -> str:
        """What is corrupt and where, in words."""
        return (
            f"{len(self.rows)} of {self.n_rows} completions hold {self.n_tokens} tokens "
            "that the engine drew with confidence and "
            f"that a re-score finds less likely by {ABSURD_NATS:g} nats or more: {self.text}"
        )


def corrupted(pair: Pair, sample: Samples, other: np.ndarray) -> Corrupted | None:
    """Completions with absurd tokens, where they are a minority and the others agree.

    Most rows being off is another cause.

    Args:
        other: score B (or C) of the sample's tokens, float32 [T].
    """
    absurd = sample.engine_logprobs - other > ABSURD_NATS  # a NaN is not: it fails the comparison it is in
    rows = np.unique(sample.owners[absurd]).tolist()
    if not rows or len(rows) > CORRUPTED_AT_MOST * len(sample):
        return None
    rest = np.abs(sample.engine_logprobs - other)[~np.isin(sample.owners, rows)]
    if not np.median(rest) <= pair.noise.p50:
        return None
    shown = [_text(pair, sample[row].token_ids) for row in rows[:SHOWN]]
    return Corrupted(rows, len(sample), int(absurd.sum()), ", ".join(shown))


def _text(pair: Pair, token_ids: np.ndarray) -> str:
    text = pair.renderer.text(token_ids)
    return ascii(text[:SHOWN_CHARACTERS])
