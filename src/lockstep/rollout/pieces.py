"""Groups that are drawn in pieces: what an update cut off goes on by its prefix, sample by sample.

    prompt ──► a b c │ cut off, version 4           the group's one request ends
    prompt a b c ──► d e ■, version 5               each sample that was cut off has a request of its own
    sample: a b c d e, spans [0, 3) of 4, [3, 5) of 5

What the new weights draw they draw over a cache of their own: it is the rule of ``recompute``, for engines
that cannot hold a request.
"""

from dataclasses import replace

import numpy as np
from msgspec.structs import replace as with_fields

from lockstep.records.samples import Sample
from lockstep.records.versions import VersionSpan

CUT = "abort"
"""The finish reason of a sample that is to go on."""


class Pieces:
    """What is drawn so far of the groups in flight."""

    def __init__(self) -> None:
        self._samples: dict[int, dict[int, Sample]] = {}
        self._asked: dict[int, int] = {}

    def asked(self, group: int) -> None:
        """A request for samples of a group was sent."""
        self._asked[group] = self._asked.get(group, 0) + 1

    def add(self, group: int, pieces: list[Sample]) -> list[Sample] | None:
        """A request has ended: all samples of its group, as far as they are drawn, in order.

        None while another request of it is open.
        """
        held = self._samples.setdefault(group, {})
        for piece in pieces:
            held[piece.sample] = joined(held.get(piece.sample), piece)
        self._asked[group] -= 1
        if self._asked[group]:
            return None
        del self._asked[group]
        return [held[number] for number in sorted(held)]

    def forget(self, group: int) -> None:
        """Let go of what was drawn of a finished group."""
        self._samples.pop(group, None)

    def clear(self) -> None:
        """All of them are lost: what was drawn of them too."""
        self._samples.clear()
        self._asked.clear()


def joined(before: Sample | None, piece: Sample) -> Sample:
    """A sample with what was drawn after it.

    Args:
        piece: its prompt is the sample's prompt and tokens; its spans count from there.
    """
    if before is None:
        return piece
    n = len(before.token_ids)
    later = [with_fields(span, start=span.start + n, stop=span.stop + n) for span in piece.version_spans]
    return replace(
        before,
        token_ids=np.r_[before.token_ids, piece.token_ids],
        loss_mask=np.r_[before.loss_mask, piece.loss_mask],
        engine_logprobs=np.r_[before.engine_logprobs, piece.engine_logprobs],
        version_spans=_merged([*before.version_spans, *later]),
        finish_reason=piece.finish_reason,
    )


def _merged(spans: list[VersionSpan]) -> tuple[VersionSpan, ...]:
    merged: list[VersionSpan] = []
    for span in spans:
        if merged and merged[-1].version == span.version:
            merged[-1] = with_fields(merged[-1], stop=span.stop)
        else:
            merged.append(span)
    return tuple(merged)
