"""A file of rollouts in memory: flat arrays with spans.

About 10 bytes a token (9, its share of the prompt, 1 for each mask).

A row's tokens lie at ``spans[row]`` of ``token_ids`` and ``logprobs``, its prompt at ``prompt_spans[row]`` of
``prompt_ids``. Taking pads away moves a span. A token that the model did not sample keeps its place, for what
follows was drawn after it; ``sampled`` says that it is not judged.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lockstep.records.samples import Group, Sample, Samples
from lockstep.records.tokens import CLAMPED_LOGPROB, SamplingParams
from lockstep.training.trainer import Trainer

SCORED_AT_ONCE = 8192
"""Tokens, prompts included: what is packed at a time."""


@dataclass(eq=False)
class Logged:
    """What a file holds, R rows of T tokens."""

    path: Path
    prompt_ids: np.ndarray
    """int32, all prompts."""
    prompt_spans: np.ndarray
    """int64 [R, 2]."""
    token_ids: np.ndarray
    """int32 [T]."""
    logprobs: np.ndarray
    """float32 [T], nats; NaN where the file holds none."""
    spans: np.ndarray
    """int64 [R, 2]."""
    masks: dict[str, np.ndarray]
    """The masks by column, bool [T] each."""
    sampled: np.ndarray
    """bool [T]: tokens that the model drew, as far as the masks say; only these are judged."""
    settings: np.ndarray
    """int32 [R]: which of ``samplings`` the row was drawn under."""
    samplings: list[SamplingParams]
    numbers: np.ndarray
    """int64 [R]: where the row stands in the file; of JSONL the line."""
    padded: bool
    """True when the file says itself which tokens are pads."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and what was assumed; for people."""

    def prompt(self, row: int) -> np.ndarray:
        """int32 [P]."""
        start, stop = self.prompt_spans[row]
        return self.prompt_ids[start:stop]

    def completion(self, row: int) -> np.ndarray:
        """int32 [T_row], tokens that were not sampled among them."""
        start, stop = self.spans[row]
        return self.token_ids[start:stop]

    def judged(self, rows: np.ndarray) -> np.ndarray:
        """Where the judged tokens of some rows lie, int64."""
        parts = [start + np.flatnonzero(self.sampled[start:stop]) for start, stop in self.spans[rows]]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """How many tokens of each row are judged, int64."""
        return np.array(
            [np.count_nonzero(self.sampled[start:stop]) for start, stop in self.spans[rows]], np.int64
        )

    def usable(self) -> np.ndarray:
        """Rows with a token that is judged, int64."""
        every = np.arange(len(self.spans))
        return every[self.counts(every) > 0]

    def gaps(self, trainer: Trainer, rows: np.ndarray, temperature: float) -> Iterator[np.ndarray]:
        """trainer − engine of the judged tokens, float32, some rows at a time and in their order."""
        for part in self._portions(rows):
            groups = [Group(self.prompt(row), [self.completion(row)]) for row in part]
            scores = np.concatenate(trainer.score(groups, temperature))
            judged = np.concatenate([self.sampled[start:stop] for start, stop in self.spans[part]])
            yield scores[judged] - self.logprobs[self.judged(part)]

    def _portions(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        lengths = np.diff(self.prompt_spans[rows])[:, 0] + np.diff(self.spans[rows])[:, 0]
        portion = np.cumsum(lengths) // SCORED_AT_ONCE
        yield from np.split(rows, np.flatnonzero(np.diff(portion)) + 1)

    def portion(self, rows: np.ndarray, which: int, n: int, most_tokens: int) -> Samples:
        """:meth:`turns` of up to ``n`` rows of every second prompt: of no prompt two while another has none.

        Args:
            which: even for the first prompt and every second after it, odd for the others.
        """
        known: dict[bytes, tuple[int, int]] = {}
        order = []
        for row in rows:
            prompt = self.prompt(row).tobytes()
            number, before = known.get(prompt, (len(known), 0))
            known[prompt] = number, before + 1
            if number % 2 == which % 2:
                order.append((before, number, row))
        return self.turns(np.array([row for *_, row in sorted(order)[:n]], np.int64), most_tokens)

    def turns(self, rows: np.ndarray, most_tokens: int) -> Samples:
        """The first tokens of each row sampled one after the other, behind all that stands before them."""
        samples = []
        for group, row in enumerate(rows):
            start, stop = self.spans[row]
            judged = self.sampled[start:stop]
            first = start + int(judged.argmax())
            beyond = np.flatnonzero(~self.sampled[first:stop])
            end = min(first + int(beyond[0]) if beyond.size else stop, first + most_tokens)
            turn = Sample(
                group=group,
                sample=0,
                item=int(self.numbers[row]),
                prompt_ids=np.concatenate([self.prompt(row), self.token_ids[start:first]]),
                token_ids=self.token_ids[first:end],
                loss_mask=np.ones(end - first, bool),
                engine_logprobs=self.logprobs[first:end],
                version_spans=(),
                finish_reason="length",
            )
            samples.append(turn)
        return Samples(samples, self.samplings[self.settings[rows[0]] if len(rows) else 0])


class Collected:
    """A :class:`Logged` in the making: typed arrays that grow."""

    def __init__(self, masks: list[str]) -> None:
        self.prompt_ids, self.token_ids, self.logprobs = array("i"), array("i"), array("f")
        self.masks = {name: bytearray() for name in masks}
        self.spans, self.prompt_spans = array("q"), array("q")
        self.settings, self.numbers = array("i"), array("q")
        self.empty = self.pads = 0

    def add(
        self,
        number: int,
        prompt: np.ndarray,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        masks: dict[str, np.ndarray],
        setting: int,
        unpadded: tuple[slice, slice],
    ) -> None:
        """Take a row in.

        Args:
            logprobs: float64 [T]; what stands for a missing one becomes NaN.
            unpadded: what of prompt and completion the file says is no padding.
        """
        for spans, taken, values, kept in (
            (self.prompt_spans, self.prompt_ids, prompt, unpadded[0]),
            (self.spans, self.token_ids, tokens, unpadded[1]),
        ):
            start, stop, _ = kept.indices(len(values))
            spans.extend((len(taken) + start, len(taken) + stop))
            self.pads += len(values) - (stop - start)
            taken.frombytes(values.astype(np.int32, copy=False).tobytes())
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite, and so missing
            numbers = logprobs.astype(np.float32)
        numbers[~np.isfinite(numbers) | (numbers <= CLAMPED_LOGPROB)] = np.nan
        self.logprobs.frombytes(numbers.tobytes())
        for name, mask in masks.items():
            self.masks[name] += mask.astype(np.uint8).tobytes()
        self.settings.append(setting)
        self.numbers.append(number)

    def done(self, path: Path, samplings: list[SamplingParams], *, padded: bool) -> Logged:
        """What was taken in."""
        n = len(self.token_ids)
        return Logged(
            path=path,
            prompt_ids=np.asarray(self.prompt_ids, np.int32),
            prompt_spans=np.asarray(self.prompt_spans, np.int64).reshape(-1, 2),
            token_ids=np.asarray(self.token_ids, np.int32),
            logprobs=np.asarray(self.logprobs, np.float32),
            spans=np.asarray(self.spans, np.int64).reshape(-1, 2),
            masks={name: np.frombuffer(mask, np.bool_) for name, mask in self.masks.items()},
            sampled=np.ones(n, np.bool_),
            settings=np.asarray(self.settings, np.int32),
            samplings=samplings,
            numbers=np.asarray(self.numbers, np.int64),
            padded=padded,
            notes=[f"{self.pads} pads taken away as the attention mask says"] if self.pads else [],
        )
