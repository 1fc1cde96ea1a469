"""A run in flight that is killed anywhere goes on: no prompt skipped, none trained twice, the ledger closed.

With no lag it comes to the weights of an undisturbed synchronous run, bit for bit.
"""

import json
import signal
from collections import Counter

import pytest

from lockstep.runs.layout import RunLayout
from lockstep.runs.rollouts import read_table
from tests.chaos.test_kills import POINTS, SAVING
from tests.chaos.whole_run import FIRST, LAST, MIDDLE, RECIPE, STEPS, state_of

IN_FLIGHT = """
loop = { kind = "in_flight" }
rollout = { max_lag = %d, update = "%s" }
"""
IDLE = {"waiting": ("lockstep.loop.flights:Flights.next_batch", "enter", 0)}
TRAINED = {"trained_not_counted": ("lockstep.loop.flights:Flights.trained", "enter", 0)}
WHERE = (
    IDLE
    | TRAINED
    | {name: POINTS[name] for name in ("between_two_updates", "published", "recorded")}
    | SAVING
)
CASES = [(name, step) for name in WHERE for step in (FIRST, MIDDLE, LAST) if step or name not in SAVING]
QUICK = {("waiting", MIDDLE), ("between_two_updates", LAST), ("written_not_named", MIDDLE), ("saved", LAST)}


def recipe_of(zygote, model, max_lag, steps=STEPS, update="wait"):
    path = zygote.root / f"lag-{max_lag}-{update}-{steps}.toml"
    head = RECIPE % {"model": model, "engine": "transformers"}
    task = "[task]"
    text = head.replace(task, IN_FLIGHT % (max_lag, update) + "\n" + task)
    path.write_text(text.replace(f"steps = {STEPS}", f"steps = {steps}"))
    return path


def assert_accounted(layout, steps=STEPS):
    """Every prompt of the data order in exactly one step, and a ledger that says so."""
    items = Counter(
        row["item"]
        for step in range(steps)
        for row in read_table(layout.rollouts(step))[0].to_pylist()
        if row["sample"] == 0
    )
    assert items == Counter(range(steps * 2)), "no prompt skipped, none trained twice"
    last = json.loads(layout.ledger.read_text().splitlines()[-1])
    assert (last["step"], last["open_groups"]) == (steps - 1, 0)
    assert last["issued"] == last["trained"] == steps * 2 * 2
    assert last["drawn_tokens"] == last["trained_tokens"]
    assert not list((layout.root / "rollouts" / "drawn").glob("*"))
    assert not list(layout.root.rglob(".partial*"))


def killed_and_resumed(zygote, recipe, name, step):
    target, when, call = WHERE[name]
    layout = RunLayout(recipe.parent / f"{recipe.stem}-{name}-{step}" / "run")
    kill = {"target": target, "when": when, "call": call, "step": step}
    code, output = zygote("train", recipe, "--out", layout.root, kill=kill)
    assert code == -signal.SIGKILL, output
    code, output = zygote("train", "--resume", layout.root)
    assert code == 0, output
    return layout


@pytest.mark.parametrize(
    ("name", "step"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.chaos) for case in CASES],
)
def test_with_no_lag_a_killed_run_comes_to_the_same_weights(zygote, here, tiny_checkpoint, name, step):
    _, expected = here  # of the synchronous loop
    layout = killed_and_resumed(zygote, recipe_of(zygote, tiny_checkpoint, 0), name, step)
    assert state_of(layout) == expected
    assert_accounted(layout)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        pytest.param(*case, marks=[] if case in {("published", MIDDLE)} else pytest.mark.chaos)
        for case in CASES
    ],
)
def test_with_lag_a_killed_run_loses_nothing_and_trains_nothing_twice(zygote, tiny_checkpoint, name, step):
    assert_accounted(killed_and_resumed(zygote, recipe_of(zygote, tiny_checkpoint, 1), name, step))
