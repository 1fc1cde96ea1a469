"""A run in flight that Ctrl-C ends, wherever it is, goes on; what came too late is dropped and counted."""

import contextlib
import dataclasses
import json
import time

import pytest

from lockstep import api
from lockstep.config.recipe import with_sets
from lockstep.errors import ScheduleError, Stopped
from lockstep.loop import in_flight, stages
from lockstep.loop.flights import Flights
from lockstep.records.versions import VersionSpan
from lockstep.rollout import store
from lockstep.runs.layout import RunLayout
from lockstep.runs.read import read_steps
from tests.faults.test_loop_in_flight import IN_FLIGHT, SETS, STEPS, ledger, run


def stopped_at(recipe, out, monkeypatch, where, step, *sets):
    """A run that Ctrl-C ends where a function of the loop is entered, and what it left."""
    owner, name = where
    real = getattr(owner, name)

    def stopped(*args, **kwargs):
        flights = next((one for one in args if isinstance(one, Flights)), None)
        at = flights.schedule.state.step if flights else args[1]
        if at == step:
            raise Stopped(130)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        with pytest.raises(Stopped):
            run(recipe, out, *IN_FLIGHT, *sets)
    return RunLayout(out)


def newest(layout):
    saved = max(layout.checkpoints.iterdir())
    return saved.name, json.loads((saved / "rollout" / "schedule.json").read_text())


def goes_on(layout):
    api.train(resume=layout.root, say=print)
    assert [row["step"] for row in ledger(layout)] == list(range(STEPS))
    assert [row.step for row in read_steps(layout.metrics)] == list(range(STEPS))
    last = ledger(layout)[-1]
    assert last["issued"] == last["trained"] == STEPS * 4
    assert last["drawn_tokens"] == last["trained_tokens"]


@pytest.mark.parametrize("place", [(Flights, "next_batch"), (in_flight, "train")])
def test_ctrl_c_saves_what_is_whole_and_the_run_goes_on(recipe, tmp_path, monkeypatch, place):
    layout = stopped_at(recipe, tmp_path / "run", monkeypatch, place, 3)
    name, state = newest(layout)
    assert name == "step-000003", "saved where it was, not at the last multiple of checkpoint_every"
    assert state["in_flight"] == {}
    assert len(state["finished"]) + len(state["training"]) >= 2, "a step's groups are there"
    goes_on(layout)


def test_ctrl_c_between_the_oldest_weights_and_the_gate_trains_the_step_again(recipe, tmp_path, monkeypatch):
    sets = ["rollout.update=keep", "sampling.max_tokens=90"]
    layout = stopped_at(recipe, tmp_path / "run", monkeypatch, (stages, "prove_rollouts"), 3, *sets)
    assert newest(layout)[0] == "step-000002"
    goes_on(layout)


def test_what_the_run_is_doing_can_be_looked_at_all_along(recipe, tmp_path):
    looks = []

    @contextlib.contextmanager
    def live(now):
        looks.append(now())
        yield
        looks.append(now())

    api.train(with_sets(recipe, [*SETS, *IN_FLIGHT]), out=tmp_path / "run", say=print, live=live)
    first, last = looks
    assert "last step" not in first
    assert first["now"].startswith("step 1 ")
    assert f"{STEPS * 4} samples issued, {STEPS * 4} trained, 0 dropped" in last["ledger"]
    assert {"last step", "lag", "idle"} <= last.keys()


@pytest.mark.parametrize("max_lag", [0, 1])
@pytest.mark.parametrize("place", ["sync", "record"])
def test_ctrl_c_before_a_step_is_on_record_trains_it_again(recipe, tmp_path, monkeypatch, place, max_lag):
    step = 4 if place == "sync" else 3  # a sync is named by the version that it brings
    layout = stopped_at(
        recipe, tmp_path / "run", monkeypatch, (in_flight, place), step, f"rollout.max_lag={max_lag}"
    )
    assert newest(layout)[0] == "step-000002"
    assert len(read_steps(layout.metrics)) == 3
    goes_on(layout)


@pytest.mark.parametrize(
    ("update", "old"), [("keep", "sampling"), ("recompute", "sampling"), ("keep", "engine")]
)
def test_answers_that_span_the_last_update_before_ctrl_c_are_trained_on_after_it(
    recipe, tmp_path, monkeypatch, update, old
):
    """The weights that began them are gone then, and what they say of them was saved."""
    sets = [f"rollout.update={update}", f"objective.old_logprobs={old}", "sampling.max_tokens=90"]
    sets += ["rollout.max_lag=2", "parity.audit_share=0.5"]
    layout = stopped_at(recipe, tmp_path / "run", monkeypatch, (Flights, "next_batch"), 3, *sets)
    _, state = newest(layout)
    assert min(group["oldest"] for group in state["finished"].values()) < 3
    goes_on(layout)


def test_what_is_stored_beyond_the_bound_is_not_trained_on_again(recipe, tmp_path, monkeypatch):
    layout = stopped_at(recipe, tmp_path / "run", monkeypatch, (in_flight, "record"), 3)
    kept = store.load(layout.rollouts(3), 2, recipe.sampling)
    for row, sample in enumerate(kept):
        spans = (VersionSpan(0, len(sample.token_ids), 1),)
        kept.samples[row] = dataclasses.replace(sample, version_spans=spans)
    store.save(layout.rollouts(3), kept)
    with pytest.raises(ScheduleError, match="version 1 drew: lag 2"):
        api.train(resume=layout.root, say=print)


def test_a_group_that_comes_too_late_is_dropped_and_the_lengths_of_such_are_told(
    recipe, tmp_path, monkeypatch, capsys
):
    real = Flights._take_in

    def late(self, handle):
        group, _ = self._groups.get(handle, (None, None))
        if group == 1 and self.schedule.state.step < 3:
            time.sleep(0.01)
            self._inbox.put(handle)
            return None
        return real(self, handle)

    monkeypatch.setattr(Flights, "_take_in", late)
    found = run(recipe, tmp_path / "run", *IN_FLIGHT, "rollout.stale=drop")
    last = ledger(found)[-1]
    assert last["dropped"] == {"stale": 2}
    assert last["trained"] == STEPS * 4
    assert last["issued"] == STEPS * 4 + 2
    assert "lengths, by the power of two above: trained ≤" in capsys.readouterr().out
