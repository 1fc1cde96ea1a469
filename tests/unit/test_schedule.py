"""The schedule is held to its bound, its ledger and its liveness: by random events, and case by case."""

import importlib.util
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lockstep.errors import ScheduleError
from lockstep.rollout.ledger import Bound, Finished, State
from lockstep.rollout.schedule import STALE, Schedule

P, G = 2, 2


def schedule(max_lag=1, *, steps=6, in_flight=100, engines=("a",), **bound):
    return Schedule(
        Bound(max_lag=max_lag, groups_per_step=P, group_size=G, steps=steps, in_flight=in_flight, **bound),
        engines,
    )


def admit(plan, most=100):
    return [plan.admit().group for _ in range(min(plan.room, most))]


def train(plan):
    lengths = {found.group: found.lengths for found in plan.take()}
    plan.trained(lengths)
    plan.close()
    return sorted(lengths)


def draw(plan, groups, version, tokens=3):
    for group in groups:
        plan.finish(group, version, [tokens] * G)


class Machine(RuleBasedStateMachine):
    """Engines that answer in any order, load when they like and die; a trainer that goes on; checkpoints."""

    @initialize(
        max_lag=st.integers(0, 3), per_step=st.integers(1, 3), in_flight=st.integers(1, 9),
        engines=st.integers(1, 3), drops=st.booleans(), seed=st.integers(0, 2**32 - 1),
    )  # fmt: skip
    def begin(self, max_lag, per_step, in_flight, engines, drops, seed):
        names = [f"e{n}" for n in range(engines)]
        bound = Bound(
            max_lag=max_lag,
            groups_per_step=per_step,
            group_size=G,
            steps=10_000,
            in_flight=in_flight,
            drops=drops,
        )
        self.plan = Schedule(bound, names)
        self.rng = np.random.default_rng(seed)
        self.serves = dict.fromkeys(names, 0)
        self.drawing = {}  # group → engine and the version of its first token, once it has one
        self.ends = {}
        self.issued = set()
        self.drawn = 0
        self.gone = 0

    @rule(many=st.integers(1, 6))
    def admits(self, many):
        for _ in range(min(many, self.plan.room)):
            flight = self.plan.admit()
            assert flight.group in self.issued or flight.group == len(self.issued), "in the order of the data"
            assert flight.group not in self.ends
            self.issued.add(flight.group)
            self.drawing[flight.group] = (str(self.rng.choice(list(self.serves))), None)

    @precondition(lambda self: self.drawing)
    @rule()
    def a_first_token(self):
        group = int(self.rng.choice(list(self.drawing)))
        engine, oldest = self.drawing[group]
        self.drawing[group] = engine, self.serves[engine] if oldest is None else oldest

    @precondition(lambda self: self.drawing)
    @rule(length=st.integers(1, 40))
    def finishes(self, length):
        group = int(self.rng.choice(list(self.drawing)))
        engine, oldest = self.drawing.pop(group)
        before = dict(self.plan.state.ledger.dropped)
        held = set(self.plan.state.finished) | {group}
        self.plan.finish(group, self.serves[engine] if oldest is None else oldest, [length, 1])
        self.drawn += length + 1
        self._note_dropped(held, before)

    @precondition(lambda self: self.plan.ready())
    @rule()
    def trains(self):
        step = self.plan.state.step
        state = self.plan.state
        held = set(state.finished)
        before = dict(state.ledger.dropped)
        taken = self.plan.take()
        assert [found.group for found in taken] == sorted(found.group for found in taken)
        assert all(0 <= step - found.oldest <= self.plan.bound.max_lag for found in taken)
        for found in taken:
            assert found.group not in self.ends, "trained twice"
            self.ends[found.group] = ("trained", step)
        self.plan.trained({found.group: found.lengths for found in taken})
        self._note_dropped(held - {found.group for found in taken}, before)

    @rule()
    def loads_and_confirms(self):
        name = str(self.rng.choice(list(self.serves)))
        # The engine serves a version before anyone knows that it does.
        if self.serves[name] < self.plan.state.step and self.rng.random() < 0.6:
            self.serves[name] = self.plan.state.step
        self.plan.confirm(name, self.serves[name])

    @rule()
    def loses_all(self):
        if self.rng.random() < 0.1:
            self.plan.lost()
            self.drawing = {}

    @rule()
    def goes_on_from_a_checkpoint(self):
        if self.rng.random() < 0.1:
            kept = msgspec.json.encode(self.plan.state)
            self.plan = Schedule(self.plan.bound, state=msgspec.json.decode(kept, type=State))
            self.drawing = {}

    @rule()
    def everything_comes_in(self):
        """Nobody waits for ever: once all engines have answered and loaded, a step is ready."""
        if self.rng.random() < 0.2:
            for name in self.serves:
                self.serves[name] = self.plan.state.step
                self.plan.confirm(name, self.plan.state.step)
            for _ in range(200):
                if self.plan.ready():
                    return
                self.admits(6)
                assert self.drawing, self.plan.waits_for()
                while self.drawing and not self.plan.ready():
                    self.finishes(1)
            raise AssertionError(self.plan.waits_for())

    def _note_dropped(self, held, before):
        now = self.plan.state.ledger.dropped
        gone = held - set(self.plan.state.finished) - set(self.plan.state.training)
        assert sum(now.values()) - sum(before.values()) == G * len(gone)
        for group in gone:
            assert self.plan.bound.drops
            assert group not in self.ends
            self.ends[group] = ("dropped", STALE)

    @invariant()
    def the_ledger_closes(self):
        if not hasattr(self, "plan"):
            return
        self.plan.close()
        ledger = self.plan.state.ledger
        state = self.plan.state
        assert ledger.issued == G * len(self.issued)
        assert ledger.trained == G * sum(end[0] == "trained" for end in self.ends.values())
        open_groups = [*state.in_flight, *state.reissue, *state.finished, *state.training]
        assert sorted([*open_groups, *self.ends]) == sorted(self.issued)
        assert ledger.drawn_tokens == self.drawn
        assert len(state.in_flight) <= self.plan.bound.in_flight


@pytest.mark.parametrize("events", [1_800, pytest.param(120_000, marks=pytest.mark.chaos)])
def test_random_events_never_pass_the_bound_lose_a_sample_or_stall(events):
    each = 60
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=events // each,
            stateful_step_count=each,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


def test_synchronous_is_a_lag_of_0():
    plan = schedule(0)
    assert admit(plan) == [0, 1]
    draw(plan, [1, 0], 0)
    assert train(plan) == [0, 1]
    assert plan.room == 0, "until the engine confirms the version that was made"
    plan.confirm("a", 1)
    assert admit(plan) == [2, 3]


def test_a_slot_is_freed_only_when_every_engine_has_confirmed():
    plan = schedule(1, engines=("a", "b"))
    draw(plan, admit(plan), 0)
    train(plan)
    plan.confirm("a", 1)
    assert plan.room == 0
    assert "b still confirms version 0" in plan.waits_for() or plan.ready()
    plan.confirm("b", 1)
    assert plan.room == P


def test_a_slow_group_is_waited_for_before_it_is_too_old_and_not_earlier():
    plan = schedule(1)
    slow, *others = admit(plan)
    draw(plan, others, 0)
    assert train(plan) == others[:2], "one of the four is due only at the next step"
    plan.confirm("a", 1)
    draw(plan, admit(plan), 1)
    assert not plan.ready()
    assert plan.waits_for().startswith("step 2 waits for 1 groups (1 in flight, 0 to reissue, 0 to admit")
    draw(plan, [slow], 0)
    assert train(plan) == [slow, others[2]]


def test_the_slow_group_is_dropped_and_counted_where_that_is_asked_for():
    plan = schedule(1, drops=True)
    slow, *others = admit(plan)
    draw(plan, others, 0)
    train(plan)
    plan.confirm("a", 1)
    draw(plan, admit(plan), 1)
    train(plan)
    plan.confirm("a", 2)
    draw(plan, [slow], 0, tokens=40)
    ledger = plan.state.ledger
    assert ledger.dropped == {STALE: G}
    assert ledger.dropped_tokens == {STALE: 40 * G}
    assert (ledger.dropped_lengths, ledger.kept_lengths) == ({64: G}, {4: 4 * G})
    plan.close()


def test_a_lag_past_the_bound_raises_and_is_not_clamped():
    plan = schedule(1)
    plan.refuse_stale(3, 2, "group 7")
    for step, oldest in ((3, 1), (3, 4)):
        with pytest.raises(ScheduleError, match=f"version {oldest} drew: lag {step - oldest}"):
            plan.refuse_stale(step, oldest, "group 7")


def test_a_token_older_than_the_version_that_all_had_confirmed_is_refused():
    plan = schedule(1)
    draw(plan, admit(plan), 0)
    train(plan)
    plan.confirm("a", 1)
    (group, _) = admit(plan)
    with pytest.raises(ScheduleError, match="every engine had confirmed it"):
        plan.finish(group, 0, [1, 1])


def test_a_group_ends_once():
    plan = schedule(0)
    draw(plan, admit(plan), 0)
    with pytest.raises(ScheduleError, match="not in flight"):
        plan.finish(0, 0, [1, 1])
    train(plan)
    with pytest.raises(ScheduleError, match="a second end"):
        plan._end(0)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda state: state.finished.pop(0), r"groups \[0\] in no place or in two"),
        (lambda state: state.reissue.update({0: 0}), "in no place or in two"),
        (lambda state: setattr(state.ledger, "trained", 1), "ledger, samples"),
        (lambda state: setattr(state.ledger, "issued", 9), "ledger, samples: got 9 issued"),
        (lambda state: setattr(state.ledger, "drawn_tokens", 11), "ledger, tokens: got 11 drawn"),
        (lambda state: state.finished.update({1: Finished(1, 0, (3, 4))}), "ledger, tokens"),
    ],
)
def test_a_ledger_that_does_not_close_is_refused_and_told(spoil, told):
    plan = schedule(0)
    draw(plan, admit(plan), 0)
    plan.close()
    spoil(plan.state)
    with pytest.raises(ScheduleError, match=told):
        plan.close()


def test_what_was_trained_is_what_was_taken():
    plan = schedule(0)
    draw(plan, admit(plan), 0)
    plan.take()
    with pytest.raises(ScheduleError, match="expected those taken"):
        plan.trained({0: (3, 3), 1: (3, 2)})


def test_after_a_kill_stored_steps_are_replayed_and_the_rest_is_issued_again():
    plan = schedule(1)
    draw(plan, admit(plan), 0)
    train(plan)
    plan.confirm("a", 1)
    kept = msgspec.json.encode(plan.state)  # 2 and 3 are finished, 4 and 5 were never asked for
    again = Schedule(plan.bound, state=msgspec.json.decode(kept, type=State))
    again.replayed({2: (3, 3), 4: (5, 1)})
    again.close()
    assert (again.state.step, again.version) == (2, 2)
    assert set(again.state.finished) == {3}
    assert again.state.reissue == {}
    again.replayed({3: (3, 3), 6: (1, 1)})
    assert set(again.state.reissue) == {5}
    assert admit(again)[:2] == [5, 7]
    again.close()
    with pytest.raises(ScheduleError, match="a group that has not ended"):
        again.replayed({4: (5, 1), 9: (1, 1)})


def test_a_run_ends_with_nothing_in_flight_and_every_prompt_trained():
    plan = schedule(2, steps=5)
    trained = []
    while not plan.done:
        draw(plan, admit(plan), plan.version)
        trained += train(plan)
        plan.confirm("a", plan.state.step)
    assert sorted(trained) == list(range(5 * P))
    assert plan.outstanding == 0
    assert (plan.room, plan.waits_for()) == (0, "")


def test_the_simulated_clock_reaches_the_bound():
    """Nine tenths of max(generate, train) at each lag; the synchronous loop takes the sum."""
    path = Path(__file__).parents[2] / "benchmarks" / "schedule_clock.py"
    spec = importlib.util.spec_from_file_location("schedule_clock", path)
    assert spec is not None
    assert spec.loader is not None
    clock = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = clock
    spec.loader.exec_module(clock)
    world = clock.World(groups_per_step=8, train_s=27.0)
    generate = world.generate_s(np.random.default_rng(1))
    assert clock.simulate(world, 0, 60).step_s > 0.95 * (generate + world.train_s)
    for max_lag in (1, 2, 4):
        found = clock.simulate(world, max_lag, 120)
        assert max(generate, world.train_s) / found.step_s >= clock.TARGET
        assert found.lag_max == max_lag
    assert clock.simulate(world, 1, 120, drops=True).dropped > 0.0
