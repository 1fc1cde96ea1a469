"""Layer 4 at full depth on a bf16 pair: what the gap's width hides has a direction, and a clean pair none."""

from dataclasses import replace as replace_samples
from functools import partial

import pytest
from msgspec.structs import replace

from lockstep.config.recipe import with_sets
from lockstep.parity import ladder
from lockstep.parity.evidence import gather
from lockstep.parity.explain.numerics.by_token import CUT
from lockstep.parity.layers import directions, path
from lockstep.parity.pair import draw
from lockstep.parity.probes import probe_prompts
from lockstep.policy.variant_settings import LogitsCapped, RotaryBase
from lockstep.policy.variants import InDtype, Scaled
from lockstep.records.verdicts import Verdict
from tests.faults.conftest import SHARP, T, verdicts_of

PASSED = Verdict(layer="numerics", status="PASS", summary="passed", n_tokens=1)
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def rounded(pair, recipe):
    """The trainer in bf16 beside an fp32 engine: what is between them is rounding."""
    pair.recipe = with_sets(replace(recipe), ["parity.probe_tokens=48", "parity.direction_sequences=32"])
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


def cut_in_one_of_four(pair, which, n):
    """The engine drew every fourth row after a prompt without its first token."""
    seed = pair.seed + which
    prompts = probe_prompts(pair, n, seed)
    served = [ids[1:] if row % 4 == 0 else ids for row, ids in enumerate(prompts)]
    sample = draw(pair, served, pair.recipe.sampling, seed)
    return replace_samples(
        sample, samples=[replace_samples(s, prompt_ids=ids) for s, ids in zip(sample, prompts, strict=True)]
    )


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        (RotaryBase(20_000.0), ("rotary base", "positions divided")),
        (LogitsCapped(8.0), ("a cap on the logits",)),
    ],
    ids=["rotary base", "cap"],
)
def test_a_setting_of_the_model_within_the_rounding_is_named(rounded, variant, told):
    with rounded.trainer.holding(variant):
        found = directions.deepen(rounded, PASSED)
    assert found.status == "FAIL", found.summary
    assert any(name in found.findings[0].evidence for name in told), found.findings[0].evidence


def test_prompts_cut_in_some_rows_are_a_direction(rounded):
    rounded.recipe = with_sets(rounded.recipe, ["parity.direction_sequences=96", "sampling.max_tokens=24"])
    found = directions.deepen(rounded, PASSED, partial(cut_in_one_of_four, rounded))
    assert found.status == "FAIL", found.summary
    assert CUT in found.findings[0].evidence


def test_where_no_direction_is_asked_for_the_verdict_says_so(rounded):
    rounded.recipe = with_sets(rounded.recipe, ["parity.direction_sequences=0"])
    found = directions.deepen(rounded, PASSED)
    assert found.status == "PASS"
    assert "no direction was tested, as was asked for" in found.summary


def test_the_ladder_of_a_bf16_pair_tests_directions_and_holds_the_width_to_its_own_noise(rounded):
    """What the table of quantiles lets through is refused at depth standard."""
    rounded.recipe = with_sets(rounded.recipe, ["objective.clip_low=0.5", "objective.clip_high=1.0"])
    with rounded.trainer.holding(Scaled((DOWN,), 1 / 1.08)):
        evidence = gather(rounded)
        numerics = ladder._numerics(rounded, evidence, path.judge(rounded, evidence))
    assert numerics.status == "FAIL", numerics.summary
    assert numerics.findings[0].cause == directions.CAUSE
    assert numerics.figures["gap_abs_p50_nats"] < rounded.noise.p50
    assert numerics.figures["gap_abs_p999_nats"] < rounded.noise.p999
    assert numerics.figures["gap_in_own_noise"] > 1.5
    scores = ("engine_to_reference", "rescore_to_reference", "trainer_to_reference")
    engine, again, trainer = (numerics.figures[f"{score}_abs_p999_nats"] for score in scores)
    assert engine == pytest.approx(again, abs=1e-4), "in fp32 the engine scores as it drew"
    assert min(engine, trainer) > 1e-3, "the tensor is the engine's, the rounding the trainer's"


BF16 = (
    "model.dtype=bfloat16",
    "engine.dtype=float32",
    "parity.probe_tokens=40",
    "objective.clip_low=0.5",
    "objective.clip_high=1.0",
    T,
)


def test_a_log_at_full_depth_names_what_hides_in_its_rounding(rounded, tmp_path, log):
    rows = log(replace(SHARP, max_tokens=40), 72)
    clean = verdicts_of(tmp_path, rounded, rows, *BF16, deepen=directions.deepen)
    assert [v.status for v in clean] == ["PASS", "NOT_RUN", "NOT_RUN", "PASS", "NOT_RUN"]
    assert "seen 99% of the time" in clean[3].summary or "did not show again" in clean[3].summary
    with rounded.trainer.holding(Scaled((DOWN,), 1 / 1.04)):
        hidden = verdicts_of(tmp_path, rounded, rows, *BF16)
        assert [v.status for v in hidden] == [v.status for v in clean], hidden[3].summary
        failed = verdicts_of(tmp_path, rounded, rows, *BF16, deepen=directions.deepen)[3]
    assert failed.status == "FAIL", failed.summary
    assert "layers.1.mlp.down_proj" in failed.findings[0].evidence
    assert "of other prompts" in failed.findings[0].evidence


def test_a_log_of_few_prompts_or_of_greedy_tokens_says_that_no_direction_was_tested(rounded, tmp_path, log):
    few = verdicts_of(tmp_path, rounded, log(), *BF16, deepen=directions.deepen)[3]
    assert (few.status, "6 prompts in one half, 16 are needed" in few.summary) == ("PASS", True)
    greedy = [row | {"temperature": 0.0} for row in log(replace(SHARP, temperature=0.0), 40)]
    chosen = verdicts_of(tmp_path, rounded, greedy, *BF16, deepen=directions.deepen)[3]
    assert "chosen by their own rounding" in chosen.summary


def test_as_many_sequences_are_taken_as_the_size_that_is_to_be_seen_needs(pair):
    said = []
    pair.say = said.append
    first = directions.deepen(pair, PASSED).figures
    asked = 0.7 * max(first["directions_see_temperature"], first["directions_see_scale_p50"])
    pair.recipe = with_sets(pair.recipe, [f"parity.directions_see={asked}"])
    found = directions.deepen(pair, PASSED).figures
    assert max(found["directions_see_temperature"], found["directions_see_scale_p50"]) <= asked
    assert found["directions_n_tokens"] > 1.5 * first["directions_n_tokens"]
    assert any(text.startswith("directions: 32 sequences show") for text in said)
