"""A trainer on two ranks trains what one process trains; what they cannot run together they do not begin."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file

from lockstep.runs.layout import RunLayout
from lockstep.runs.read import open_run

RECIPE = "recipes/quickstart.toml"
# Rows of few tokens, an odd number of them: in a last turn one rank has none of its own.
SETS = [
    "engine.name=transformers",
    "engine.max_model_len=160",
    "task.examples=0",
    "task.reward=tests.faults.test_loop_in_flight:varied",
    "sampling.max_tokens=24",
    "objective.name=ppo",
    "training.steps=3",
    "training.minibatches=2",
    "training.prompts_per_step=6",
    "training.group_size=2",
    "training.tokens_per_microbatch=128",
    "training.checkpoint_every=2",
    "optimizer.lr=1e-3",
    "parity.probe_prompts=4",
    "parity.probe_tokens=4",
    "parity.draw_tokens=64",
    "parity.draws_see=1.0",
]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def train(arguments, out, sets, ranks=1, **environment):
    """``lockstep train``; returns the process that has ended."""
    command = ["-m", "lockstep.cli.main"] if ranks == 1 else [*TWO, "-m", "lockstep.cluster.ranks"]
    command = [sys.executable, *command, "train", *arguments, "--out", str(out)]
    command += [part for text in sets for part in ("--set", text)]
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["src", "."])}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | threads | environment
    )


@pytest.fixture(scope="module")
def both(tiny_checkpoint, tmp_path_factory):
    """The same run on one process and on two ranks."""
    root = tmp_path_factory.mktemp("ranks")
    scratch = root / "scratch"
    scratch.mkdir()
    sets = [*SETS, f"model.path={tiny_checkpoint}"]
    for name, ranks in (("one", 1), ("two", 2)):
        ended = train([RECIPE], root / name, sets, ranks, TMPDIR=str(scratch))
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert not list(scratch.glob("lockstep-rank-*")), "what the other ranks wrote goes with them"
    return open_run(root / "one"), open_run(root / "two")


def test_every_figure_of_every_step_is_the_one_of_one_process(both):
    one, two = both
    assert len(one.steps) == len(two.steps) == 3
    for name in ("loss", "grad_norm", "value_loss", "entropy_mean_nats", "reward_mean", "clip_fraction"):
        np.testing.assert_allclose(two.steps.column(name), one.steps.column(name), rtol=1e-5, atol=1e-6)
    assert one.steps.column("value_loss").min() > 0.0
    np.testing.assert_array_equal(two.steps.column("n_tokens"), one.steps.column("n_tokens"))


def test_the_ladder_and_every_sync_are_proven_on_spread_tensors(both):
    for run in both:
        assert {record.verdict.status for record in run.verdicts} == {"PASS"}
        assert run.certificate is not None
        assert run.steps.column("unproven_syncs").tolist() == [0.0] * 3


def test_checkpoints_hold_whole_tensors_and_the_same(both):
    files = [sorted(RunLayout(run.layout.root).checkpoints.rglob("*.safetensors")) for run in both]
    assert [[file.name for file in found] for found in files] == [[file.name for file in files[0]]] * 2
    for one, two in zip(*files, strict=True):
        expected = load_file(one)
        found = load_file(two)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_allclose(found[name].numpy(), tensor.numpy(), atol=2e-6, err_msg=name)


def test_an_error_that_the_first_rank_met_ends_both_with_its_sentence(tiny_checkpoint, tmp_path):
    sets = [*SETS, f"model.path={tiny_checkpoint}", "task.reward=math:sqrt"]
    ended = train([RECIPE], tmp_path / "run", sets, 2)
    assert ended.returncode == 1, "torchrun's"
    said = [line.partition("error: ")[2] for line in ended.stderr.splitlines() if "error: " in line]
    told = [line for line in said if "math:sqrt" in line]
    assert len(told) == 2, ended.stderr
    assert told[0] == told[1], "and the second rank never called the function"


def test_what_is_recorded_is_the_recipe_that_was_asked_for_and_one_process_goes_on_from_it(both, tmp_path):
    one, two = both
    assert two.manifest.recipe == one.manifest.recipe
    assert two.manifest.recipe_sha256 == one.manifest.recipe_sha256
    copied = tmp_path / "run"
    shutil.copytree(two.layout.root, copied)
    layout = RunLayout(copied)
    shutil.rmtree(layout.checkpoint(3))  # as if the end had come before the last checkpoint
    command = [sys.executable, "-m", "lockstep.cli.main", "train", "--resume", str(copied)]
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["src", "."])}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | threads)
    assert ended.returncode == 0, ended.stderr[-3000:]
    weights = [load_file(run.checkpoint(3) / "model.safetensors") for run in (layout, two.layout)]
    for name, tensor in weights[1].items():
        np.testing.assert_allclose(weights[0][name].numpy(), tensor.numpy(), atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    ("sets", "named"),
    [
        (["loop.kind=in_flight"], "loop.kind = in_flight"),
        (["loop.kind=offline"], "loop.kind = offline"),
        (["model.dtype=bfloat16"], "model.dtype = bfloat16"),
        (["engine.dtype=bfloat16"], "engine.dtype = bfloat16"),
        (["engine.weights=nccl"], "engine.weights = nccl"),
    ],
)
def test_what_one_process_alone_can_run_is_refused_before_anything_starts(sets, named, tmp_path):
    environment = {"LOCKSTEP_RANK_SCRATCH": "", "RANK": "0", "WORLD_SIZE": "2"}
    ended = train([RECIPE], tmp_path / "run", [*SETS, *sets], **environment)
    assert ended.returncode == 2
    assert named in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--resume=runs/x"], ["--continue"], ["--dry-run"], ["--plant", "x"]])
def test_what_is_no_new_run_is_for_one_process(arguments):
    ended = subprocess.run(
        [sys.executable, "-m", "lockstep.cluster.ranks", "train", RECIPE, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"RANK": "0", "PYTHONPATH": "src"},
    )
    assert ended.returncode == 2
    assert "lockstep train --resume RUN" in ended.stderr
