"""Layer 4 at full depth on a bf16 pair: what the gap's width hides has a direction, and a clean pair none."""

import pytest
from msgspec.structs import replace

from lockstep.config.recipe import with_sets
from lockstep.deep import directions
from lockstep.policy.variants import InDtype, Scaled
from lockstep.records.verdicts import Verdict

PASSED = Verdict(layer="numerics", status="PASS", summary="passed", n_tokens=1)
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def rounded(pair, recipe):
    """The trainer in bf16 beside an fp32 engine: what is between them is rounding."""
    pair.recipe = with_sets(replace(recipe), ["parity.probe_tokens=48"])
    with pair.trainer.holding(InDtype("bfloat16", "float32")):
        yield pair


def test_a_clean_pair_has_no_direction(rounded):
    found = directions.deepen(rounded, PASSED)
    assert found.status == "PASS", found.findings
    assert found.figures["directions_n_tried"] > 50
    # One clean pair in a hundred has one by chance, which does not show again.
    assert "seen 99% of the time" in found.summary or "did not show again" in found.summary


def test_a_direction_too_small_to_move_a_ratio_is_told_and_passes(pair, recipe):
    """In fp32 a factor of 1.0003 stands out of the noise by far."""
    pair.recipe = with_sets(replace(recipe), ["parity.probe_tokens=48"])
    with pair.trainer.holding(Scaled((DOWN,), 1 / 1.0003)):
        found = directions.deepen(pair, PASSED)
    assert found.status == "PASS"
    assert "moves no ratio by 0.1%" in found.summary
    assert found.figures["direction_nats"] < 1e-3


@pytest.mark.parametrize(("factor", "place"), [(1.08, "layers.1.mlp.down_proj")])
def test_a_scaled_tensor_within_the_rounding_is_named(rounded, factor, place):
    with rounded.trainer.holding(Scaled((DOWN,), 1 / factor)):
        found = directions.deepen(rounded, PASSED)
    assert found.status == "FAIL", found.summary
    (finding,) = found.findings
    assert finding.cause == directions.CAUSE
    assert place in finding.evidence
    assert found.figures["direction_theta"] == pytest.approx(factor - 1, rel=0.35)
