"""vLLM's names of samples, and the switches that are counted by them."""

from types import SimpleNamespace

import pytest

from lockstep.engines.worker.vllm_names import Internal, internal_of
from lockstep.engines.worker.vllm_terms import VllmWorker
from lockstep.records.versions import VersionSpan


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("r7", Internal("r7", 0)),
        ("12_r7", Internal("r7", 12)),
        ("r7-a4c0", Internal("r7", 0)),
        ("1_r7-a4c0", Internal("r7", 1)),
        ("cmpl-7", None),
        ("r7_1", None),
        ("x_r7", None),
    ],
)
def test_a_name_is_taken_apart_or_is_another_s(name, of):
    assert internal_of(name) == of


def test_a_switch_is_noted_of_the_samples_in_flight_and_of_no_other():
    worker = SimpleNamespace(in_flight={"r1": 5}, version=3, _switches={})
    VllmWorker.switched(worker, {"0_r1-a7": 4, "1_r1-b2": 0, "r2": 9, "cmpl-1": 1})
    assert worker._switches == {"r1": [(0, VersionSpan(4, 4, 3)), (1, VersionSpan(0, 0, 3))]}
