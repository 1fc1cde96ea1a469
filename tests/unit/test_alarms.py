"""Alarms: each rule fires on its own figure, clean figures are silent, one alarm a step, told once."""

import pytest

from lockstep.parity.alarms import Watch
from lockstep.runs.layout import RunLayout
from lockstep.runs.manifest import write_manifest
from lockstep.runs.read import open_run
from lockstep.runs.record import open_recorder
from tests.unit.test_runs import manifest

CLEAN = {
    "mismatch_ess": 0.9999,
    "mismatch_ratio_mean": 1.0,
    "phantom_clip_fraction": 0.0,
    "gap_abs_p50_nats": 1e-5,
    "lag_steps": 0.0,
    "flat_group_fraction": 0.3,
    "reward_mean": 0.4,
    "entropy_mean_nats": 1.8,
    "completion_tokens_mean": 40.0,
}
OFF = {
    "mismatch": {"mismatch_ess": 0.7},
    "gap drift": {"gap_abs_p50_nats": 3e-3},
    "lag": {"lag_steps": 1.5},
    "flat groups": {"flat_group_fraction": 0.95},
    "entropy collapse": {"entropy_mean_nats": 0.05},
    "length collapse": {"completion_tokens_mean": 6.0},
}


def watch(**others):
    found = Watch(gap_p50=1e-3, **others)
    assert found.look(0, CLEAN) is None
    return found


@pytest.mark.parametrize("name", OFF)
def test_a_figure_that_is_off_is_told_once_and_again_after_it_was_well(name):
    looks = watch()
    off = CLEAN | OFF[name]
    told = [looks.look(step, figures) for step, figures in enumerate([off, off, CLEAN, off], 1)]
    assert [alarm and (alarm.name, alarm.step) for alarm in told] == [(name, 1), None, None, (name, 4)]


@pytest.mark.parametrize(("fresh", "said"), [(4e-3, "the two sides differ now"), (1e-5, "earlier versions")])
def test_a_drift_in_flight_is_held_against_what_is_not_stale(fresh, said):
    off = CLEAN | OFF["gap drift"] | {"lag_0_gap_abs_p50_nats": fresh}
    assert said in watch().look(1, off).sentence


def test_of_sides_that_agreed_bit_for_bit_a_gap_is_a_drift_and_what_training_brings_is_none():
    """In bf16 two sides with the same kernels agree to 0 at first and to .003 once training has begun."""
    exact = Watch(gap_p50=0.0, unfelt=0.03)
    assert exact.look(0, CLEAN | {"gap_abs_p50_nats": 3e-3}) is None
    assert exact.look(1, CLEAN | {"gap_abs_p50_nats": 0.5}).name == "gap drift"
    assert Watch(gap_p50=0.0).look(0, CLEAN | {"gap_abs_p50_nats": 2e-4}).name == "gap drift"


def test_where_no_ladder_passed_there_is_nothing_to_drift_from():
    assert Watch().look(0, CLEAN | {"gap_abs_p50_nats": 0.5}) is None


def test_a_pair_that_was_proven_wide_is_held_to_twice_its_own_width():
    """Log-ratios with a variance of .03 have an ESS of .97; of twice the width, .03 times four, .88."""
    wide = Watch(gap_p50=0.12, ess=0.97)
    assert wide.look(0, CLEAN | {"mismatch_ess": 0.95}) is None
    assert wide.look(1, CLEAN | {"mismatch_ess": 0.87}).name == "mismatch"
    assert Watch(gap_p50=1e-5, ess=1 - 1e-9).look(0, CLEAN | {"mismatch_ess": 0.9999}) is None


def test_a_collapse_is_held_against_the_runs_first_step_and_not_the_first_after_a_resume():
    fallen = CLEAN | OFF["entropy collapse"]
    assert Watch(gap_p50=1e-3).look(40, fallen) is None
    assert Watch(gap_p50=1e-3, first=CLEAN).look(40, fallen).name == "entropy collapse"


def test_phantom_clips_alone_are_a_mismatch():
    assert watch().look(1, CLEAN | {"phantom_clip_fraction": 0.2}).name == "mismatch"


def test_of_many_figures_that_are_off_the_earliest_layers_is_told_and_no_other():
    alarm = watch().look(
        1,
        {name: value for off in OFF.values() for name, value in (CLEAN | off).items()}
        | {name: value for off in OFF.values() for name, value in off.items()},
    )
    assert (alarm.name, alarm.layer) == ("mismatch", "weights")


def test_what_is_known_to_be_broken_is_named_as_the_likely_layer():
    assert watch(known_layer="semantics").look(1, CLEAN | OFF["mismatch"]).layer == "semantics"


def test_the_healthy_quick_start_gives_none():
    """Its first and last step as README has them: entropy falls from 1.78 to .20."""
    looks = Watch(gap_p50=1.1e-5)
    for step, (entropy, flat) in enumerate([(1.78, 0.6), (0.9, 0.3), (0.20, 0.4)]):
        assert looks.look(step, CLEAN | {"entropy_mean_nats": entropy, "flat_group_fraction": flat}) is None


def test_an_age_within_the_bound_is_no_alarm():
    assert watch(max_lag=2).look(1, CLEAN | OFF["lag"]) is None


def test_the_oldest_token_is_too_old_where_the_mean_is_within_the_bound():
    alarm = watch(max_lag=2).look(1, CLEAN | {"lag_steps": 0.3, "lag_max_steps": 3.0})
    assert alarm.name == "lag"
    assert alarm.sentence == "tokens are up to 3 versions old, at most 2"
    assert watch(max_lag=3).look(1, CLEAN | {"lag_steps": 0.3, "lag_max_steps": 3.0}) is None


def test_an_alarm_is_on_disk_and_read_back(tmp_path):
    layout = RunLayout(tmp_path)
    write_manifest(layout.manifest, manifest())
    alarm = watch().look(3, CLEAN | OFF["flat groups"])
    open_recorder(layout, ["csv"]).alarm(alarm)
    assert open_run(tmp_path).alarms == (alarm,)
    assert b'"schema":"lockstep.alarm/1"' in layout.alarms.read_bytes()
