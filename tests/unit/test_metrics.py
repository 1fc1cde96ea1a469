"""Figures against closed forms; a non-finite token is never dropped."""

import math

import numpy as np
import pytest

from lockstep.errors import UsageError
from lockstep.metrics.aliases import ALIASES, alias_named, exported
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


def test_an_alias_is_of_a_figure_and_means_one_thing_in_a_system():
    assert {alias.ours for alias in ALIASES} <= BY_NAME.keys()
    assert len({(alias.system, alias.name) for alias in ALIASES}) == len(ALIASES)


def test_only_names_whose_formula_is_the_same_are_exported():
    metrics = {"reward_mean": 0.5, "mismatch_ratio_mean": 1.1, "grad_norm": 2.0}
    assert exported(metrics, "trl") == {"reward": 0.5, "grad_norm": 2.0}
    assert exported(metrics, "pipelinerl") == {"stats/grad_norm": 2.0}
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
