"""A run that is killed anywhere and resumed is the undisturbed run: same weights and state, each step once.

every point of a step × first, middle (with a checkpoint), last step × trainer    here, on transformers
a few points × those steps × engine, trainer, both                                with vLLM: ``make chaos``
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lockstep.config.recipe import load_recipe
from lockstep.runs.layout import RunLayout
from lockstep.runs.manifest import finished, unfinished_run
from lockstep.runs.read import read_steps

STEPS, FIRST, MIDDLE, LAST = 5, 0, 1, 4
RECIPE = """
model = { path = "%(model)s" }
engine = { name = "%(engine)s", max_model_len = 128 }
sampling = { max_tokens = 4 }
optimizer = { lr = 1e-3 }
parity = { probe_prompts = 4, probe_tokens = 4, draw_tokens = 128, draws_see = 1.0 }
training = { steps = 5, prompts_per_step = 2, group_size = 2, checkpoint_every = 2, minibatches = 2 }

[task]
name = "reasoning_gym:basic_arithmetic"
options = { min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1 }
reward = "varied:reward"
"""
REWARD = """
def reward(text, item):
    return len(text) % 3 / 2
"""
STAGES, STORE = "lockstep.loop.stages", "lockstep.rollout.store"
POINTS = {
    "before_drawing": ("lockstep.rollout.collect:sample", "enter", 0),
    "drawn_not_stored": (f"{STORE}:save", "enter", 0),
    "stored_not_scored": (f"{STORE}:save", "exit", 0),
    "between_two_rewards": ("lockstep.rollout.tasks:Task._here", "exit", 1),
    "scored_not_stored": (f"{STORE}:save", "enter", 1),
    "scored_and_stored": (f"{STORE}:save", "exit", 1),
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
    ("between_two_updates", MIDDLE),
    ("named_beside_the_older", MIDDLE),
    ("admitted", LAST),
    ("recorded", LAST),
    ("written_not_named", LAST),
    ("saved", LAST),
}
"""In ``make test``; ``make chaos`` runs all."""
REPLAYED = ("loss", "grad_norm", "reward_mean")


class Zygote:
    """The process that forks (zygote.py)."""

    def __init__(self, root: Path) -> None:
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
        self.root = root
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=root
        )

    def __call__(self, *args, kill=None):
        """Exit status and output of ``lockstep args``."""
        log = self.root / "output.log"
        log.unlink(missing_ok=True)
        order = {"args": list(map(str, args)), "kill": kill, "log": str(log)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), log.read_text()


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    (root / "varied.py").write_text(REWARD)
    served = Zygote(root)
    yield served
    served.process.stdin.close()
    assert served.process.wait(timeout=60) == 0


def state_of(layout):
    """What must not depend on a kill: digests of the last checkpoint's tensors, figures of every step."""
    (saved,) = layout.checkpoints.iterdir()
    files = ("model.safetensors", "trainer/optimizer.safetensors")
    digests = [hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in files]
    figures = [
        (record.step, *(record.metrics[name] for name in REPLAYED)) for record in read_steps(layout.metrics)
    ]
    return saved.name, digests, figures


def undisturbed(zygote, recipe):
    layout = RunLayout(recipe.parent / "runs" / "undisturbed")
    code, output = zygote("train", recipe, "--out", layout.root)
    assert code == 0, output
    expected = state_of(layout)
    assert expected[0] == f"step-{STEPS:06d}"
    assert [row[0] for row in expected[2]] == list(range(STEPS))
    assert all(row[2] > 0 for row in expected[2]), (
        "every step must move the weights, or a lost one would not show"
    )
    return recipe, expected


@pytest.fixture(scope="module")
def here(zygote, tiny_checkpoint):
    """The recipe on the transformers engine, and what an undisturbed run of it comes to."""
    recipe = zygote.root / "here.toml"
    recipe.write_text(RECIPE % {"model": tiny_checkpoint, "engine": "transformers"})
    return undisturbed(zygote, recipe)


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
