"""Figures against closed forms; a non-finite token is never dropped."""

import math

import numpy as np
import pytest

from lockstep.metrics.catalog import ALIASES, BY_NAME, METRICS
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


def test_names_and_aliases_are_unique():
    assert len(BY_NAME) == len(METRICS)
    assert len(ALIASES) == sum(len(m.aliases) for m in METRICS)
    assert all(m.estimator for m in METRICS)
