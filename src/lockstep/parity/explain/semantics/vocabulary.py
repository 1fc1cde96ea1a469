"""Layer 1 of a log: ids of another vocabulary, which has a few tokens more or fewer below some id.

A token added in the middle moves every id above it. Prompts and completions are both told in such ids, so
that next to no number is right. Which ids are moved is fitted: the nearer the id from which they are, the
more tokens are read as they were drawn.
"""

from collections.abc import Callable

import numpy as np

from lockstep.parity.explain.rows import Explanation
from lockstep.parity.pair import Pair
from lockstep.parity.search import keep_looking
from lockstep.parity.search_tolerances import MOVE_IMPROVES, MOVED_AT_LEAST_NATS, TOKEN_AT_MOST_NATS
from lockstep.records.samples import Group, Samples

MOVES = (1, -1, 2, -2)
ROWS, TOKENS = 4, 32
"""Rows, and tokens of each, on which a move is tried: there are some dozens of moves, with a pass each."""
PLACES = 12
"""Ids from which the others may be moved that are tried before the best is looked at more closely."""


def moved_ids(pair: Pair, few: Samples) -> Explanation | None:
    """The move under which the trainer agrees with the numbers, and the id from which it is."""
    groups = [Group(group.prompt, [group.completions[0][:TOKENS]]) for group in few.groups[:ROWS]]
    engine = np.concatenate([few.engine_logprobs[few.owners == row][:TOKENS] for row in range(len(groups))])
    every = np.concatenate([part for group in groups for part in (group.prompt, group.completions[0])])
    used = np.unique(every)
    largest = pair.trainer.vocabulary

    def gap(move: int, at: int) -> np.ndarray:
        """|trainer − engine| when ids from ``used[at]`` on are read as moved."""

        def read(ids: np.ndarray) -> np.ndarray:
            return np.clip(np.where(ids >= used[at], ids - move, ids), 0, largest - 1).astype(np.int32)

        keep_looking()
        moved = [Group(read(group.prompt), [read(group.completions[0])]) for group in groups]
        return np.abs(np.concatenate(pair.trainer.score(moved, few.temperature)) - engine)

    now = float(np.minimum(gap(0, 0), TOKEN_AT_MOST_NATS).mean())  # a move by 0: the ids as they are
    if now < MOVED_AT_LEAST_NATS:
        return None
    places = np.unique(
        np.searchsorted(used, np.quantile(every, np.linspace(0.0, 1.0, PLACES), method="lower"))
    )
    for move in MOVES:
        at = _fitted(
            lambda at, move=move: float(np.minimum(gap(move, at), TOKEN_AT_MOST_NATS).mean()),
            places.tolist(),
            MOVE_IMPROVES * now,
        )
        left = float("inf") if at is None else float(np.median(gap(move, at)))
        if at is not None and left <= pair.noise.p50:
            read = f"ids from {used[at]} on read as {abs(move)} {'less' if move > 0 else 'more'}"
            return Explanation("vocabulary_shifted", f"with {read} the trainer agrees to {left:.1e} nats")
    return None


def _fitted(miss: Callable[[int], float], places: list[int], enough: float) -> int | None:
    """The place of the least miss: the best of a few, then halving the steps to its neighbours."""
    known = {at: miss(at) for at in places}
    best = min(known, key=lambda at: known[at])
    if not known[best] < enough:
        return None
    order = sorted(known)
    at_best = order.index(best)
    step = max(order[min(at_best + 1, len(order) - 1)] - best, best - order[max(at_best - 1, 0)])
    while step > 1:
        step = (step + 1) // 2
        for at in (best - step, best + step):
            if order[0] <= at <= order[-1] and at not in known:
                known[at] = miss(at)
        best = min((at for at in (best - step, best, best + step) if at in known), key=lambda at: known[at])
    return best
