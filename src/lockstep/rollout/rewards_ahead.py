"""Rewards of groups that wait for their step, computed while the trainer trains.

    rollout thread    a group ends ─► begin() ──► [one thread] ──► processes of task.reward_workers
    trainer's thread  takes the step's groups ─► rewards() ◄────────────┘

Only where rewards have processes of their own: what computes in the trainer's process is interrupted at its
deadline in the trainer's thread alone. A reward that fails here is asked for again there, and is told there.
"""

import contextlib
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property

from lockstep.errors import UsageError
from lockstep.records.samples import Sample
from lockstep.rollout.tasks import Task


class RewardsAhead:
    """The rewards of one task's groups, computed in a thread beside what else goes on."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._can = bool(task.config.reward_workers and not task.parts and task.environments is None)
        self._begun: dict[int, Future[list[float]]] = {}

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "rewards-ahead")

    def begin(self, group: int, samples: Sequence[Sample]) -> None:
        """Compute a group's rewards from now on, where they can be."""
        if self._can:
            items = [self._task.item(sample.item) for sample in samples]
            texts = [sample.text for sample in samples]
            self._begun[group] = self._thread.submit(lambda: list(self._task.rewards(texts, items)))

    def rewards(self, group: int, samples: Sequence[Sample]) -> list[Sample]:
        """The group with its rewards; without them where none were begun, or one failed."""
        begun = self._begun.pop(group, None)
        if begun is not None:
            with contextlib.suppress(UsageError, CancelledError):
                rewards = zip(samples, begun.result(), strict=True)
                return [replace(sample, reward=reward) for sample, reward in rewards]
        return list(samples)

    def forget(self, group: int) -> None:
        """A group is not trained on: nobody asks for its rewards."""
        if begun := self._begun.pop(group, None):
            begun.cancel()

    def close(self) -> None:
        """What has not begun is given up."""
        if "_thread" in self.__dict__:
            self._thread.shutdown(wait=False, cancel_futures=True)
            del self._thread
