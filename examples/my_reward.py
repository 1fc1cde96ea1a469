"""A reward of your own: 1 for the right number, a part of it for one that is near, 0 for no number at all.

    PYTHONPATH=examples lockstep train recipes/quickstart.toml --set task.reward=my_reward:near

A reward is a function of the completion's text and of the task's item, which holds at least ``question`` and
``answer``. It must return a finite number: what it raises, NaN, or no answer within ``task.reward_timeout_s``
ends the run with the completion shown, and ``lockstep train --resume`` goes on from there.
``task.reward_workers = 2`` gives it processes of its own, so that not even a crash in C takes the trainer
with it.
"""

import re
from collections.abc import Mapping
from typing import Any

NUMBER = re.compile(r"-?\d+")


def near(completion: str, item: Mapping[str, Any]) -> float:
    """1 / (1 + distance) of the first number in the completion from the answer."""
    # A graded reward tells samples of one group apart where exact match calls them all wrong: a group whose
    # rewards are all alike has no advantage, and teaches nothing (flat_group_fraction counts them).
    found = NUMBER.search(completion)
    if found is None:
        return 0.0
    return 1.0 / (1.0 + abs(int(found.group()) - int(item["answer"])))
