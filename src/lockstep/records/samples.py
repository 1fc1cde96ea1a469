"""A sample, from the engine's reply to the loss: a prompt, the tokens after it, and each token's values.

What an engine sends is a :class:`~lockstep.records.tokens.Completion`. From then on the same names hold
everywhere: in memory, on disk and in a training batch. T counts the tokens after the prompt, those that the
model did not sample among them::

    prompt_ids        p p p                                P = 3
    token_ids               a   a   a   t   t   a   a      T = 7; a tool put the t there
    loss_mask               1   1   1   0   0   1   1
    engine_logprobs         -.1 -2. -.3 NaN NaN -.7 -.2
    advantages              .5  .5  .5  .5  .5  .5  .5

Only where ``loss_mask`` is True is a token judged, counted as missing, or trained on. Everywhere else it is
read by the model, and the values beside it mean nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Protocol, overload

import numpy as np

from lockstep.records.tokens import CLAMPED_LOGPROB, FLOAT32, INT32, Completion, FinishReason, SamplingParams
from lockstep.records.versions import VersionSpan


@dataclass(frozen=True, eq=False)
class Group:
    """One prompt and its completions: int32 [P] with P ≥ 1, and int32 [T_i] each with T_i ≥ 1."""

    prompt: np.ndarray
    completions: Sequence[np.ndarray]


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """One continuation of one prompt.

    Arrays are never written to: ``dataclasses.replace`` makes the next state.

    Example: the second sample of the first prompt, which is question 40 of the task::

        Sample(group=0, sample=1, item=40, prompt_ids=[5, 6, 7], token_ids=[9, 2], loss_mask=[True, True],
               engine_logprobs=[-0.1, -2.3], version_spans=(VersionSpan(0, 2, version=5),),
               finish_reason="stop", reward=1.0)
    """

    group: int
    """Samples that are compared with each other share it: those of one prompt of one request."""
    sample: int
    """0 … n − 1 within its group."""
    item: int
    """The question's number over the whole run; of a probe its row, of a log its place in the file."""
    prompt_ids: np.ndarray
    """int32 [P]."""
    token_ids: np.ndarray
    """int32 [T]: exactly the tokens that were sampled, stop token included, and what was put between them."""
    loss_mask: np.ndarray
    """bool [T]: True where the model sampled the token."""
    engine_logprobs: np.ndarray
    """float32 [T], nats, as reported. NaN where the engine gave none."""
    sampling_logprobs: np.ndarray | None = None
    """float32 [T], nats: the trainer's, under the weights that sampled. None until they are computed."""
    version_spans: tuple[VersionSpan, ...]
    """Which weights sampled which tokens; the spans tile [0, T)."""
    finish_reason: FinishReason
    reward: float = float("nan")
    """NaN until it is given."""
    advantages: np.ndarray | None = None
    """float32 [T]. None until they are known."""
    text: str = ""
    """What the tokens read as, special tokens left out; for rewards and for people."""
    prompt_tokens: int = 0
    """Length of the prompt as the engine counts it; 0 where it does not say."""

    @classmethod
    def of(
        cls,
        completion: Completion,
        prompt_ids: np.ndarray,
        item: int,
        text: str = "",
        group: int | None = None,
    ) -> "Sample":
        """A completion as it came from the engine: every token of it was sampled.

        Args:
            group: None: the place of its prompt in the request.
        """
        token_ids = np.frombuffer(completion.token_ids, INT32)
        return cls(
            group=completion.prompt_index if group is None else group,
            sample=completion.sample_index,
            item=item,
            prompt_ids=prompt_ids,
            token_ids=token_ids,
            loss_mask=np.ones(len(token_ids), bool),
            engine_logprobs=np.frombuffer(completion.logprobs, FLOAT32),
            version_spans=completion.version_spans,
            finish_reason=completion.finish_reason,
            text=text,
            prompt_tokens=completion.prompt_tokens,
        )

    @property
    def missing(self) -> int:
        """Tokens of the loss without a log-probability of the engine's: NaN, infinite, or a clamped −inf."""
        return int(np.count_nonzero(self.loss_mask & ~self.known))

    @property
    def known(self) -> np.ndarray:
        """bool [T]: the engine gave a log-probability, one that is none of NaN, infinite, a clamped −inf."""
        return np.isfinite(self.engine_logprobs) & (self.engine_logprobs > CLAMPED_LOGPROB)


class Scorer(Protocol):
    """Whatever gives completions their log-probabilities: the trainer's model."""

    def score(self, groups: Sequence[Group], temperature: float, /) -> Sequence[np.ndarray]:
        """float32 [T_i] of each completion, nats."""
        ...


class Rescorer(Protocol):
    """Whatever gives given token ids their log-probabilities: an engine."""

    def score(self, sequences: Sequence[np.ndarray], temperature: float, /) -> Sequence[np.ndarray]:
        """float32 [N_i − 1] of each sequence, nats."""
        ...


@dataclass(eq=False)
class Samples(Sequence[Sample]):
    """Samples that were drawn together, and their tokens' values as flat arrays [ΣT], sample after sample."""

    samples: list[Sample]
    sampling: SamplingParams
    """How they were drawn; the seed of each request is another."""
    step: int | None = None
    """The training step that they are for; None: for none, they are probes."""
    sample_s: float = 0.0
    """What drawing them took."""
    reward_s: float = 0.0
    left_out: int = 0
    """Tokens that were taken out of the loss, for the engine gave no log-probability of them."""
    figures: dict[str, float] = field(default_factory=dict)
    """What drawing and rewarding them says of them, by catalog name."""

    @classmethod
    def of(
        cls, prompts: Sequence[np.ndarray], completions: Iterable[Completion], sampling: SamplingParams
    ) -> "Samples":
        """What an engine answered to a request for ``prompts``; an item is a prompt's place among them."""
        made = [Sample.of(c, prompts[c.prompt_index], item=c.prompt_index) for c in completions]
        return cls(made, sampling)

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, which: int) -> Sample: ...
    @overload
    def __getitem__(self, which: slice) -> "Samples": ...
    def __getitem__(self, which: int | slice) -> "Sample | Samples":
        return replace(self, samples=self.samples[which]) if isinstance(which, slice) else self.samples[which]

    def take(self, rows: Iterable[int]) -> "Samples":
        """Some of them, by their place."""
        return replace(self, samples=[self.samples[row] for row in rows])

    def apart(self) -> "Samples":
        """The same samples, each a group of its own."""
        return replace(self, samples=[replace(sample, group=row) for row, sample in enumerate(self.samples)])

    def fill(self, **flat: np.ndarray) -> None:
        """Put per-token values in, [ΣT] each, under a sample's name for them: ``fill(advantages=…)``.

        Raises:
            ValueError: for a value too many or too few.
        """
        n = int(self.lengths.sum())
        for name, values in flat.items():
            if len(values) != n:
                raise ValueError(f"samples, {name}: got {len(values)} values, expected {n}")
            ends = self.lengths.cumsum()
            changes: list[dict[str, Any]] = [{name: part} for part in np.split(values, ends[:-1])]
            self.samples = [
                replace(sample, **change) for sample, change in zip(self.samples, changes, strict=True)
            ]

    def leave_out_missing(self) -> None:
        """Take tokens without a log-probability of the engine's out of the loss, and count them.

        They leave its denominator too. What stands in their place is conditioned on and never learned.
        """
        self.left_out += self.missing
        self.samples = [
            replace(sample, loss_mask=sample.loss_mask & sample.known) if sample.missing else sample
            for sample in self.samples
        ]

    @property
    def temperature(self) -> float:
        """The temperature at which their log-probabilities are to be computed; of greedy ones, 1."""
        return self.sampling.temperature or 1.0

    @property
    def prompts(self) -> list[np.ndarray]:
        """Each sample's prompt."""
        return [sample.prompt_ids for sample in self.samples]

    @property
    def groups(self) -> list[Group]:
        """Each group's prompt with its completions, in order: what the trainer scores."""
        grouped = [list(members) for _, members in groupby(self.samples, lambda sample: sample.group)]
        return [Group(members[0].prompt_ids, [sample.token_ids for sample in members]) for members in grouped]

    @property
    def group_size(self) -> int:
        """Samples of each group.

        Raises:
            ValueError: when not all groups have as many.
        """
        sizes = {len(group.completions) for group in self.groups}
        if len(sizes) != 1:
            raise ValueError(f"samples: got groups of {sorted(sizes)}, expected groups of one size")
        return sizes.pop()

    @property
    def sequences(self) -> list[np.ndarray]:
        """Prompt and completion as one, int32 [P + T] each: what an engine re-scores."""
        return [np.concatenate([sample.prompt_ids, sample.token_ids]) for sample in self.samples]

    @property
    def lengths(self) -> np.ndarray:
        """int [samples]: T of each."""
        return np.array([len(sample.token_ids) for sample in self.samples], np.int64)

    @property
    def owners(self) -> np.ndarray:
        """Which sample each token belongs to, int [ΣT]."""
        return np.repeat(np.arange(len(self.samples)), self.lengths)

    @property
    def positions(self) -> np.ndarray:
        """How many tokens of its sample come before each token, int [ΣT]."""
        lengths = self.lengths
        return np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)

    @property
    def versions(self) -> np.ndarray:
        """The version of the weights that drew each token, int64 [ΣT]."""
        spans = [span for sample in self.samples for span in sample.version_spans]
        lengths = [span.stop - span.start for span in spans]
        return np.repeat(np.array([span.version for span in spans], np.int64), lengths)

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [ΣT]."""
        return _flat((sample.token_ids for sample in self.samples), np.int32)

    @property
    def loss_mask(self) -> np.ndarray:
        """bool [ΣT]."""
        return _flat((sample.loss_mask for sample in self.samples), np.bool_)

    @property
    def engine_logprobs(self) -> np.ndarray:
        """Score A, float32 [ΣT], nats."""
        return _flat((sample.engine_logprobs for sample in self.samples), np.float32)

    @property
    def sampling_logprobs(self) -> np.ndarray:
        """float32 [ΣT], nats; NaN where they are not computed yet."""
        return _known([sample.sampling_logprobs for sample in self.samples], self.lengths)

    @property
    def advantages(self) -> np.ndarray:
        """float32 [ΣT]; NaN where they are not known yet."""
        return _known([sample.advantages for sample in self.samples], self.lengths)

    @property
    def rewards(self) -> np.ndarray:
        """float64 [samples]; NaN where none was given."""
        return np.array([sample.reward for sample in self.samples], np.float64)

    @property
    def rewarded(self) -> bool:
        """True when every sample has its reward, and every token of the loss its advantage."""
        return not np.isnan(self.rewards).any() and not np.isnan(self.advantages[self.loss_mask]).any()

    @property
    def missing(self) -> int:
        """Tokens of the loss without a finite log-probability of the engine's."""
        return sum(sample.missing for sample in self.samples)

    def scored(self, trainer: Scorer) -> np.ndarray:
        """Score C of every token, float32 [ΣT], nats."""
        return np.concatenate(trainer.score(self.groups, self.temperature))

    def rescored(self, engine: Rescorer, temperature: float = 1.0) -> np.ndarray:
        """Score B of every token, float32 [ΣT], nats."""
        scores = engine.score(self.sequences, temperature)
        # Of a sequence the first token has none: its completion's begin one place before the completion does.
        return np.concatenate([s[len(p) - 1 :] for s, p in zip(scores, self.prompts, strict=True)])


def _known(parts: Sequence[np.ndarray | None], lengths: np.ndarray) -> np.ndarray:
    filled = (np.full(n, np.nan) if part is None else part for part, n in zip(parts, lengths, strict=True))
    return _flat(filled, np.float32)


def _flat(parts: Iterable[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts], dtype=dtype)
