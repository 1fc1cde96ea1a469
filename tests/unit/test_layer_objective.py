"""Layer 5 on constructed rehearsals: which is what the certificate predicts; what the others are called."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from lockstep.errors import DivergenceError
from lockstep.parity.layers import objective
from lockstep.parity.tolerances import LOSS_SLACK
from lockstep.training.rehearsal import Rehearsal
from tests.unit.bag_pair import bag_pair

T = 200
EPS = float(np.finfo(np.float32).eps)


def rehearsal(gap=1e-5, log_ratio=0.0, loss=0.25, moved=0.0):
    """Of 16 samples; a number stands for all tokens, or is of one of them: (token, value)."""

    def of(value):
        if not isinstance(value, tuple):
            return np.full(T, value, np.float32)
        filled = np.zeros(T, np.float32)
        filled[value[0]] = value[1]
        return filled

    return Rehearsal(of(gap), of(log_ratio), 0.0, loss, loss + moved, np.arange(T) * 16 // T)


def judged(monkeypatch, found, **sections):
    pair = bag_pair(**sections)
    seen = []

    def rehearse(rollouts, recipe):
        seen.append((rollouts, recipe))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(pair.trainer, "rehearse", rehearse)
    return objective.judge(pair, 3), *seen[0]


def test_what_is_as_predicted_passes_with_its_bound(monkeypatch):
    verdict, _, _ = judged(monkeypatch, rehearsal(gap=1e-4, moved=5e-5))
    assert (verdict.status, verdict.n_tokens) == ("PASS", T)
    assert verdict.figures["loss_bound"] == pytest.approx(LOSS_SLACK * np.expm1(1e-4), rel=1e-6)
    assert verdict.figures["loss_with_engine_old"] - verdict.figures[
        "loss_with_trainer_old"
    ] == pytest.approx(5e-5)


@pytest.mark.parametrize(
    ("found", "cause", "effect"),
    [
        (rehearsal(log_ratio=(7, 1e-6)), "policy_ratio_at_lag_0", 1e-6 / T),
        (rehearsal(log_ratio=(7, np.nan)), "policy_ratio_at_lag_0", np.nan),
        # What the others follow from.
        (rehearsal(log_ratio=1e-3, gap=0.5, moved=1.0), "policy_ratio_at_lag_0", 1e-3),
        (rehearsal(gap=0.5), "task_tokens_differ", 0.5),
        (rehearsal(gap=(150, np.nan)), "task_tokens_differ", np.nan),
        (rehearsal(gap=0.5, moved=9.0), "task_tokens_differ", 0.5),
        (rehearsal(gap=1e-5, moved=1e-3), "loss_not_explained", 1e-5),
        (rehearsal(gap=1e-5, moved=np.nan), "loss_not_explained", 1e-5),
        (rehearsal(gap=0.0, moved=-1e-3), "loss_not_explained", 0.0),
    ],
)
def test_what_is_not_is_named_with_its_size(monkeypatch, found, cause, effect):
    verdict, _, _ = judged(monkeypatch, found)
    assert verdict.status == "FAIL"
    assert [named.cause for named in verdict.findings] == [cause]
    assert verdict.findings[0].effect_nats == pytest.approx(effect, rel=1e-5, nan_ok=True)
    assert verdict.findings[0].n_tokens == T


SHORT = bag_pair(sampling={"max_tokens": 1})


@settings(max_examples=30)
@given(gap=st.floats(0.0, 9e-4), share=st.floats(0.0, 3.0))
def test_the_loss_may_move_by_what_the_largest_gap_brings_and_by_no_more(gap, share):
    bound = LOSS_SLACK * float(np.expm1(np.float32(gap)))
    pair = SHORT
    found = rehearsal(gap=gap, loss=0.0, moved=share * bound)
    pair.trainer.rehearse = lambda rollouts, recipe: found
    verdict = objective.judge(pair, 3)
    if share * bound <= bound:
        assert verdict.status == "PASS"
    elif share * bound > bound + 2 * EPS:
        assert verdict.findings[0].cause == "loss_not_explained"


def test_numbers_that_the_training_code_refuses_are_the_engines(monkeypatch):
    verdict, _, _ = judged(monkeypatch, DivergenceError("objective", got="loss nan", expected="", hint=""))
    assert [named.cause for named in verdict.findings] == ["task_tokens_differ"]
    assert "loss nan" in verdict.summary


def test_rollouts_are_the_tasks_own_with_advantages_of_both_signs_in_one_minibatch(monkeypatch):
    training = {"steps": 1, "minibatches": 4, "prompts_per_step": 8, "group_size": 2}
    _, rollouts, recipe = judged(monkeypatch, rehearsal(), training=training)
    assert recipe.training.minibatches == 1
    assert (rollouts.group_size, len(rollouts)) == (objective.GROUP, objective.PROMPTS * objective.GROUP)
    assert {s.advantages[0] for s in rollouts} == {-1.0, 1.0}
    by_sample = np.array([s.advantages[0] for s in rollouts])
    assert (by_sample[::2] == -by_sample[1::2]).all(), "each group has both"


def test_an_objective_of_the_users_is_judged_as_grpo_and_the_verdict_says_so(monkeypatch):
    pair = bag_pair()
    pair.recipe = replace(
        pair.recipe, objective=replace(pair.recipe.objective, name="theirs:loss", options={"beta": 1})
    )
    seen = []
    monkeypatch.setattr(pair.trainer, "rehearse", lambda rollouts, recipe: seen.append(recipe) or rehearsal())
    verdict = objective.judge(pair, 3)
    assert (seen[0].objective.name, seen[0].objective.options) == ("grpo", {})
    assert verdict.summary.endswith("(grpo in the place of theirs:loss)")


def test_the_real_rehearsal_of_a_pair_passes_and_leaves_its_weights():
    pair = bag_pair(sampling={"max_tokens": 12, "temperature": 0.7})
    before = pair.trainer.weights()
    verdict = objective.judge(pair, 3)
    assert verdict.status == "PASS"
    assert verdict.figures["policy_ratio_mean"] == 1.0
    assert all((before[name] == now).all() for name, now in pair.trainer.weights().items())


def test_an_engine_whose_task_numbers_are_off_is_found_by_the_real_rehearsal():
    pair = bag_pair()
    pair.engine.numbers = lambda numbers, *_: numbers - np.float32(0.02)
    verdict = objective.judge(pair, 3)
    assert verdict.findings[0].cause == "task_tokens_differ"
    assert verdict.findings[0].effect_nats == pytest.approx(0.02, rel=1e-3)
