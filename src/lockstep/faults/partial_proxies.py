"""Broken backends whose fault strikes some requests, several samples of one request, or the re-scores."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import replace

from lockstep.faults.proxies import Completions, Prompts, Proxy, ids_of, numbers_of, with_numbers
from lockstep.records.tokens import Completion, SamplingParams

if TYPE_CHECKING:
    from lockstep.parity.pair import Pair


def every_other(**changes: Any) -> Callable[..., Any]:
    """A hook: every second request's sampling changed."""
    return lambda self, prompts, params: (
        prompts,
        [replace(p, **changes) if at % 2 else p for at, p in enumerate(params)],
    )


def long_prompts_edited(longer_than: int, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Any]:
    """A hook: prompts of more tokens than that changed."""

    def edited(self: Proxy, prompts: Prompts, params: list[SamplingParams]) -> Any:
        return [edit(p).astype(np.int32) if len(p) > longer_than else p for p in prompts], params

    return edited


def through_text(self: Proxy, prompts: Prompts, params: list[SamplingParams]) -> Any:
    """A hook: every prompt decoded and tokenised again."""
    from lockstep.parity.explain.semantics.prompt_edits import retokenised

    limit = self.pair.recipe.engine.max_model_len
    # A text's own tokens may be more than those it was made of; a prompt that is too long the engine refuses.
    room = [limit - asked.max_tokens for asked in params]
    return [
        retokenised(self.pair.renderer.tokenizer, p)[:most] for p, most in zip(prompts, room, strict=True)
    ], params


def scores_too(edit: Callable[[np.ndarray], np.ndarray]) -> dict[str, Callable[..., Any]]:
    """Hooks: the numbers of completions and those of re-scores changed alike."""
    return {
        "edit_completions": lambda self, completions: [
            with_numbers(c, edit(numbers_of(c))) for c in completions
        ],
        "edit_scores": lambda self, scores: [edit(s).astype(np.float32) for s in scores],
    }


def samples_exchanged(self: Proxy, completions: Completions) -> Completions:
    """A hook: of several samples of one prompt each has the log-probabilities of the next one."""
    by_prompt: dict[int, list[Completion]] = {}
    for c in completions:
        by_prompt.setdefault(c.prompt_index, []).append(c)
    exchanged = []
    for c in completions:
        group = by_prompt[c.prompt_index]
        other = group[(c.sample_index + 1) % len(group)]
        exchanged.append(with_numbers(c, numbers_of(other)) if len(other.logprobs) == len(c.logprobs) else c)
    return exchanged


def first_sample_repeated(self: Proxy, completions: Completions) -> Completions:
    """A hook: all samples of a prompt are its first one."""
    first = {c.prompt_index: c for c in completions if c.sample_index == 0}
    return [replace(first[c.prompt_index], sample_index=c.sample_index) for c in completions]


class BetterOfTwo(Proxy):
    """A request for one sample is drawn twice; the likelier of both is returned, with its right numbers."""

    def sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        """See :meth:`Engine.sample`."""
        # An engine counts a request's samples on from its seed: doubled, no two requests share a draw.
        asked = [
            replace(p, n=2, seed=None if p.seed is None else 2 * p.seed) if p.n == 1 else p for p in params
        ]
        drawn: list[Completion] = []
        best: dict[int, Completion] = {}
        for c in self.inner.sample(prompts, asked):
            if params[c.prompt_index].n > 1:
                drawn.append(c)
                continue
            known = best.get(c.prompt_index)
            if known is None or numbers_of(c).sum() > numbers_of(known).sum():
                best[c.prompt_index] = replace(c, sample_index=0)
        return sorted([*drawn, *best.values()], key=lambda c: (c.prompt_index, c.sample_index))


class TemperatureBehind(Proxy):
    """Tokens are drawn at a temperature off by a factor; the numbers reported are those asked for."""

    factor = 1.0

    def sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        """See :meth:`Engine.sample`."""
        from lockstep.records.samples import Group

        drawn = self.inner.sample(
            prompts, [replace(p, temperature=p.temperature * self.factor) for p in params]
        )
        of_prompt: dict[int, list[np.ndarray]] = {}
        for c in drawn:
            of_prompt.setdefault(c.prompt_index, []).append(ids_of(c))
        groups = [Group(prompts[at], samples) for at, samples in of_prompt.items()]
        (temperature,) = {p.temperature for p in params}
        return [
            with_numbers(c, s)
            for c, s in zip(drawn, self.pair.trainer.score(groups, temperature), strict=True)
        ]


def drawn_at(factor: float) -> Callable[["Pair"], Proxy]:
    """:class:`TemperatureBehind` with a factor."""
    return type("Off", (TemperatureBehind,), {"factor": factor})


class Unsaid(Proxy):
    """A server that does not say what its parameters are in."""

    def __init__(self, pair: "Pair") -> None:
        super().__init__(pair)
        unsaid = dict.fromkeys((self.facts.parameter_dtype, self.facts.head_dtype), "")
        self.ready = replace(self.ready, resolved=self.ready.resolved | unsaid)
