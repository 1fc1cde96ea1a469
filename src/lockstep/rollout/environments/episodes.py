"""Conversations with environments, drawn side by side: each goes on as soon as its own turn has ended.

    submit ─► a turn ends ─► its text ─► tools ─► their answers behind the row ─► submit the next turn
                                │ none called, no turn or no room left
                                └► over: get_reward()

Samples of one question whose rows are alike to the last token are one request, as a question's first turns
are: an engine computes what they share once.
"""

import contextlib
import math
import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from msgspec.structs import replace

from lockstep.config.recipe import Recipe
from lockstep.engines.base import Engine
from lockstep.engines.streaming import Handle
from lockstep.errors import EngineError, EnvironmentFault
from lockstep.records.samples import Sample
from lockstep.records.tokens import INT32, Completion, SamplingParams
from lockstep.rendering import Renderer
from lockstep.rollout.empty import refuse_empty
from lockstep.rollout.environments.protocol import Environments
from lockstep.rollout.environments.row import Row
from lockstep.rollout.rewards import Item, refused
from lockstep.rollout.tasks import Task


@dataclass(eq=False)
class Episode:
    """One sample's conversation."""

    group: int
    number: int
    """The sample's number within its group."""
    item_number: int
    environment: Any
    row: Row
    messages: list[dict[str, str]]
    answer: str = ""
    """The text of the model's last turn."""
    turns: int = 0
    calls: int = 0
    in_vain: int = 0


@dataclass(frozen=True)
class EpisodeContext:
    """What every conversation of a step is held by."""

    engine: Engine
    task: Task
    renderer: Renderer
    recipe: Recipe

    @property
    def environments(self) -> Environments:
        """The task's environments."""
        assert self.task.environments is not None
        return self.task.environments

    def begun(self, group: int, item_number: int, n: int) -> list[Episode]:
        """A question's conversations, before the model's first turn.

        Raises:
            EnvironmentFault: where they begin differently: samples of a group answer one question.
        """
        item = self.task.item(item_number)
        objects = [self.environments.made() for _ in range(n)]
        said = [str(self.environments.call(one.reset, **item) or "") for one in objects]
        if len(set(said)) > 1:
            raise EnvironmentFault(
                f"environment {self.environments.name}, reset",
                got=f"for question {item_number} {said[0]!r}, and {next(s for s in said if s != said[0])!r}",
                expected="the same of every sample of a group: their rewards are compared with each other",
                hint="make what is random in it a function of the item",
            )
        messages = self.task.messages(item, said[0])
        prompt = self.renderer.prompt(messages)
        return [
            Episode(group, number, item_number, one, Row(prompt), list(messages))
            for number, one in enumerate(objects)
        ]

    def heard(self, episode: Episode, completion: Completion) -> bool:
        """The model's turn; True where another is to follow."""
        episode.row.sampled(completion)
        episode.answer = text = self.renderer.text(np.frombuffer(completion.token_ids, INT32))
        episode.turns += 1
        if completion.finish_reason != "stop":  # cut off: a call that may be in it is not carried out
            return False
        said, in_vain = self.environments.answers(episode.environment, text)
        if not said:
            return False
        episode.calls += len(said)
        episode.in_vain += in_vain
        episode.messages += [
            {"role": "assistant", "content": text},
            *({"role": "tool", "content": one} for one in said),
        ]
        over = bool(getattr(episode.environment, "done", False))
        if over or episode.turns == self.recipe.task.max_turns:
            return False
        whole = self._next_prompt(episode, episode.messages[-len(said) :])
        # A turn that might have no room to end is not begun.
        if len(whole) + self.recipe.sampling.max_tokens > self.recipe.engine.max_model_len:
            return False
        episode.row.continued(whole, f"environment {self.environments.name}, next_prompt")
        return True

    def _next_prompt(self, episode: Episode, new: Sequence[dict[str, str]]) -> np.ndarray:
        so_far = episode.row.token_ids
        own = self.environments.next_prompt(episode.environment, so_far, episode.messages)
        return np.r_[so_far, self.renderer.between(new)] if own is None else own

    def finished(self, episode: Episode, item: Item) -> Sample:
        """A conversation that is over, as a sample with its reward.

        Raises:
            RewardError: where the environment gives no finite number.
        """
        text = self.renderer.text(episode.row.token_ids[len(episode.row.prompt_ids) :])
        said = self.environments.reward(episode.environment, episode.answer)
        try:
            reward = float(said)
        except (TypeError, ValueError):
            reward = math.nan
        if not math.isfinite(reward):
            raise refused(f"{self.environments.name}.get_reward", repr(said), text, item)
        return episode.row.sample(episode.group, episode.number, episode.item_number, reward, text)


SeedOf = Callable[..., int]
"""(question, turn, first member) → the seed of one request; the last two are left out at the first turn."""


def play(table: EpisodeContext, items: Sequence[int], params: SamplingParams, seed: SeedOf) -> "Played":
    """Every conversation of some questions, from first to last turn.

    Args:
        params: how a turn is drawn; ``n`` conversations each.
        seed: of each request.

    Raises:
        EngineError: the engine's; or for a turn without a token.
        EnvironmentFault, RetokenisedError, RewardError: as they say. What is being drawn is given up.
    """
    ended: queue.SimpleQueue[Handle] = queue.SimpleQueue()
    under_way: dict[Handle, list[Episode]] = {}
    groups: list[list[Episode]] = []

    def submit(requests: Sequence[list[Episode]]) -> None:
        asked = [_asked(members, params, seed) for members in requests]
        prompts = [members[0].row.token_ids for members in requests]
        under_way.update(zip(table.engine.submit(prompts, asked, ended.put), requests, strict=True))

    try:
        groups += [table.begun(group, item, params.n) for group, item in enumerate(items)]
        submit(groups)
        while under_way:
            handle = ended.get()
            members = under_way.pop(handle)
            completions = handle.result(0.0)
            for completion, episode in zip(completions, members, strict=True):
                which = f"turn {episode.turns + 1} of sample {episode.number}"
                refuse_empty(completion, f"{which} of question {episode.item_number}")
            submit(alike([m for m, c in zip(members, completions, strict=True) if table.heard(m, c)]))
        episodes = [episode for members in groups for episode in members]
        found = [table.task.item(item) for item in items]
        return Played([table.finished(e, found[e.group]) for e in episodes], figures(episodes))
    finally:
        for handle in under_way:  # after an error
            with contextlib.suppress(EngineError):
                handle.cancel()
        for episode in (episode for members in groups for episode in members):
            table.environments.close(episode.environment)


@dataclass
class Played:
    """Conversations that are over."""

    samples: list[Sample]
    """Samples in the order of the questions."""
    figures: dict[str, float] = field(default_factory=dict)
    """Figures of the conversations, by catalog name."""


def alike(episodes: Sequence[Episode]) -> list[list[Episode]]:
    """Groups of episodes whose rows are the same to the last token."""

    def row(episode: Episode) -> bytes:
        return episode.row.token_ids.tobytes()

    # A stable sort: the first of those alike, whose number seeds their request, is the same in every run.
    return [list(members) for _, members in groupby(sorted(episodes, key=row), key=row)]


def figures(episodes: Sequence[Episode]) -> dict[str, float]:
    """Figures of conversations that are over, by catalog name."""
    calls = sum(episode.calls for episode in episodes)
    return {
        "turns_mean": float(np.mean([episode.turns for episode in episodes])),
        "tool_calls_mean": calls / len(episodes),
        "tool_calls_failed_fraction": sum(e.in_vain for e in episodes) / calls if calls else 0.0,
        "given_tokens_mean": float(np.mean([episode.row.n_given for episode in episodes])),
    }


def _asked(members: Sequence[Episode], params: SamplingParams, seed: SeedOf) -> SamplingParams:
    first = members[0]
    # The first turn is drawn with the seed that a task without an environment would give the question.
    later = (first.turns, first.number) if first.turns else ()
    return replace(params, n=len(members), seed=seed(first.item_number, *later))
