"""Pairs of a file, in the place of rollouts: of two answers to a question, the one that is preferred.

    {"question": "…", "chosen": "…", "rejected": "…"}      one item; or "messages", as for any task

An answer is text, or a list of messages whose last is the answer (TRL's form). Its tokens are those that the
chat template makes of it, the end of the turn among them. Nobody sampled them, and no engine has a number for
them: there is nothing to prove, and nothing is.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lockstep.config.recipe import Recipe
from lockstep.errors import RecipeError
from lockstep.records.samples import Sample, Samples
from lockstep.records.versions import VersionSpan
from lockstep.rendering import Renderer
from lockstep.rollout.short_prompts import ShortPrompts
from lockstep.rollout.tasks import Task

SIDES = ("chosen", "rejected")


class Preferences:
    """The pairs of a recipe's task, by number; longer ones than ``engine.max_model_len`` are passed over."""

    def __init__(self, task: Task, renderer: Renderer, recipe: Recipe) -> None:
        self._task = task
        self._renderer = renderer
        self._recipe = recipe
        self._short = ShortPrompts(self._length, task.n_items, recipe.engine.max_model_len)

    def step(self, step: int) -> Samples:
        """A step's pairs: groups of two, the chosen one first.

        Raises:
            RecipeError: for an item that is no pair, or a file without one that is short enough.
        """
        n = self._recipe.training.prompts_per_step
        samples = [
            sample
            for group, item in enumerate(range(step * n, (step + 1) * n))
            for sample in self._pair(group, item, step)
        ]
        found = Samples(samples, self._recipe.sampling, step=step)
        found.fill(advantages=np.zeros(int(found.lengths.sum()), np.float32))
        found.figures["prompts_too_long"] = float(self._short.left_out)
        return found

    def _pair(self, group: int, number: int, step: int) -> Iterable[Sample]:
        prompt, answers = self._ids(self._short.place(number))
        for place, (ids, text) in enumerate(answers):
            yield Sample(
                group=group,
                sample=place,
                item=number,
                prompt_ids=prompt,
                token_ids=ids,
                loss_mask=np.ones(len(ids), bool),
                engine_logprobs=np.full(len(ids), np.nan, np.float32),
                version_spans=(VersionSpan(0, len(ids), step),),
                finish_reason="stop",
                reward=1.0 - place,
                text=text,
            )

    def _length(self, place: int) -> int:
        prompt, answers = self._ids(place)
        return len(prompt) + max(len(ids) for ids, _ in answers)

    def _ids(self, place: int) -> tuple[np.ndarray, list[tuple[np.ndarray, str]]]:
        item = self._task.item(place)
        messages = self._task.messages(item)
        texts = [_text(item, side, place) for side in SIDES]
        return self._renderer.prompt(messages), [
            (self._renderer.answer(messages, text), text) for text in texts
        ]


def _text(item: Mapping[str, Any], side: str, place: int) -> str:
    answer = item.get(side)
    if isinstance(answer, str):
        return answer
    last = answer[-1] if isinstance(answer, list | tuple) and answer else None
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        return str(last["content"])
    raise RecipeError(
        f"recipe, task.name, item {place}",
        got=f"{side} {answer!r:.80}" if side in item else f"a mapping of {', '.join(map(str, item))}",
        expected="chosen and rejected: text, or messages that end with the assistant's",
        hint="task.options.columns names columns otherwise",
    )
