"""The examples do what they say, and a run trains with them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.config.recipe import TaskConfig, load_recipe
from lockstep.rollout.tasks import Task
from lockstep.runs.strict import read_lines
from tests.commands.tiny_run import write_recipe
from tests.unit.test_objective import inputs_of

EXAMPLES = Path(__file__).parents[2] / "examples"
SETS = ("training.minibatches=2", "optimizer.lr=1e-3")


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_cispo_keeps_every_token_and_caps_its_weight(examples):
    from my_objective import cispo

    log_ratio = torch.tensor([-0.5, 0.0, 0.1, 0.9])
    advantages = torch.tensor([1.0, -2.0, 0.5, 1.5])
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    now = (old + log_ratio).requires_grad_()
    outputs = cispo(inputs_of(now, old, advantages), high=0.2)
    outputs.loss.backward()
    weight = np.minimum(np.exp(log_ratio.numpy()), 1.2)
    assert float(outputs.loss.detach()) == pytest.approx(
        -(weight * (advantages * now.detach()).numpy()).mean(), rel=1e-6
    )
    np.testing.assert_allclose(now.grad.numpy(), -weight * advantages.numpy() / 4, rtol=1e-6)
    assert not outputs.clipped.any()


@pytest.mark.parametrize(
    ("text", "reward"),
    [("12", 1.0), ("it is 12.", 1.0), ("10", 1 / 3), ("-12", 1 / 25), ("no idea", 0.0), ("", 0.0)],
)
def test_near_answers_are_worth_a_part(examples, text, reward):
    from my_reward import near

    assert near(text, {"question": "7 + 5 =", "answer": "12"}) == pytest.approx(reward)


def test_a_phonebook_is_an_environment(examples):
    config = TaskConfig(
        name="my_environment:questions",
        environment="my_environment:Phonebook",
        tool_calls="python",
    )
    task = Task(config, 0)
    item = task.item(3)
    environment = task.environments.made()
    assert [tool["function"]["name"] for tool in task.tools] == ["look_up"]
    assert task.environments.call(environment.reset, **item) is None
    assert task.environments.answers(environment, "look_up('Niels')")[1] == 1, "nobody of that name"
    assert task.environments.reward(environment, item["number"]) == pytest.approx(0.9)
    assert task.environments.answers(environment, f"look_up({item['name']!r})") == ([item["number"]], 0)
    assert task.environments.reward(environment, f" {item['number']}\n") == pytest.approx(1.0)


def trained(tmp_path, name, *sets, steps=1):
    """Figures of a run's last step, its last weights, and what layer 5 said."""
    run = tmp_path / name
    flags = [flag for text in (*SETS, f"training.steps={steps}", *sets) for flag in ("--set", text)]
    paths = [str(EXAMPLES), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-m", "lockstep.cli.main", "train", tmp_path / "recipe.toml", "--out", run, *flags],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    weights = (run / "checkpoints" / f"step-{steps:06d}" / "model.safetensors").read_bytes()
    (judged,) = [row["summary"] for row in read_lines(run / "verdicts.jsonl") if row["layer"] == "objective"]
    return read_lines(run / "metrics.jsonl")[-1]["metrics"], weights, judged


def test_a_run_trains_with_both(tmp_path):
    write_recipe(tmp_path, 64)
    reward = "task.reward=my_reward:near"
    own, weights, judged = trained(
        tmp_path, "own", reward, "objective.name=my_objective:cispo", "objective.options.high=0.01"
    )
    known, others, _ = trained(tmp_path, "known", reward)
    assert own["reward_mean"] == known["reward_mean"] > 0.0
    assert own["clip_fraction"] == 0.0
    assert own["loss"] != known["loss"]
    assert weights != others
    assert "(grpo in the place of my_objective:cispo)" in judged


def test_a_run_trains_on_the_phonebook_and_asks_held_out_questions(tmp_path):
    write_recipe(tmp_path, 64)
    figures, _, _ = trained(
        tmp_path,
        "phonebook",
        "task.name=my_environment:questions",
        "task.options={}",
        "task.environment=my_environment:Phonebook",
        "task.tool_calls=python",
        "engine.max_model_len=400",
        "evaluation.every=1",
        "evaluation.prompts=2",
    )
    assert figures["turns_mean"] == 1.0, "a random model calls nothing"
    assert figures["evaluation_reward_mean"] == 0.0
    assert figures["evaluation_tokens_mean"] > 0.0


def test_the_loop_on_one_page_gives_the_figures_of_lockstep_train(tmp_path, examples):
    from rl_loop import run

    assert len((EXAMPLES / "rl_loop.py").read_text().splitlines()) <= 80
    recipe = write_recipe(tmp_path, 64)
    reward = "task.reward=my_reward:near"
    figures = run(load_recipe(recipe, [*SETS, "training.steps=3", reward]), tmp_path / "engine.log")
    trained(tmp_path, "command", reward, steps=3)
    told = [row["metrics"] for row in read_lines(tmp_path / "command" / "metrics.jsonl")]
    for name in ("reward_mean", "loss", "grad_norm", "gap_abs_max_nats", "entropy_mean_nats"):
        assert [row[name] for row in figures] == [row[name] for row in told], name


@pytest.mark.parametrize(("sets", "code"), [((), 0), (("sampling.repetition_penalty=1.5",), 1)])
def test_a_script_is_told_what_an_engine_is_and_how_to_mend_it(
    tmp_path, examples, monkeypatch, capsys, sets, code
):
    from check_my_engine import main

    recipe = write_recipe(tmp_path, 64)
    monkeypatch.setattr(sys, "argv", ["check_my_engine.py", str(recipe), *sets])
    assert main() == code
    said = capsys.readouterr().out
    assert said.count("PASS") == (5 if code == 0 else 0)
    assert ("cause    penalties_unmodelled" in said) == (code == 1)
