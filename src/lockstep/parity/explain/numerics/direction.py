"""One way in which an engine may depart from the trainer, and those ways that are of tensors.

A fault in part of the rows, or of the tokens, is a direction times an indicator: ``Direction.only``.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from lockstep.policy.parameters import in_layer
from lockstep.policy.pulls import Pulls
from lockstep.policy.variants import QUANTISED
from lockstep.records.samples import Samples

SCALED = "scaled"
WHOLE = "every layer"
ATTENTION = "attention scores"
"""They are scaled as the queries are, and so are all queries' tensors together."""
QUERIES = re.compile(r"self_attn\.(q_norm\.weight|q_proj\.(weight|bias))$")
FUSED = {
    "self_attn.qkv": re.compile(r"self_attn\.[qkv]_proj\."),
    "mlp.gate_up": re.compile(r"mlp\.(gate|up)_proj\."),
}
"""What engines hold as one tensor, and so lose, scale or round as one."""
LONG_PROMPTS, LONG_COMPLETIONS = "in rows of long prompts", "in rows of long completions"
FIRST_TOKENS, LATE_TOKENS = "at first tokens", "in the later half"


@dataclass(frozen=True)
class Direction:
    """One way in which the engine may depart from the trainer."""

    family: str
    """``scaled``, a quantiser's form, or a family of ``by_token.py``."""
    tensors: tuple[str, ...] = ()
    place: str = ""
    """The tensor, the fused tensors, the layer, or ``every layer``."""
    only: str = ""
    """Which rows or tokens it acts on; empty for all."""

    def describe(self) -> str:
        """The direction in words."""
        return " ".join(part for part in (self.place, self.family, self.only) if part)


def row_classes(sample: Samples) -> dict[str, np.ndarray]:
    """The rows that a part of the rows may be, bool [S] each; a class of none or of all is left out."""
    prompts = np.array([len(prompt) for prompt in sample.prompts])
    completions = sample.lengths
    classes = {
        LONG_PROMPTS: prompts > np.median(prompts),
        LONG_COMPLETIONS: completions > np.median(completions),
    }
    return {name: rows for name, rows in classes.items() if rows.any()}


def token_classes(sample: Samples) -> dict[str, np.ndarray]:
    """The tokens that a part of the tokens may be, bool [T] each, those of a class of rows among them."""
    of_rows = {name: rows[sample.owners] for name, rows in row_classes(sample).items()}
    late = sample.positions > (sample.lengths[sample.owners] - 1) / 2
    classes = {FIRST_TOKENS: sample.positions == 0, LATE_TOKENS: late}
    return of_rows | {name: tokens for name, tokens in classes.items() if tokens.any() and not tokens.all()}


def rounding(form: str) -> Callable[[str, Tensor], Tensor | None]:
    """What a quantiser does to a matrix of the layers; None for what quantisers leave."""

    def direction(name: str, parameter: Tensor) -> Tensor | None:
        if parameter.dim() != 2 or in_layer(name) is None:
            return None
        return QUANTISED[form](parameter) - parameter

    return direction


def prompt_numbers(prompts: Iterable[np.ndarray]) -> np.ndarray:
    """A number for each prompt, equal for equal ones, int [S]: what follows one prompt rounds alike."""
    known: dict[bytes, int] = {}
    return np.array([known.setdefault(prompt.tobytes(), len(known)) for prompt in prompts])


def of_tensors(pulled: Pulls) -> Iterator[tuple[Direction, np.ndarray]]:
    """The direction of each tensor, and of those that go together, with every group's pull, float64 [G]."""
    together: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, (family, name) in enumerate(pulled.names):
        yield Direction(family, (name,), _place(name)), pulled.sums[row]
        for place in _groups(family, name):
            together[family, place].append(row)
    for (family, place), rows in together.items():
        if len(rows) > 1:
            names = tuple(pulled.names[row][1] for row in rows)
            yield Direction(family, names, place), pulled.sums[rows].sum(0)


def in_rows(
    found: list[tuple[Direction, np.ndarray]], sample: Samples
) -> Iterator[tuple[Direction, np.ndarray]]:
    """The scales among them, in a class of rows alone."""
    for only, rows in row_classes(sample).items():
        for direction, sums in found:
            if direction.family == SCALED:
                yield replace(direction, only=only), sums * rows


def _place(name: str) -> str:
    return name.removeprefix("model.").removesuffix(".weight")


def _groups(family: str, name: str) -> Iterator[str]:
    """What a tensor is a part of."""
    at = in_layer(name)
    if at is None:
        return
    yield f"layer {at.layer}"
    yield WHOLE
    for fused, pattern in FUSED.items():
        if pattern.search(name):
            yield f"layers.{at.layer}.{fused}"
    queries = QUERIES.search(name)
    # A norm behind the projection takes the projection's own scale away.
    if family == SCALED and queries is not None:
        yield f"{ATTENTION} ({queries[1].partition('.')[0]})"
