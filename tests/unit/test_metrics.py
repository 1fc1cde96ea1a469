"""Figures against closed forms; a non-finite token is never dropped."""

import math

import numpy as np
import pytest

from lockstep.config.recipe import Recipe, parse_recipe
from lockstep.errors import UsageError
from lockstep.metrics.aliases import ALIASES, SYSTEMS, alias_named, aliases_of, exported, left_out
from lockstep.metrics.catalog import BY_NAME, METRICS
from lockstep.metrics.reduce import (
    bootstrap_mean_ci95,
    effective_sample_size,
    kl_k3,
    mismatch_figures,
    outside_clip,
    quantiles_abs,
)


def test_ess_is_one_for_equal_ratios_and_one_in_n_for_one_heavy_token():
    assert effective_sample_size(np.full(10, 0.3)) == pytest.approx(1.0)
    assert effective_sample_size(np.array([50.0, 0, 0, 0])) == pytest.approx(0.25)


def test_k3_is_its_formula_and_never_negative():
    gap = np.array([0.1, -0.2, 0.0])
    assert kl_k3(gap) == pytest.approx(np.mean(np.exp(gap) - gap - 1))
    assert kl_k3(gap) > 0


def test_a_mean_that_cancels_is_seen_by_the_tail():
    gap = np.array([0.4, -0.4] * 50)
    figures = mismatch_figures(gap, 0.2, 0.2)
    assert figures["gap_abs_max_nats"] == pytest.approx(0.4)
    assert figures["phantom_clip_fraction"] == 1.0


def test_a_nan_makes_the_figures_nan_and_counts_as_clipped():
    gap = np.array([0.0, math.nan, 0.0])
    assert all(math.isnan(value) for value in quantiles_abs(gap).values())
    assert outside_clip(gap, 0.2, 0.2).tolist() == [False, True, False]
    assert math.isnan(mismatch_figures(gap, 0.2, 0.2)["gap_abs_mean_nats"])


def test_the_bootstrap_resamples_completions_not_tokens():
    owners = np.repeat(np.arange(40), 25)
    values = np.repeat(np.random.default_rng(0).normal(1.0, 0.5, 40), 25)
    low, high = bootstrap_mean_ci95(values, owners)
    assert low < 1.0 < high
    assert 0.2 < high - low < 0.45  # 4 σ / √40 completions = 0.32; over 1000 tokens it would be 0.06


def test_every_figure_says_all_of_itself():
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert metric.formula, metric.name
        assert metric.estimator, metric.name
        assert metric.reduction, metric.name
        assert metric.mask, metric.name
        assert (metric.clipping == "before") <= bool(metric.denominator), metric.name


def recipe_with(**sections) -> Recipe:
    table = {
        "model": {"path": "m"},
        "task": {"name": "reasoning_gym:basic_arithmetic"},
        "sampling": {"max_tokens": 4},
        "training": {"steps": 1},
    }
    return parse_recipe(
        {name: table.get(name, {}) | sections.get(name, {}) for name in {*table, *sections}}, ""
    )


def test_an_alias_is_of_a_figure_or_refused_and_means_one_thing_in_a_system():
    assert {alias.ours for alias in ALIASES if alias.ours} <= BY_NAME.keys()
    assert all(alias.ours or alias.differs for alias in ALIASES)
    assert len({(alias.system, alias.name) for alias in ALIASES}) == len(ALIASES)


def test_only_names_whose_formula_is_the_same_are_exported():
    metrics = {"reward_mean": 0.5, "mismatch_ratio_mean": 1.1, "grad_norm": 2.0}
    recipe = recipe_with()
    assert exported(metrics, aliases_of("trl", recipe)) == {"reward": 0.5, "grad_norm": 2.0}
    assert exported(metrics, aliases_of("pipelinerl", recipe)) == {"rl/reward": 0.5, "stats/grad_norm": 2.0}
    with pytest.raises(UsageError, match="not that of any figure here: it is k1"):
        alias_named("rollout_corr/kl")
    with pytest.raises(UsageError, match="not that of mismatch_ratio_mean: the ratio is bounded"):
        alias_named("sampling/importance_sampling_ratio/mean")
    with pytest.raises(UsageError, match="'entropy' perhaps"):
        alias_named("entrpy", "trl")
    assert alias_named("critic/score/mean").ours == "reward_mean"


def test_trls_gap_is_the_same_formula_and_verls_probability_gap_is_not():
    """Both written out as those systems have them, on the same tokens."""
    engine = np.log([0.5, 0.01, 0.2])
    trainer = np.log([0.4, 0.02, 0.2])
    ours = mismatch_figures(trainer - engine, 0.2, 0.2)
    assert ours["gap_abs_mean_nats"] == pytest.approx(np.abs(trainer - engine).mean())
    assert ours["gap_abs_mean_nats"] != pytest.approx(
        np.abs(np.exp(trainer) - np.exp(engine)).mean(), rel=0.5
    )
    ratio = np.exp(trainer - engine)
    assert ours["mismatch_kl_k3_nats"] == pytest.approx((ratio - np.log(ratio) - 1).mean())
    assert ours["mismatch_ratio_mean"] != pytest.approx(np.minimum(ratio, 1.5).mean(), rel=0.05)


REGION, LENGTH = "clip_ratio/region_mean", "completions/clipped_ratio"
ENVIRONMENT = {"environment": "lockstep.rollout.environments.calculator:Calculator"}


@pytest.mark.parametrize(
    ("sections", "lost"),
    [
        ({}, set()),
        ({"objective": {"options": {"dual_clip": 3.0}}}, {REGION}),
        ({"objective": {"old_logprobs": "engine"}}, {REGION}),
        ({"objective": {"name": "dpo"}}, {REGION}),
        ({"objective": {"name": "cispo"}}, {REGION}),
        ({"sampling": {"stop_token_ids": [5]}}, {LENGTH}),
        ({"task": ENVIRONMENT}, {LENGTH}),
    ],
)
def test_what_is_the_same_under_some_recipes_is_exported_under_those_alone(sections, lost):
    names = {alias.name for alias in aliases_of("trl", recipe_with(**sections))}
    assert {REGION, LENGTH} - names == lost


def test_trls_clip_ratio_leaves_out_what_the_dual_clip_takes():
    """Its formula (grpo_trainer.py, 1.16), beside the tokens that GRPO's loss here says are clipped."""
    import torch

    from lockstep.objectives.grpo import grpo
    from tests.unit.loss_inputs import inputs_of

    r = torch.tensor([0.7, 1.5, 5.0, 1.0])
    a = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    given = inputs_of(r.log(), torch.zeros(4), a)
    theirs = ((r < 0.8) & (a < 0)) | ((r > 1.2) & (a > 0))
    plain = grpo(given, clip_low=0.2, clip_high=0.2, dual_clip=math.inf).clipped
    assert plain.tolist() == theirs.tolist() == [True, True, False, False]
    assert grpo(given, clip_low=0.2, clip_high=0.2, dual_clip=3.0).clipped.tolist()[2]


@pytest.mark.parametrize(
    "name",
    [
        *("cispo_clip_ratio", "clip_ratio/low_min", "clip_ratio/high_max", "completions/min_length"),
        *("completions/max_terminated_length", "actor/pg_clipfrac_lower", "rollout_corr/kl", "rl/kl"),
        *("training/rollout_actor_probs_pearson_corr", "sample/dropped_stale_total"),
        *("sample/rollout_queue_size", "stats/samples_too_old_to_train", "actor/result_queue_size"),
    ],
)
def test_a_peers_name_that_is_not_exported_is_refused_with_the_reason(name):
    with pytest.raises(UsageError, match=r"a formula that is not .*: \w+"):
        alias_named(name)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_is_told_how_many_names_it_does_not_get_and_where_it_says_why(system):
    said = left_out(system, recipe_with())
    n_given = len(aliases_of(system, recipe_with()))
    n_others = sum(alias.system == system for alias in ALIASES) - n_given
    assert f"{n_given} names of {system} go to the sinks, {n_others} do not" in said
    assert f"lockstep metrics --aliases {system}" in said


def test_what_is_another_statistic_is_not_taken_for_the_nearest_one_in_a_log():
    """A log with the shortest length before the mean one: the mean is compared."""
    from lockstep.report.trajectories import trajectory

    row = {"completions/min_length": 1.0, "completions/mean_length": 4.0}
    found = trajectory("log", [(0.0, row)], {})
    assert found.figures["completion_tokens_mean"].tolist() == [4.0]
