"""A broken backend before a real one: an engine whose requests, replies or payloads are edited on the way.

Everything still comes from the real engine; what stands between it and the trainer is what breaks in the
field: servers that apply defaults, clients that re-tokenise, readers that are off by one, transports that
lose a tensor.

Named without torch: the catalogue of faults is read by ``lockstep faults --list``; what needs tensors imports
it where it does.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import replace

from lockstep.engines.streaming import Completions
from lockstep.faults.relay import Relay
from lockstep.records.tokens import CLAMPED_LOGPROB, FLOAT32, INT32, Completion, SamplingParams
from lockstep.records.versions import LoadMode, LoadReceipt, VersionSpan, WeightUpdate

if TYPE_CHECKING:
    from lockstep.parity.pair import Pair

Prompts = list[np.ndarray]


class Proxy(Relay):
    """An engine that behaves as ``inner`` does, but for the one hook that a subclass edits."""

    def __init__(self, pair: "Pair") -> None:
        super().__init__(pair.engine, type(self).__name__)
        self.pair = pair

    def edit_requests(
        self, prompts: Prompts, params: list[SamplingParams]
    ) -> tuple[Prompts, list[SamplingParams]]:
        """What the engine is asked for in place of what the trainer asked."""
        return prompts, params

    def edit_completions(self, completions: Completions) -> Completions:
        """What the trainer gets in place of what the engine sampled."""
        return completions

    def edit_scores(self, scores: list[np.ndarray]) -> list[np.ndarray]:
        """What the trainer gets in place of what the engine scored."""
        return scores

    def edit_update(self, update: WeightUpdate) -> WeightUpdate:
        """What the engine loads in place of what the trainer published."""
        return update

    def sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        """See :meth:`Engine.sample`."""
        asked, settings = self.edit_requests(list(prompts), list(params))
        return self.edit_completions(self.inner.sample(asked, settings))

    def _score(self, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
        return self.edit_scores(self.inner.score(sequences, temperature))

    def load(self, update: WeightUpdate, mode: LoadMode = "wait") -> LoadReceipt:
        """See :meth:`Engine.load`."""
        return self.inner.load(self.edit_update(update), mode)

    def close(self) -> None:
        """The engine behind it is another's to close."""


def ids_of(completion: Completion) -> np.ndarray:
    """int32 [T]."""
    return np.frombuffer(completion.token_ids, INT32)


def numbers_of(completion: Completion) -> np.ndarray:
    """float32 [T]."""
    return np.frombuffer(completion.logprobs, FLOAT32)


def with_numbers(completion: Completion, numbers: np.ndarray) -> Completion:
    """The completion with other log-probabilities."""
    missing = int((~np.isfinite(numbers) | (numbers <= CLAMPED_LOGPROB)).sum())
    return replace(completion, logprobs=numbers.astype(FLOAT32).tobytes(), missing=missing)


def with_ids(completion: Completion, ids: np.ndarray) -> Completion:
    """The completion with other tokens."""
    return replace(completion, token_ids=ids.astype(INT32).tobytes())


def edits(**hooks: Callable[..., Any]) -> "Callable[[Pair], Proxy]":
    """A proxy class with the given hooks, each a function of (proxy, the hook's arguments …)."""
    return type("Edited", (Proxy,), hooks)


def settings(**changes: Any) -> Callable[..., Any]:
    """A hook: every request's sampling changed."""
    return lambda self, prompts, params: (prompts, [replace(p, **changes) for p in params])


def biased(biases: dict[str, float]) -> Callable[..., Any]:
    """A hook: a logit bias on the token of each text, in every request."""

    def edit(self: Any, prompts: Any, params: Any) -> Any:
        encode = self.pair.renderer.tokenizer.encode
        bias = {encode(text, add_special_tokens=False)[-1]: value for text, value in biases.items()}
        return prompts, [replace(p, logit_bias=bias) for p in params]

    return edit


def only_of(letters: str) -> Callable[..., Any]:
    """A hook: every request drawn from the tokens of these characters alone, as under a grammar."""

    def edit(self: Any, prompts: Any, params: Any) -> Any:
        from lockstep.parity.explain.semantics.grammar import made_of, texts_of

        texts = texts_of(self.pair.renderer.tokenizer, self.pair.trainer.vocabulary)
        banned = dict.fromkeys(np.flatnonzero(~made_of(set(letters), texts)).tolist(), -100.0)
        return prompts, [replace(p, logit_bias=banned) for p in params]

    return edit


def prompts_edited(edit: "Callable[[Pair, np.ndarray], np.ndarray]") -> Callable[..., Any]:
    """A hook: every prompt changed."""
    return lambda self, prompts, params: ([edit(self.pair, p).astype(np.int32) for p in prompts], params)


def numbers_edited(edit: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Any]:
    """A hook: every completion's log-probabilities changed."""
    return lambda self, completions: [with_numbers(c, edit(numbers_of(c))) for c in completions]


def at_least(temperature: float) -> Callable[..., Any]:
    """A hook: a clamp on the temperature."""
    return lambda self, prompts, params: (
        prompts,
        [replace(p, temperature=max(p.temperature, temperature)) for p in params],
    )


def shifted(numbers: np.ndarray) -> np.ndarray:
    """Each number beside the token after its own; the first is made up."""
    return np.r_[numbers[:1] - 1.0, numbers[:-1]]


def neighbours_swapped(self: Proxy, completions: Completions) -> Completions:
    """A hook: what belongs to row 2i is returned for row 2i + 1, and the other way round."""
    # The last of an odd number has no neighbour and stays where it is.
    order = [min(i ^ 1, len(completions) - 1) for i in range(len(completions))]
    return [
        replace(completions[j], prompt_index=c.prompt_index, sample_index=c.sample_index)
        for c, j in zip(completions, order, strict=True)
    ]


def numbers_swapped(self: Proxy, completions: Completions) -> Completions:
    """A hook: only the log-probabilities of neighbours are exchanged."""
    order = [min(i ^ 1, len(completions) - 1) for i in range(len(completions))]
    # Where lengths differ a swap is a completion with too few numbers: another fault.
    same = [
        j if len(completions[j].logprobs) == len(c.logprobs) else i
        for i, (c, j) in enumerate(zip(completions, order, strict=True))
    ]
    return [with_numbers(c, numbers_of(completions[j])) for c, j in zip(completions, same, strict=True)]


def token_edited(at: int) -> Callable[..., Any]:
    """A hook: one token of each completion becomes another."""

    def edit(self: Proxy, completions: Completions) -> Completions:
        vocabulary = self.pair.trainer.vocabulary
        edited = []
        for c in completions:
            ids = ids_of(c).copy()
            if len(ids) > at + 1:
                ids[at] = (ids[at] + vocabulary // 2) % vocabulary
            edited.append(with_ids(c, ids))
        return edited

    return edit


def stop_dropped(self: Proxy, completions: Completions) -> Completions:
    """A hook: the token that ended a completion is cut off, with its log-probability."""
    return [
        with_numbers(with_ids(c, ids_of(c)[:-1]), numbers_of(c)[:-1]) if c.finish_reason == "stop" else c
        for c in completions
    ]


def some_corrupted(self: Proxy, completions: Completions) -> Completions:
    """A hook: the last two tokens of one completion in eight are noise that the engine is sure of."""
    rng = np.random.default_rng(0)
    vocabulary = self.pair.trainer.vocabulary
    corrupted = []
    for number, c in enumerate(completions):
        ids, numbers = ids_of(c).copy(), numbers_of(c).copy()
        if number % 8 == 3 and len(ids) > 4:
            ids[-2:] = rng.integers(0, vocabulary, 2)
            numbers[-2:] = -0.01
        corrupted.append(with_numbers(with_ids(c, ids), numbers))
    return corrupted


def scores_of_a_batch(self: Proxy, scores: list[np.ndarray]) -> list[np.ndarray]:
    """A hook: a sequence that is scored among others gets other numbers than alone."""
    return [s * 1.01 for s in scores] if len(scores) > 1 else scores


class RawNumbers(Proxy):
    """Tokens are drawn with top-k 5; the numbers reported are the whole distribution's, and look right."""

    def sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        """See :meth:`Engine.sample`."""
        from lockstep.records.samples import Group

        drawn = self.inner.sample(prompts, [replace(p, top_k=5) for p in params])
        temperature = {p.temperature for p in params}.pop()
        groups = [Group(prompts[c.prompt_index], [ids_of(c)]) for c in drawn]
        return [
            with_numbers(c, s)
            for c, s in zip(drawn, self.pair.trainer.score(groups, temperature), strict=True)
        ]


class WarmCacheDrifts(Proxy):
    """Prompts that were seen before are answered a little wrong, as from a stale prefix cache."""

    def __init__(self, pair: "Pair") -> None:
        super().__init__(pair)
        self._seen: set[bytes] = set()

    def sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        """See :meth:`Engine.sample`."""
        # By temperature: a check draws the same prompts at the recipe's and at 1, and numbers that were off
        # the second time already would be layer 1's.
        keys = [
            prompt.tobytes() + bytes([p.temperature == 1.0])
            for prompt, p in zip(prompts, params, strict=True)
        ]
        warm = [key in self._seen for key in keys]
        self._seen |= set(keys)
        drawn = self.inner.sample(prompts, params)
        return [with_numbers(c, numbers_of(c) * 1.05) if warm[c.prompt_index] else c for c in drawn]


class Withheld(Proxy):
    """Updates in which the tensors that ``chosen`` picks keep the values from when the proxy was put up."""

    def __init__(self, pair: "Pair", chosen: Callable[[str], bool]) -> None:
        super().__init__(pair)
        self._old = {name: tensor for name, tensor in pair.trainer.weights().items() if chosen(name)}

    def edit_update(self, update: WeightUpdate) -> WeightUpdate:
        """See :meth:`Proxy.edit_update`."""
        return edited_file(update, lambda name, tensor: self._old.get(name, tensor))


class OneBehind(Proxy):
    """Each load delivers the weights of the load before it, under the new number."""

    def __init__(self, pair: "Pair") -> None:
        super().__init__(pair)
        self._last = pair.trainer.weights()

    def edit_update(self, update: WeightUpdate) -> WeightUpdate:
        """See :meth:`Proxy.edit_update`."""
        old = self._last
        self._last = self.pair.trainer.weights()
        return edited_file(update, lambda name, tensor: old[name])


def edited_file(update: WeightUpdate, edit: Callable[[str, Any], Any]) -> WeightUpdate:
    """A second file beside the published one, each tensor through ``edit(name, tensor)``."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = Path(update.path).with_name("edited.safetensors")
    with safe_open(update.path, framework="pt") as file:
        tensors = {
            name: edit(name, file.get_tensor(name)).contiguous().clone()
            # It is no mapping: it has keys, and cannot be iterated.
            for name in file.keys()  # noqa: SIM118
        }
        metadata = file.metadata()
    path.unlink(missing_ok=True)  # an engine may have the last one mapped
    save_file(tensors, path, metadata)
    return replace(update, path=str(path))


def every_load(edit: Callable[[str, Any], Any]) -> Callable[..., WeightUpdate]:
    """A hook: every delivered tensor through ``edit(name, tensor)``."""
    return lambda self, update: edited_file(update, edit)


def version_one_off(self: Proxy, completions: Completions) -> Completions:
    """A hook: completions say the version after the one that drew them."""
    return [
        replace(c, version_spans=tuple(replace(s, version=s.version + 1) for s in c.version_spans))
        for c in completions
    ]


def first_switch_edited(
    edit: Callable[[VersionSpan, VersionSpan], tuple[VersionSpan, VersionSpan]],
) -> Callable[..., Any]:
    """A hook: what completions that span an update say of their first two pieces."""

    def edited(c: Completion) -> Completion:
        if len(c.version_spans) < 2:
            return c
        left, right, *rest = c.version_spans
        return replace(c, version_spans=(*edit(left, right), *rest))

    return lambda self, completions: [edited(c) for c in completions]


def moved(left: VersionSpan, right: VersionSpan) -> tuple[VersionSpan, VersionSpan]:
    """The switch a token later, or where there is none left a token earlier."""
    edge = left.stop + (1 if right.stop - right.start > 1 else -1)
    return replace(left, stop=edge), replace(right, start=edge)


def exchanged(left: VersionSpan, right: VersionSpan) -> tuple[VersionSpan, VersionSpan]:
    """Each piece under the other's version."""
    return replace(left, version=right.version), replace(right, version=left.version)


class OtherCacheRule(Proxy):
    """Updates in flight that keep the cache where it should be computed anew, and the other way round."""

    def load(self, update: WeightUpdate, mode: LoadMode = "wait") -> LoadReceipt:
        """See :meth:`Engine.load`."""
        other: dict[LoadMode, LoadMode] = {"keep": "recompute", "recompute": "keep", "wait": "wait"}
        return self.inner.load(update, other[mode])
