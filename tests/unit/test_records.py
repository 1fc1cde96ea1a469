"""Records round-trip, verdicts refuse to lie."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep import errors
from lockstep.records.messages import Draw, decode_reply, decode_request, encode, number_of
from lockstep.records.semantics import LogprobSemantics
from lockstep.records.tokens import FLOAT32, INT32, SamplingParams, pack_ids, pack_logprobs, unpack_ids
from lockstep.records.verdicts import Finding, Verdict


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_token_ids_round_trip(ids):
    assert unpack_ids(pack_ids(ids)) == ids
    assert np.frombuffer(pack_ids(ids), INT32).tolist() == ids


def test_a_missing_logprob_is_nan_and_stays_in_its_place():
    values = np.frombuffer(pack_logprobs([-1.5, None, -0.25]), FLOAT32)
    assert values[0] == -1.5
    assert math.isnan(values[1])
    assert values[2] == -0.25


@given(st.binary(max_size=200))
def test_malformed_frames_raise_and_nothing_else(frame):
    for decode in (decode_request, decode_reply):
        try:
            decode(frame)
        except errors.ProtocolError:
            continue
    assert isinstance(number_of(frame), int)


def test_a_request_with_an_unknown_field_or_a_bad_temperature_is_refused():
    good = msgspec.msgpack.decode(encode(Draw(1, [b""], [SamplingParams(max_tokens=1)])))
    for change, told in (
        ({"hook": "x"}, "hook"),
        ({"params": [{"max_tokens": 1, "temperature": -1.0}]}, "params"),
    ):
        frame = msgspec.msgpack.encode(good | change)
        with pytest.raises(errors.ProtocolError, match=told):
            decode_request(frame)
        assert number_of(frame) == 1, "whoever sent it can be told"


def test_semantics_of_greedy_sampling_are_untempered():
    greedy = LogprobSemantics.of("sampler", SamplingParams(max_tokens=1, temperature=0.0, top_p=0.5))
    assert (greedy.temperature, greedy.truncated) == (1.0, False)
    assert LogprobSemantics.of("model", SamplingParams(max_tokens=1, temperature=0.5)).temperature == 1.0


def test_a_pass_over_nothing_a_fail_without_cause_and_a_truth_value_are_refused():
    with pytest.raises(ValueError, match="proves nothing"):
        Verdict(layer="path", status="PASS", summary="", n_tokens=0)
    with pytest.raises(ValueError, match="names no cause"):
        Verdict(layer="path", status="FAIL", summary="", n_tokens=3)
    with pytest.raises(ValueError, match="without a reason"):
        Verdict(layer="path", status="NOT_RUN", summary="")
    with pytest.raises(TypeError, match="three-valued"):
        bool(Verdict(layer="path", status="PASS", summary="", n_tokens=3))


def test_every_error_names_boundary_got_expected_and_the_next_step():
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.LockstepError)
    ]
    assert len(kinds) > 10
    for kind in kinds:
        text = str(kind("the place", got="this", expected="that", hint="do so"))
        assert text == "the place: got this, expected that\n\nhint: do so"
        assert kind.exit_code in (1, 2, 3)


def test_a_finding_round_trips():
    found = Finding(cause="c", effect_nats=0.5, ci95=(0.4, 0.6), n_tokens=3, fix="f", evidence="e")
    assert msgspec.json.decode(msgspec.json.encode(found), type=Finding) == found
