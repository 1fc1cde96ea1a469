"""Layer 2 on constructed evidence.

Each way in which an engine may disagree with itself is named, with its size, and no other.
"""

from dataclasses import replace

import numpy as np
import pytest

from lockstep.parity.evidence import gather
from lockstep.parity.explain.path.corruption import corrupted
from lockstep.parity.layers import path
from tests.unit.bag_pair import bag_pair

OFF = 0.01
"""Ten times what fp32 allows in the tail."""
ALONE = 4 * 12
"""Tokens that are re-scored by themselves."""
NEUTRAL = 8 * 12
WARM = 8 * 8


def judged(pair, evidence=None):
    return path.judge(pair, evidence or gather(pair))


def causes(verdict):
    return [found.cause for found in verdict.findings]


def test_an_engine_that_agrees_with_itself_passes_and_says_over_how_few_tokens_its_floor_was_measured():
    verdict = judged(bag_pair())
    assert (verdict.status, verdict.n_tokens) == ("PASS", ALONE + NEUTRAL + WARM)
    assert verdict.figures["batch_composition_n_tokens"] == ALONE
    assert verdict.figures["decode_vs_prefill_abs_max_nats"] < 1e-6
    assert f"the floor is of {ALONE} tokens in a batch of 8" in verdict.summary


def test_scores_that_depend_on_the_batch_are_named_with_their_size():
    pair = bag_pair()
    pair.engine.scores = lambda scores, n: scores + np.float32(OFF) if n == 1 else scores
    verdict = judged(pair)
    assert causes(verdict) == ["batch_composition"]
    assert verdict.findings[0].effect_nats == pytest.approx(OFF, rel=1e-3)
    assert verdict.findings[0].n_tokens == ALONE
    assert verdict.figures["batch_composition_abs_p50_nats"] == pytest.approx(OFF, rel=1e-3)


def test_each_row_is_held_against_its_own_score_in_the_batch():
    """Were the rows mixed up, scores that differ by row would not cancel."""
    pair = bag_pair()
    evidence = gather(pair)
    shift = np.arange(8, dtype=np.float32)[evidence.neutral.owners]
    rows = {ids.tobytes(): row for row, ids in enumerate(evidence.neutral.sequences)}
    of = pair.engine._of
    pair.engine._of = lambda ids, t: of(ids, t) + np.float32(rows.get(ids.tobytes(), 0))
    verdict = judged(pair, replace(evidence, rescored=evidence.rescored + shift))
    assert verdict.figures["batch_composition_abs_max_nats"] < 1e-5


def test_decoding_that_is_another_than_prefill_is_named_alone():
    pair = bag_pair()
    evidence = gather(pair)
    evidence.neutral.fill(engine_logprobs=evidence.neutral.engine_logprobs - np.float32(OFF))
    verdict = judged(pair, evidence)
    assert causes(verdict) == ["decode_vs_prefill"]
    assert verdict.findings[0].effect_nats == pytest.approx(OFF, rel=1e-3)
    assert verdict.figures["prefix_cache_abs_max_nats"] < 1e-6


def test_numbers_off_only_over_a_warm_cache_are_the_caches():
    pair, served = bag_pair(), set()

    def cached(numbers, prompt, ids):
        warm = prompt.tobytes() in served
        served.add(prompt.tobytes())
        return numbers + np.float32(OFF) * warm

    pair.engine.numbers = cached
    verdict = judged(pair)
    assert causes(verdict) == ["prefix_cache"]
    assert verdict.findings[0].n_tokens == WARM
    assert "disagrees with itself: prefix cache" in verdict.summary


def off_at_its_own(pair):
    evidence = gather(pair)
    assert evidence.own is not evidence.neutral
    evidence.own.fill(engine_logprobs=evidence.own.engine_logprobs + np.float32(OFF))
    return judged(pair, evidence)


def test_the_recipes_own_temperature_is_compared_where_the_engine_can_rescore_at_it():
    verdict = off_at_its_own(bag_pair(sampling={"temperature": 0.7}))
    assert causes(verdict) == ["decode_vs_prefill"]
    assert verdict.findings[0].effect_nats == pytest.approx(OFF / 2, rel=1e-2), (
        "half of the tokens are those at T = 1"
    )


@pytest.mark.parametrize(
    ("without", "sampling"),
    [
        (["rescore_at_temperature"], {"temperature": 0.7}),
        ([], {"temperature": 0.7, "top_k": 5}),
        ([], {"temperature": 0.7, "presence_penalty": 0.5}),
    ],
)
def test_where_it_cannot_the_pass_says_that_it_is_of_temperature_1(without, sampling):
    verdict = off_at_its_own(bag_pair(without, sampling=sampling))
    assert verdict.status == "PASS"
    assert "(at T=1)" in verdict.summary


def test_one_number_that_is_none_fails_and_is_counted():
    pair = bag_pair()
    evidence = gather(pair)
    numbers = evidence.neutral.engine_logprobs.copy()
    numbers[17] = np.nan
    evidence.neutral.fill(engine_logprobs=numbers)
    verdict = judged(pair, evidence)
    assert causes(verdict) == ["decode_vs_prefill"]
    assert f"1 non-finite of {NEUTRAL}" in verdict.findings[0].evidence
    assert np.isnan(verdict.findings[0].ci95).all(), "no interval is made up for it"


def test_the_limit_is_that_of_the_engines_own_dtype():
    pair = bag_pair()
    pair.engine.scores = lambda scores, n: scores + np.float32(OFF) if n == 1 else scores
    pair.engine.ready.resolved["worker.parameter_dtype"] = "torch.bfloat16"
    verdict = judged(pair)
    assert verdict.status == "PASS"
    assert verdict.figures["minimal_detectable_effect_nats"] == pair.engine_noise.p50 > OFF


def absurd(evidence, rows, tokens=3, by=9.0):
    """Evidence in which the engine was sure of a few tokens of some rows that its re-score finds absurd."""
    rescored = evidence.rescored.copy()
    for row in rows:
        rescored[np.flatnonzero(evidence.neutral.owners == row)[:tokens]] -= np.float32(by)
    return replace(evidence, rescored=rescored)


def test_a_completion_of_absurd_tokens_is_shown_and_is_not_called_a_fault_of_decoding():
    pair = bag_pair()
    evidence = absurd(gather(pair), [6])
    verdict = judged(pair, evidence)
    assert causes(verdict) == ["corrupted_completions"]
    text = pair.renderer.text(evidence.neutral[6].token_ids)
    assert "1 of 8 completions hold 3 tokens" in verdict.findings[0].evidence
    assert ascii(text) in verdict.findings[0].evidence
    assert verdict.findings[0].effect_nats == pytest.approx(3 * 9.0 / NEUTRAL, rel=1e-3)


def test_corruption_is_of_a_minority_among_rows_that_agree():
    pair = bag_pair()
    evidence = gather(pair)
    assert corrupted(pair, evidence.neutral, evidence.rescored) is None
    few = corrupted(pair, evidence.neutral, absurd(evidence, [1, 4, 6, 7]).rescored)
    assert few is not None
    assert (few.rows, few.n_rows, few.n_tokens) == ([1, 4, 6, 7], 8, 12)
    assert corrupted(pair, evidence.neutral, absurd(evidence, [0, 1, 4, 6, 7]).rescored) is None, "most rows"
    assert corrupted(pair, evidence.neutral, absurd(evidence, [6], by=4.9).rescored) is None, (
        "unlikely, and not absurd"
    )
    assert corrupted(pair, evidence.neutral, absurd(evidence, [6]).rescored + np.float32(OFF)) is None, (
        "the others are off too"
    )
    likelier = absurd(evidence, [6], by=-9.0).rescored
    assert corrupted(pair, evidence.neutral, likelier) is None, "the engine was not sure of them"


def test_most_rows_absurd_is_a_fault_of_decoding(monkeypatch):
    monkeypatch.setattr(path, "ALONE", 3)
    pair = bag_pair()
    assert causes(judged(pair, absurd(gather(pair), [3, 4, 5, 6, 7]))) == ["decode_vs_prefill"]


def test_what_fails_the_floor_is_no_yardstick_for_decoding():
    """Scores of one row that are another alone than in the batch.

    Decoding is not blamed for what was compared with them.
    """
    pair = bag_pair()
    assert causes(judged(pair, absurd(gather(pair), range(8)))) == ["batch_composition"]


def test_the_trainer_is_a_witness_of_corruption_only_where_it_confirms_the_engines_scores():
    pair = bag_pair(sampling={"temperature": 0.7})
    evidence = gather(pair)
    trainer = evidence.own_trainer.copy()
    trainer[np.flatnonzero(evidence.own.owners == 5)[:2]] -= 9.0
    evidence = replace(evidence, own_trainer=trainer)
    assert causes(judged(pair, evidence)) == ["corrupted_completions"]
    strange = replace(evidence, trainer=evidence.trainer + np.float32(OFF))
    assert judged(pair, strange).status == "PASS", "a trainer that is off itself says nothing of the engine"
