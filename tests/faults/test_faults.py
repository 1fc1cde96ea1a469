"""Every fault that needs no engine flag, on a tiny model.

Named in its own layer with its own cause; and silence without one.
"""

import dataclasses
import math

import pytest
import torch
from msgspec.structs import replace

from lockstep.config.recipe import with_sets
from lockstep.faults.at_load import AtLoad
from lockstep.faults.campaign import climbed, planted
from lockstep.faults.catalogue import FAULTS
from lockstep.faults.proxies import RawNumbers, edits, numbers_of, with_numbers
from lockstep.parity.canary import Canary
from lockstep.parity.causes import CAUSES
from lockstep.parity.evidence import gather
from lockstep.parity.explain.weights.fitted_settings import settings_of
from lockstep.parity.explain.weights.trainer_hypotheses import explain
from lockstep.parity.ladder import climb
from lockstep.parity.layers import weights as layer3_weights
from lockstep.policy.variant_settings import AttentionScaled, CacheKept, NormEpsilon, SlidingWindow

HERE = [
    f
    for f in FAULTS.values()
    if "generate" in f.generations and not any(s.startswith("engine.") for s in f.sets)
]
REAL_ONLY = {
    "corrupted_completions",
    "one_norm_not_delivered",
    "fused_projection_not_delivered",
    "one_layer_scaled",
    "tensor_scaled_on_load",
    "other_checkpoint",
    "prompts_through_text",
    "better_of_two",
    "temperature_behind_the_numbers",
}
"""Their tensors are named by SmolLM2's layers; to the tiny model, whose logits are nearly flat, no token is
absurd; and its tokenizer makes five ids of one, which come to more than it has positions.
test_partial_faults.py has the last three sharper."""


@pytest.mark.parametrize("fault", [f for f in HERE if f.name not in REAL_ONLY], ids=lambda f: f.name)
def test_a_planted_fault_is_named(pair, recipe, fault):
    pair.recipe = with_sets(recipe, fault.sets)
    with planted(pair, fault):
        verdicts = climbed(pair, fault)
    statuses = [v.status for v in verdicts]
    assert "FAIL" in statuses, [v.summary for v in verdicts]
    failed = verdicts[statuses.index("FAIL")]
    assert (failed.layer, failed.findings[0].cause) == (fault.layer, fault.cause), failed
    assert statuses[: statuses.index("FAIL")] == ["PASS"] * statuses.index("FAIL")
    assert failed.findings[0].fix
    assert fault.must_say in failed.findings[0].evidence
    if fault.name == "top_p_unmodelled":  # the bias is log(kept mass)
        assert 0.0 < failed.findings[0].effect_nats <= -math.log(0.8)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_clean_pair_passes(pair, recipe, temperature, seed):
    pair.recipe = with_sets(recipe, [f"sampling.temperature={temperature}", f"parity.seed={seed}"])
    result = climb(pair)
    assert [v.status for v in result.verdicts] == ["PASS"] * 5, [
        (v.summary, v.reason) for v in result.verdicts
    ]
    assert all(v.figures["minimal_detectable_effect_nats"] >= 0.0 for v in result.verdicts)


def test_an_engine_that_starts_from_other_weights_is_found_below_semantics(pair):
    norm = pair.trainer._policy.model.get_submodule("model.layers.0.input_layernorm").weight
    with torch.no_grad():
        norm.mul_(1.05)
    try:
        failed = climb(pair).failed
        assert failed is not None
        assert (failed.layer, failed.findings[0].cause) == ("weights", "checkpoint_differs")
    finally:
        with torch.no_grad():
            norm.div_(1.05)
        pair.sync(pair.version)  # or the engine keeps the other weights for the tests after this one


def test_an_update_that_is_lost_is_found_even_where_the_sides_differ_anyway(pair, recipe):
    pair.recipe = recipe
    with planted(pair, FAULTS["rotary_base_altered"]):
        sides_differ = climb(pair).verdicts
        pair.engine = AtLoad(pair.engine, ("not_delivered",))
        lost = climb(pair).failed
    assert sides_differ[2].status == "PASS"
    assert lost is not None
    assert (lost.layer, lost.findings[0].cause) == ("weights", "not_delivered")


def test_every_cause_has_a_planted_fault_or_says_nothing_is_known():
    planted_causes = {fault.cause for fault in FAULTS.values()}
    unnamed = {cause for cause in CAUSES if cause.startswith("unexplained")}
    full_depth = {
        "chunked_prefill",
        "async_scheduling",
        "preemption",
        "systematic_departure",
    }
    of_logs = {
        "tokens_not_sampled",
        "mask_contradicted",
        "placeholder_numbers",
        "foreign_logprobs",
        "vocabulary_shifted",
    }
    of_runs = {"partly_delivered"}
    # Those of logs: test_logged_tokens.py; of runs: test_loop.py.
    assert set(CAUSES) - planted_causes == unnamed | full_depth | of_logs | of_runs
    assert len(FAULTS) >= 24


def test_a_setting_that_the_engine_resolved_otherwise_is_named(pair, session, monkeypatch):
    settings = {"hf_config.rms_norm_eps": 0.1}
    monkeypatch.setattr(
        session.pair.engine,
        "ready",
        replace(pair.engine.ready, resolved=pair.engine.ready.resolved | settings),
    )
    with in_engine(session, NormEpsilon(0.1)):
        verdicts = climb(pair).verdicts
    assert [v.status for v in verdicts[:4]] == ["PASS", "PASS", "PASS", "FAIL"], [v.summary for v in verdicts]
    found = verdicts[3].findings[0]
    assert found.cause == "model_config_differs"
    assert "rms_norm_eps is 0.1 in the engine, 1e-06 in the trainer" in found.evidence


def in_engine(session, variant):
    """The engine's own model, in this process, under a variant."""
    return variant.held(dataclasses.replace(session.pair.trainer._policy, model=session.pair.engine.model))


def test_a_setting_that_nobody_tells_is_fitted(pair, session):
    with in_engine(session, NormEpsilon(0.03)):
        found = climb(pair).verdicts[3].findings[0]
    assert found.cause == "model_config_differs"
    assert "norm epsilon of 0.03 " in found.evidence


def test_sides_that_differ_over_long_prompts_are_no_stale_cache(pair, monkeypatch):
    def off(self, completions):
        return [with_numbers(c, numbers_of(c) - 3.0) for c in completions]

    evidence = gather(pair)
    monkeypatch.setattr(pair, "engine", edits(edit_completions=off)(pair))
    verdict = layer3_weights.judge(pair, Canary.of(evidence.neutral, 64), evidence.neutral)
    assert verdict.status == "PASS", verdict.summary
    assert "no stale tensor" in verdict.summary
    assert "prefix cache" not in verdict.summary


def test_penalties_behind_raw_numbers_weigh_what_they_do_to_the_draws(pair, recipe, monkeypatch):
    pair.recipe = with_sets(recipe, ["sampling.repetition_penalty=1.5"])
    monkeypatch.setattr(pair, "engine", RawNumbers(pair))
    failed = climb(pair).failed
    assert failed is not None
    found = failed.findings[0]
    assert found.cause == "penalties_unmodelled"
    assert "raw" in found.evidence.partition(";")[0], "the numbers are the trainer's own"
    assert found.effect_nats > 0.01


@pytest.mark.parametrize(
    ("variant", "cause", "told"),
    [
        (CacheKept("fp8_e5m2"), "kv_cache_precision", "kept in fp8_e5m2 "),
        (CacheKept("fp8_e4m3, cut instead of rounded"), "kv_cache_precision", "fp8_e4m3, cut"),
        (SlidingWindow(16), "model_config_differs", "sliding window of 16 "),
        (AttentionScaled(2.5), "model_config_differs", "attention scores times 2.5 "),
    ],
)
def test_another_attention_is_named(pair, variant, cause, told):
    found = explained_under(pair, variant)
    assert found.cause == cause, found
    assert told in found.evidence


@pytest.mark.parametrize(
    "told", ["a rotary base of 5e+04 ", "positions divided by 4 ", "logits capped at 6 "]
)
def test_another_setting_is_fitted(pair, told):
    with torch.no_grad():
        pair.trainer._policy.head.mul_(40.0)  # or the tiny model's logits are too small for any cap
    try:
        setting = next(s for s in settings_of(pair.trainer) if told.startswith(s.told.partition("{")[0]))
        found = explained_under(pair, setting.variant(float(told.split()[-1])))
    finally:
        with torch.no_grad():
            pair.trainer._policy.head.div_(40.0)
    assert found.cause == "model_config_differs", found
    assert f"with {told}the trainer" in found.evidence


def explained_under(pair, variant):
    """What explains an engine that computes as the trainer does under ``variant``."""
    sample = gather(pair).own
    with pair.trainer.holding(variant):
        numbers = sample.scored(pair.trainer)
    sample.fill(engine_logprobs=numbers)
    return explain(pair, sample, sample.scored(pair.trainer) - numbers)
