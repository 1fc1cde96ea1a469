"""One run in flight under kill after kill, each wherever chance has it: nothing lost, nothing trained twice.

    start ─► kill ─► resume ─► kill ─► … ─► resume to the end        trainer, engine, or both at once

An engine that dies is started again in the run; with the trainer the run itself ends, and is resumed. The
short form is three kills, the long one forty.
"""

import random
import signal

import pytest

from lockstep.runs.layout import RunLayout
from tests.chaos.test_kills import POINTS, SAVING
from tests.chaos.test_kills_in_flight import IDLE, TRAINED, assert_accounted, recipe_of
from tests.chaos.whole_run import RECIPE, state_of, undisturbed

DRAWING = {
    "drawing": ("lockstep.engines.transformers:TransformersEngine._in_turn", "exit", 1),
    "taking_in": ("lockstep.loop.flights:Flights._take_in", "exit", 0),
}
UPDATING = {name: POINTS[name] for name in ("between_two_updates", "updated", "published", "canary_scored")}
BETWEEN = {name: POINTS[name] for name in ("stored_not_scored", "admitted", "recorded")}
ANYWHERE = IDLE | DRAWING | UPDATING | BETWEEN | TRAINED
REPLAYED = ("lockstep.loop.in_flight:train", "exit", 0)
SEED = 20_261_130


def kills_of(chance, first, told):
    """Of one start: one kill wherever chance has it, and one of the trainer a little later, so that none
    runs to the end."""
    whom = chance.choice(("trainer", "engine", "both"))
    step = first + chance.randrange(2)
    where = dict(ANYWHERE)
    if whom == "engine":
        where = IDLE | DRAWING | {"published": POINTS["published"], "recorded": POINTS["recorded"]}
    elif step % 2:  # a checkpoint is saved then
        where |= SAVING
    target, when, call = where[chance.choice(sorted(where))]
    kills = [{"target": target, "when": when, "call": call, "step": step, "whom": whom}]
    if whom != "engine" and chance.random() < 0.2:
        target, when, call = REPLAYED
        kills.insert(0, {"target": target, "when": when, "call": call, "step": -1, "whom": whom})
    target, when, call = IDLE["waiting"]
    kills.append({"target": target, "when": when, "call": call, "step": step + 1 + chance.randrange(2)})
    return [kill | {"told": str(told)} for kill in kills]


def killed_again_and_again(zygote, recipe, n_kills, steps):
    """The finished run, and what was struck."""
    layout = RunLayout(recipe.with_suffix("") / "run")
    told = recipe.with_suffix(".strikes")
    chance = random.Random(SEED)
    struck = []
    told.touch()
    while True:
        first = sum(layout.rollouts(step).is_file() for step in range(steps))
        kills = kills_of(chance, first, told) if len(struck) < n_kills else []
        known = layout.manifest.is_file()
        args = ("--resume", layout.root) if known else (recipe, "--out", layout.root)
        code, output = zygote("train", *args, kills=kills)
        struck = told.read_text().splitlines()
        assert code in (0, -signal.SIGKILL), output
        if code == 0:
            return layout, struck


CASES = [
    pytest.param(0, 3, 6, id="no lag, short"),
    pytest.param(0, 40, 70, id="no lag", marks=pytest.mark.chaos),
    pytest.param(1, 40, 70, id="lag 1", marks=pytest.mark.chaos),
]


@pytest.mark.parametrize(("max_lag", "n_kills", "steps"), CASES)
def test_a_run_under_random_kills_is_whole(zygote, tiny_checkpoint, max_lag, n_kills, steps):
    recipe = recipe_of(zygote, tiny_checkpoint, max_lag, steps, "keep" if max_lag else "wait")
    layout, struck = killed_again_and_again(zygote, recipe, n_kills, steps)
    assert len(struck) >= n_kills, struck
    assert_accounted(layout, steps)
    if not max_lag:
        plain = zygote.root / f"plain-{steps}.toml"
        text = RECIPE % {"model": tiny_checkpoint, "engine": "transformers"}
        plain.write_text(text.replace("steps = 5", f"steps = {steps}"))
        _, expected = undisturbed(zygote, plain, steps)
        assert state_of(layout) == expected
