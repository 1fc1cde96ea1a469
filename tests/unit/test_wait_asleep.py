"""In flight on shared cores OpenMP threads sleep when they wait; nowhere else, and never against the user."""

import os
import subprocess
import sys

import pytest

from lockstep.config.recipe import parse_overrides
from lockstep.loop.open import POLICY, wait_asleep
from tests.chaos.test_log_files import NEUTRAL

IN_FLIGHT = ["loop.kind=in_flight"]


@pytest.mark.parametrize(
    ("sets", "policy", "expected"),
    [
        (IN_FLIGHT, None, "PASSIVE"),
        (IN_FLIGHT, "ACTIVE", "ACTIVE"),
        ([*IN_FLIGHT, "rollout.max_lag=0"], None, None),
        ([*IN_FLIGHT, "rollout.cores=1"], None, None),
        ([], None, None),
    ],
)
def test_the_policy_is_set_where_both_compute_at_once(monkeypatch, sets, policy, expected):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delenv(POLICY, raising=False)
    if policy:
        monkeypatch.setenv(POLICY, policy)
    said = []
    wait_asleep(parse_overrides(NEUTRAL, sets, "test"), said.append)
    assert os.environ.get(POLICY) == expected
    assert said == []
    monkeypatch.delenv(POLICY, raising=False)


def test_once_torch_is_there_it_is_too_late_and_that_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", sys)
    monkeypatch.delenv(POLICY, raising=False)
    said = []
    wait_asleep(parse_overrides(NEUTRAL, IN_FLIGHT, "test"), said.append)
    assert POLICY not in os.environ
    assert "OMP_WAIT_POLICY=PASSIVE" in said[0]


def test_what_opens_a_session_does_not_import_torch():
    """The engine starts meanwhile; and the policy is read when torch is imported."""
    asked = "import sys, lockstep.loop.open; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", asked], check=True, timeout=60)
