"""A run that is killed anywhere and resumed is the undisturbed run: same weights and state, each step once.

every point of a step × first, middle (with a checkpoint), last step × trainer    here, on transformers
a few points × those steps × engine, trainer, both                                with vLLM: ``make chaos``
"""

import shutil
import signal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lockstep.config.recipe import load_recipe
from lockstep.runs.layout import RunLayout
from lockstep.runs.manifest import finished, unfinished_run
from tests.chaos.whole_run import FIRST, LAST, MIDDLE, RECIPE, state_of, undisturbed

STAGES, STORE = "lockstep.loop.stages", "lockstep.rollout.store"
POINTS = {
    "before_drawing": ("lockstep.rollout.collect:sample", "enter", 0),
    "drawn_not_stored": (f"{STORE}:save", "enter", 0),
    "stored_not_scored": (f"{STORE}:save", "exit", 0),
    "between_two_rewards": ("lockstep.rollout.judge:Judge._here", "exit", 1),
    "scored_not_stored": (f"{STORE}:save", "enter", 1),
    "scored_and_stored": (f"{STORE}:save", "exit", 1),
    "trainers_numbers_stored": (f"{STORE}:save", "exit", 2),
    "judged_not_admitted": ("lockstep.parity.gate:Gate.refusals", "exit", 0),
    "admitted": (f"{STORE}:admit", "exit", 0),
    "between_two_updates": ("lockstep.training.optimizer:MasterAdamW.step", "exit", 0),
    "updated": ("lockstep.training.optimizer:MasterAdamW.step", "exit", 1),
    "published": ("lockstep.weights.publish:WeightPublisher.publish", "exit", 0),
    "canary_scored": ("lockstep.parity.canary:Canary.measure", "exit", 0),
    "sync_recorded": ("lockstep.runs.record:Recorder.verdict", "exit", 0),
    "not_recorded": ("lockstep.runs.record:Recorder.step", "enter", 0),
    "recorded": ("lockstep.runs.record:Recorder.step", "exit", 0),
}
SAVING = {
    "before_saving": ("lockstep.training.checkpoint:save_checkpoint", "enter", 0),
    "written_not_named": ("lockstep.training.checkpoint:_put_in_place", "enter", 0),
    "named_beside_the_older": ("lockstep.training.checkpoint:_put_in_place", "exit", 0),
    "saved": ("lockstep.training.checkpoint:save_checkpoint", "exit", 0),
}
CASES = [(name, step) for step in (FIRST, MIDDLE, LAST) for name in POINTS]
CASES += [(name, step) for step in (MIDDLE, LAST) for name in SAVING]
QUICK = {
    ("stored_not_scored", FIRST),
    ("between_two_rewards", MIDDLE),
    ("trainers_numbers_stored", MIDDLE),
    ("between_two_updates", MIDDLE),
    ("named_beside_the_older", MIDDLE),
    ("admitted", LAST),
    ("recorded", LAST),
    ("written_not_named", LAST),
    ("saved", LAST),
}
"""In ``make test``; ``make chaos`` runs all."""


def disturbed(zygote, case, name, kill, killed):
    """Kill, look, resume, and compare with the undisturbed run."""
    recipe, expected = case
    layout = RunLayout(recipe.parent / name / "run")
    code, output = zygote("train", recipe, "--out", layout.root, kill=kill)
    assert code == killed, output
    done = finished(layout, load_recipe(recipe))
    assert (unfinished_run(load_recipe(recipe), layout.root.parent) is None) == done
    code, output = zygote("train", "--resume", layout.root)
    assert code == 0, output
    assert state_of(layout) == expected
    assert unfinished_run(load_recipe(recipe), layout.root.parent) is None
    assert not list((layout.root / "rollouts" / "drawn").glob("*"))
    assert not list(layout.root.rglob(".partial*"))
    return done


@pytest.mark.parametrize(
    ("name", "step"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.chaos) for case in CASES],
)
def test_a_trainer_killed_anywhere_goes_on_to_the_same_weights(zygote, here, name, step):
    target, when, call = (POINTS | SAVING)[name]
    kill = {"target": target, "when": when, "call": call, "step": step}
    done = disturbed(zygote, here, f"{name}-{step}", kill, -signal.SIGKILL)
    assert done == (step == LAST and name in ("named_beside_the_older", "saved"))


ENGINE_POINTS = {
    "as_it_draws": ("lockstep.rollout.collect:sample", "enter", 0),
    "between_two_rewards": POINTS["between_two_rewards"],
    "between_two_updates": POINTS["between_two_updates"],
    "published": POINTS["published"],
    "recorded": POINTS["recorded"],
}


@pytest.fixture(scope="module")
def served(zygote, tiny_checkpoint):
    """The same on the real vLLM."""
    from lockstep.engines.environments.locate import find
    from tests.conftest import need

    need(find, "vllm", "0.32.0")
    recipe = zygote.root / "served.toml"
    model = zygote.root / "model"
    shutil.copytree(tiny_checkpoint, model)
    heads_of_32 = LlamaConfig.from_pretrained(
        model, hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32
    )
    torch.manual_seed(0)
    LlamaForCausalLM(heads_of_32).save_pretrained(model)  # vLLM's attention on a CPU knows no heads of 8
    recipe.write_text(RECIPE % {"model": model, "engine": "vllm"})
    return undisturbed(zygote, recipe)


@pytest.mark.chaos
@pytest.mark.engine
@pytest.mark.parametrize("step", [FIRST, MIDDLE, LAST])
@pytest.mark.parametrize("name", ENGINE_POINTS)
@pytest.mark.parametrize(
    ("whom", "killed"), [("engine", 3), ("trainer", -signal.SIGKILL), ("both", -signal.SIGKILL)]
)
def test_an_engine_killed_anywhere_leaves_a_run_that_goes_on(zygote, served, name, step, whom, killed):
    target, when, call = ENGINE_POINTS[name]
    kill = {"target": target, "when": when, "call": call, "step": step, "whom": whom}
    if (whom, name, step) == ("engine", "recorded", LAST):
        killed = 0  # nothing is asked of it any more
    disturbed(zygote, served, f"{whom}-{name}-{step}", kill, killed)
