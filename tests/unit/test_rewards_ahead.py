"""Rewards that are computed before their step: there when it begins, and asked for again where one failed."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from lockstep.errors import RewardError
from lockstep.records.samples import Sample
from lockstep.rollout.rewards_ahead import RewardsAhead


def sample(number):
    return Sample(
        group=0, sample=number, item=3, prompt_ids=np.zeros(1, np.int32), token_ids=np.zeros(1, np.int32),
        loss_mask=np.ones(1, bool), engine_logprobs=np.zeros(1, np.float32), version_spans=(),
        finish_reason="stop", text=f"answer {number}",
    )  # fmt: skip


class Task:
    parts = ()
    environments = None

    def __init__(self, workers, fails=False):
        self.config = SimpleNamespace(reward_workers=workers)
        self.fails = fails
        self.threads = []

    def item(self, number):
        return {"question": number}

    def rewards(self, texts, items):
        self.threads.append(threading.current_thread())
        if self.fails:
            raise RewardError("reward", got="none", expected="one", hint="none")
        return iter([float(text[-1]) for text in texts])


GROUP = [sample(0), sample(1)]


def test_a_groups_rewards_are_computed_in_another_thread_and_are_there_when_it_is_taken():
    task = Task(workers=1)
    ahead = RewardsAhead(task)
    ahead.begin(7, GROUP)
    assert [s.reward for s in ahead.rewards(7, GROUP)] == [0.0, 1.0]
    assert threading.current_thread() not in task.threads
    ahead.close()


@pytest.mark.parametrize(("workers", "fails"), [(0, False), (1, True)], ids=["no processes", "one fails"])
def test_where_none_can_be_had_before_the_step_asks_for_them_itself(workers, fails):
    ahead = RewardsAhead(Task(workers, fails))
    ahead.begin(7, GROUP)
    assert all(np.isnan(s.reward) for s in ahead.rewards(7, GROUP))
    ahead.close()


def test_after_its_end_it_begins_again():
    ahead = RewardsAhead(Task(workers=1))
    ahead.begin(1, GROUP)
    ahead.close()
    ahead.begin(2, GROUP)
    assert [s.reward for s in ahead.rewards(2, GROUP)] == [0.0, 1.0]
    ahead.close()
