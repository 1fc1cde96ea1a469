"""One conversation as one row of tokens: what is there is never written anew.

    prompt_ids   p p p
    token_ids          a a a ■ │ t t t │ a a ■        each turn's prompt is all of the row before it, exactly
    loss_mask          1 1 1 1   0 0 0   1 1 1

Tokens that the model did not sample are conditioned on. They are outside the loss, the figures and the check.
"""

from dataclasses import dataclass, field

import numpy as np

from lockstep.errors import RetokenisedError
from lockstep.records.samples import Sample
from lockstep.records.tokens import FLOAT32, INT32, Completion
from lockstep.records.versions import VersionSpan


@dataclass(eq=False)
class Row:
    """A prompt and what follows it so far."""

    prompt_ids: np.ndarray
    """int32 [P]."""
    _tokens: list[np.ndarray] = field(default_factory=list)
    _sampled: list[np.ndarray] = field(default_factory=list)
    _logprobs: list[np.ndarray] = field(default_factory=list)
    _versions: list[np.ndarray] = field(default_factory=list)
    _last: Completion | None = None

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [P + T]: the next turn's prompt begins with these."""
        return np.concatenate([self.prompt_ids, *self._tokens], dtype=np.int32)

    @property
    def n_given(self) -> int:
        """Tokens after the prompt that the model did not sample."""
        return sum(int((~sampled).sum()) for sampled in self._sampled)

    def sampled(self, completion: Completion) -> None:
        """The model's turn, as it came from the engine."""
        ids = np.frombuffer(completion.token_ids, INT32)
        versions = np.repeat(
            [span.version for span in completion.version_spans],
            [span.stop - span.start for span in completion.version_spans],
        )
        if self._versions and len(self._versions[-1]) and self._versions[-1][0] < 0:
            self._versions[-1][:] = versions[0]  # what was given is first read by whoever draws next
        self._add(ids, np.ones(len(ids), bool), np.frombuffer(completion.logprobs, FLOAT32), versions)
        self._last = completion

    def continued(self, whole: np.ndarray, by: str) -> None:
        """The next turn's prompt, whole: what it has beyond the row was given, not sampled.

        Args:
            by: who says so, in the user's words.

        Raises:
            RetokenisedError: when it does not begin with the row, token for token.
        """
        so_far = self.token_ids
        if len(whole) > len(so_far) and np.array_equal(whole[: len(so_far)], so_far):
            n = len(whole) - len(so_far)
            given = np.full(n, np.nan, np.float32)
            unread = np.full(n, -1)  # by any version yet; see :meth:`sampled`
            self._add(whole[len(so_far) :].astype(np.int32), np.zeros(n, bool), given, unread)
            return
        shared = min(len(whole), len(so_far))
        other = np.flatnonzero(whole[:shared] != so_far[:shared])
        at = int(other[0]) if other.size else shared
        there = f"token {so_far[at]}" if at < len(so_far) else f"{len(so_far)} tokens and something more"
        got = (
            f"token {whole[at]} at {at}"
            if at < len(whole)
            else f"a prompt that ends after {len(whole)} tokens"
        )
        raise RetokenisedError(
            by,
            got=got,
            expected=f"{there}: the tokens of the turns before, as they were sampled, and then what is new",
            hint="return the ids that were given, then new ones; text does not encode back to what it was",
        )

    def sample(self, group: int, number: int, item: int, reward: float, text: str) -> Sample:
        """The conversation as it is trained on."""
        assert self._last is not None, "a conversation has a turn of the model's"
        versions = np.concatenate(self._versions)
        ends = np.r_[np.flatnonzero(np.diff(versions)) + 1, len(versions)]
        starts = np.r_[0, ends[:-1]]
        return Sample(
            group=group,
            sample=number,
            item=item,
            prompt_ids=self.prompt_ids,
            token_ids=np.concatenate(self._tokens),
            loss_mask=np.concatenate(self._sampled),
            engine_logprobs=np.concatenate(self._logprobs, dtype=np.float32),
            version_spans=tuple(
                VersionSpan(int(start), int(stop), int(versions[start]))
                for start, stop in zip(starts, ends, strict=True)
            ),
            finish_reason=self._last.finish_reason,
            reward=reward,
            text=text,
        )

    def _add(self, ids: np.ndarray, sampled: np.ndarray, logprobs: np.ndarray, versions: np.ndarray) -> None:
        self._tokens.append(ids)
        self._sampled.append(sampled)
        self._logprobs.append(logprobs)
        self._versions.append(versions)
