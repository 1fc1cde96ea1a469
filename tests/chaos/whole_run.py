"""Whole runs of ``lockstep train`` that something happens to, and what must not depend on it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from lockstep.runs.layout import RunLayout
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

    def __call__(self, *args, kill=None, kills=()):
        """Exit status and output of ``lockstep args``."""
        log = self.root / "output.log"
        log.unlink(missing_ok=True)
        order = {"args": list(map(str, args)), "kills": [kill] if kill else list(kills), "log": str(log)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), log.read_text()

    def close(self) -> None:
        """End it in order."""
        with self.process:  # closes what it reads from, too
            self.process.stdin.close()
            assert self.process.wait(timeout=60) == 0


def state_of(layout):
    """What must not depend on a kill: digests of the last checkpoint's tensors, figures of every step."""
    (saved,) = layout.checkpoints.iterdir()
    files = ("model.safetensors", "trainer/optimizer.safetensors")
    digests = [hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in files]
    figures = [
        (record.step, *(record.metrics[name] for name in REPLAYED)) for record in read_steps(layout.metrics)
    ]
    return saved.name, digests, figures


def undisturbed(zygote, recipe, steps=STEPS):
    layout = RunLayout(recipe.parent / "undisturbed" / recipe.stem)
    code, output = zygote("train", recipe, "--out", layout.root)
    assert code == 0, output
    expected = state_of(layout)
    assert expected[0] == f"step-{steps:06d}"
    assert [row[0] for row in expected[2]] == list(range(steps))
    # Every step must move the weights, or a lost one would not show. After a first gradient the moments do,
    # also in a step whose groups are flat.
    assert expected[2][0][2] > 0
    return recipe, expected
