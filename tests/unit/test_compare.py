"""``lockstep compare``: verdicts by simulation, since when, which layer, and what one seed may say."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from typer import Exit

from lockstep.cli.compare import compare as command
from lockstep.errors import UsageError
from lockstep.report.arms import read_arms
from lockstep.report.bands import band_of, onset
from lockstep.report.compare import against, compare
from lockstep.report.pattern import Since, points_at
from lockstep.report.statistics import LEVEL, Judged, SeedMeans, judge_all
from lockstep.report.student import cdf, quantile, two_sided
from lockstep.report.trajectories import Arm, Trajectory

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def calibration():
    spec = importlib.util.spec_from_file_location("calibration", BENCHMARKS / "compare_calibration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("chance", "freedom", "t"),  # printed tables of Student's distribution
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.95, 4, 2.13185),
        (0.995, 10, 3.16927),
        (0.975, 120, 1.97993),
    ],
)
def test_students_t_is_that_of_the_tables(chance, freedom, t):
    assert quantile(chance, freedom) == pytest.approx(t, abs=1e-4)
    assert quantile(1 - chance, freedom) == pytest.approx(-t, abs=1e-4)
    assert cdf(t, freedom) == pytest.approx(chance, abs=1e-6)
    assert two_sided(-t, freedom) == pytest.approx(2 * (1 - chance), abs=2e-6)


@pytest.mark.parametrize(("seeds", "shared"), [(3, 0.0)])
def test_identical_configurations_are_called_different_in_five_of_a_hundred_at_most(
    calibration, seeds, shared
):
    row = calibration.calibrated(seeds, shared, 0.0)
    assert row.pairs >= 200
    # Of 200 at a chance of .05, 17 or more come with a chance of 3 %.
    assert row.any_different <= 16 / 200


def test_a_shift_of_one_spread_is_found_at_the_stated_number_of_seeds(calibration):
    stated = int(calibration.calibrated(8, 0.8, 1.0, pairs=60).stated)
    assert 8 < stated < 25
    found = calibration.calibrated(stated, 0.8, 1.0, pairs=100)
    assert found.first_different >= 0.68, "80 % less three standard errors of 100 pairs"
    assert found.first_equivalent <= LEVEL + 0.07, "a shift of the margin itself is equivalent in 5 %"


def test_the_committed_table_is_of_these_cases_and_keeps_the_limit(calibration):
    table = json.loads(calibration.OUT.read_text())
    assert table["pairs"] >= 200
    assert [(r["seeds"], r["shared"], r["shift"]) for r in table["rows"]] == [
        tuple(c) for c in calibration.CASES
    ]
    assert max(r["any_different"] for r in table["rows"] if r["shift"] == 0.0) <= LEVEL
    assert all(r["any_different"] == 0.0 for r in table["rows"] if r["seeds"] == 1)


def arm(name, levels, steps=30, at=0, figure="reward_mean", jump=0.0, seeds=True, noise=0.1):
    random = np.random.default_rng(len(levels))
    runs = []
    for seed, level in enumerate(levels):
        values = level + noise * random.normal(size=steps) + jump * (np.arange(steps) >= at)
        runs.append(
            Trajectory(
                name,
                np.arange(steps, dtype=float),
                {figure: values},
                {figure: np.zeros(steps, bool)},
                {figure: figure},
                str(seed) if seeds else "",
            )
        )
    return Arm(name, tuple(runs))


def test_one_seed_is_never_called_different_however_far():
    found = against(arm("a", [0.0]), arm("b", [100.0]), ["reward_mean"])
    assert (found.verdict, found.figures[0].verdict, found.figures[0].seeds_needed) == (
        "NOT_RUN",
        "not separable",
        2,
    )
    assert "one seed" in found.figures[0].reason
    mixed = against(arm("a", [0.0, 0.1, 0.2]), arm("b", [100.0]), ["reward_mean"])
    assert mixed.figures[0].verdict == "not separable"


def test_the_same_values_are_equivalent_with_one_seed_too():
    found = against(arm("a", [0.5]), arm("b", [0.5]), ["reward_mean"])
    assert (found.verdict, found.figures[0].verdict) == ("PASS", "equivalent")
    assert found.figures[0].reason == "every value of every step is the same"


def test_a_large_difference_of_three_seeds_is_found_with_its_step():
    levels = [0.0, 0.05, -0.05]
    found = compare([arm("a", levels), arm("b", levels, at=12, jump=1.0)])
    figure = found.against[0].figures[0]
    assert (found.verdict, figure.verdict, figure.paired) == ("FAIL", "different", True)
    assert 10 <= figure.since_step <= 13
    assert [series.arm for series in found.series] == ["a", "b"]


def test_pairs_that_go_together_are_equivalent_with_few_seeds():
    levels = [0.0, 2.0, -2.0, 1.0]
    found = against(arm("a", levels), arm("b", [level + 0.01 for level in levels]), ["reward_mean"])
    assert found.figures[0].verdict == "equivalent"
    unpaired = against(
        arm("a", levels, seeds=False), arm("b", levels[::-1], seeds=False, noise=0.2), ["reward_mean"]
    )
    assert unpaired.figures[0].verdict == "not separable"
    assert unpaired.figures[0].seeds_needed > 4


def test_a_value_that_is_not_finite_is_told_and_decides_nothing():
    sick = arm("b", [5.0, 5.1, 5.2])
    sick.runs[1].figures["reward_mean"][3] = np.nan
    figure = against(arm("a", [0.0, 0.1, 0.2]), sick, ["reward_mean"]).figures[0]
    assert figure.verdict == "not separable"
    assert "1 of 180 values are not finite" in figure.notes


def test_many_figures_share_one_chance_of_error():
    random = np.random.default_rng(3)
    a = 0.1 * random.normal(size=8)
    apart = np.linspace(-1.0, 1.0, 8)
    p02 = SeedMeans(a, a + 1.0 + apart * 0.975 / apart.std(ddof=1), True)  # t = 2.9 over 7 degrees of freedom
    alone = judge_all({"x": p02})["x"]
    assert alone.verdict == "different"
    assert 0.01 < alone.p < 0.05
    crowd = {f"y{n}": SeedMeans(a, a + random.normal(size=8), True) for n in range(20)}
    assert judge_all({"x": p02} | crowd)["x"].verdict != "different"


@pytest.mark.parametrize("at", [0, 7, 25])
def test_an_onset_is_found_within_a_block_and_noise_has_none(at):
    random = np.random.default_rng(at)
    noise = random.normal(size=60) * 0.05
    assert onset(noise) is None
    assert abs(onset(noise + 0.5 * (np.arange(60) >= at)) - at) <= 2
    assert onset(0.5 * (np.arange(60) < 30) + noise) is None, "what comes back did not part"


def test_a_band_covers_the_mean_of_seeds():
    random = np.random.default_rng(5)
    covered = []
    for draw in range(10):
        band = band_of(random.normal(size=(8, 1)) + 0.3 * random.normal(size=(8, 30)), seed=draw)
        covered.append((band.low[15] < 0.0) & (band.high[15] > 0.0))
    assert np.mean(covered) > 0.6


def judged(verdict):
    return Judged(verdict, 1.0, (0.9, 1.1), 0.1, 0.001, 3, True, 0)


@pytest.mark.parametrize(
    ("different", "since", "layer"),
    [
        (["mismatch_ratio_mean", "gap_abs_mean_nats", "clip_fraction"], 0, "semantics"),
        (["gap_abs_mean_nats"], 0, "numerics"),
        (["gap_abs_mean_nats", "clip_fraction"], 9, "weights"),
        (["gap_abs_max_nats"], 0, "path"),
        (["lag_steps", "clip_fraction"], 5, "weights"),
        (["clip_fraction"], 3, "objective"),
        (["reward_mean"], 3, ""),
        ([], 0, ""),
    ],
)
def test_a_pattern_points_at_the_first_layer_it_is_typical_of(different, since, layer):
    names = [
        "reward_mean",
        "clip_fraction",
        "lag_steps",
        "gap_abs_mean_nats",
        "mismatch_ratio_mean",
        "gap_abs_max_nats",
    ]
    figures = {name: judged("different" if name in different else "equivalent") for name in names}
    assert points_at(figures, {name: Since(since) for name in names}).layer == layer


def test_where_peers_log_one_ratio_a_clip_rate_of_the_first_step_is_of_semantics():
    figures = {name: judged("different") for name in ("outside_clip_fraction", "policy_kl_k3_nats")}
    assert points_at(figures, {name: Since(0) for name in figures}).layer == "semantics"
    assert points_at(figures, {name: Since(9) for name in figures}).layer == "weights"


def write_csv(path, shift=0.0, names=("global_step", "rl/kl_new_old", "rl/reward"), steps=20, seed=0):
    random = np.random.default_rng(seed)
    rows = [",".join(names)]
    rows += [
        f"{s},{0.01 + shift + 0.001 * random.normal()},{0.1 * s + random.normal() * 0.01}"
        for s in range(steps)
    ]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_csv_files_of_a_peer_are_compared_under_the_catalogs_names(tmp_path, capsys):
    a = [str(write_csv(tmp_path / f"a{n}.csv", seed=n)) for n in range(3)]
    b = [str(write_csv(tmp_path / f"b{n}.csv", 0.2, seed=10 + n)) for n in range(3)]
    with pytest.raises(Exit) as ended:
        command([f"blue={','.join(a)}", f"red={tmp_path}/b*.csv"])
    assert ended.value.exit_code == 1
    shown = capsys.readouterr().out
    assert "red against blue" in shown
    line = next(line for line in shown.splitlines() if "policy_kl_k3_nats" in line)
    assert "different" in line
    assert "logged as rl/kl_new_old" in line
    assert "points at  semantics" in shown
    assert len(b) == 3


def test_a_configuration_is_named_once_and_two_are_needed(tmp_path):
    a = write_csv(tmp_path / "a.csv")
    with pytest.raises(UsageError, match="twice"):
        read_arms([f"x={a}", f"x={a}"], {})
    with pytest.raises(UsageError, match="one configuration"):
        compare(read_arms([str(a)], {}))
    with pytest.raises(UsageError, match="nothing there"):
        read_arms([str(tmp_path / "none")], {})


def test_a_figure_that_two_systems_log_by_two_formulas_is_not_compared(tmp_path):
    write_csv(tmp_path / "theirs.csv")
    write_csv(tmp_path / "ours.csv", names=("step", "policy_kl_k3_nats", "reward_mean"))
    write_csv(tmp_path / "lag.csv", names=("step", "stats/lag", "reward_mean"))
    write_csv(tmp_path / "steps.csv", names=("step", "lag_steps", "reward_mean"))
    lag = compare(read_arms([str(tmp_path / "steps.csv"), str(tmp_path / "lag.csv")], {})).against[0]
    assert "lag_steps" not in [figure.name for figure in lag.figures]
    assert any("in samples there, in versions here" in told for told in lag.not_compared)
    alike = compare(read_arms([f"a={tmp_path / 'lag.csv'}", f"b={tmp_path / 'lag.csv'}"], {})).against[0]
    assert "lag_steps" in [figure.name for figure in alike.figures]
