"""Groups that an update cut off: each sample is whole again and says which weights drew what of it."""

import numpy as np

from lockstep.records.samples import Sample
from lockstep.records.versions import VersionSpan
from lockstep.rollout.pieces import CUT, Pieces


def piece(number, ids, version, reason=CUT, prompt=(7, 8)):
    spans = (VersionSpan(0, len(ids), version),) if ids else ()
    return Sample(
        group=4, sample=number, item=4, prompt_ids=np.array(prompt, np.int32),
        token_ids=np.array(ids, np.int32), loss_mask=np.ones(len(ids), bool),
        engine_logprobs=-np.array(ids, np.float32), version_spans=spans, finish_reason=reason,
    )  # fmt: skip


def test_a_sample_that_was_cut_off_goes_on_and_is_one_sample():
    pieces = Pieces()
    pieces.asked(4)
    first, second = pieces.add(4, [piece(0, [1, 2, 3], 5, "stop"), piece(1, [4, 5], 5)])
    assert (first.finish_reason, second.finish_reason) == ("stop", CUT)
    pieces.asked(4)
    whole = pieces.add(4, [piece(1, [6], 6, "length", prompt=(7, 8, 4, 5))])
    assert [sample.sample for sample in whole] == [0, 1]
    joined = whole[1]
    assert joined.prompt_ids.tolist() == [7, 8]
    assert joined.token_ids.tolist() == [4, 5, 6]
    assert joined.engine_logprobs.tolist() == [-4.0, -5.0, -6.0]
    assert joined.version_spans == (VersionSpan(0, 2, 5), VersionSpan(2, 3, 6))
    assert joined.finish_reason == "length"


def test_a_group_is_whole_when_its_last_request_has_ended_and_not_before():
    pieces = Pieces()
    pieces.asked(4)
    pieces.add(4, [piece(0, [1], 5), piece(1, [], 5)])
    pieces.asked(4)
    pieces.asked(4)
    assert pieces.add(4, [piece(1, [3], 6, "stop")]) is None
    whole = pieces.add(4, [piece(0, [2], 5)])
    assert whole[0].version_spans == (VersionSpan(0, 2, 5),), "two pieces of one version are one span"
    assert whole[1].token_ids.tolist() == [3]


def test_what_was_drawn_of_a_group_that_is_lost_is_forgotten():
    pieces = Pieces()
    pieces.asked(4)
    pieces.add(4, [piece(0, [1, 2], 5)])
    pieces.clear()
    pieces.asked(4)
    (fresh,) = pieces.add(4, [piece(0, [9], 6, "stop")])
    assert fresh.token_ids.tolist() == [9]
