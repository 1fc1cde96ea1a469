"""GRPO against closed forms and against autograd by hand."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from lockstep.config.recipe import Objective, parse_recipe
from lockstep.errors import RecipeError
from lockstep.objectives.base import LossInputs
from lockstep.objectives.corrections import truncated_importance_weights
from lockstep.objectives.grpo import group_advantages, grpo, token_weights
from lockstep.objectives.registry import loss_of, refuse_objective

LOW, HIGH = 0.2, 0.3


def inputs_of(now, old, advantages, **others):
    """Tokens of one sequence, all of them sampled, with the same weight and no correction."""
    given = {
        "engine_logprobs": old,
        "sampling_logprobs": old,
        "token_weights": torch.full_like(old, 1.0 / len(old)),
        "corrections": torch.ones_like(old),
        "loss_mask": torch.ones_like(old, dtype=torch.bool),
        "sequence_ids": torch.zeros_like(old, dtype=torch.int64),
    }
    return LossInputs(logprobs=now, old_logprobs=old, advantages=advantages, **(given | others))


def run(log_ratio, advantage):
    now = torch.tensor([log_ratio], requires_grad=True)
    outputs = grpo(inputs_of(now, torch.zeros(1), torch.tensor([advantage])), clip_low=LOW, clip_high=HIGH)
    outputs.loss.backward()
    return float(outputs.loss.detach()), float(now.grad), bool(outputs.clipped)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("log_ratio", [-0.5, -0.1, 0.0, 0.1, 0.5])
def test_loss_gradient_and_clip_flag_are_those_of_the_formula(log_ratio, advantage):
    ratio = float(np.exp(np.float32(log_ratio)))
    held = float(np.clip(ratio, 1 - LOW, 1 + HIGH))
    loss, grad, clipped = run(log_ratio, advantage)
    assert loss == pytest.approx(-min(ratio * advantage, held * advantage), abs=1e-6)
    active = ratio * advantage <= held * advantage
    assert grad == pytest.approx(-ratio * advantage if active else 0.0, abs=1e-6)
    assert clipped is not active


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    _, grad, clipped = run(0.0, 0.7)
    assert grad == pytest.approx(-0.7)
    assert not clipped


def test_advantages_are_relative_to_the_group():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    scaled, centred = group_advantages(rewards, "std"), group_advantages(rewards, "none")
    np.testing.assert_allclose(scaled[0], [1, -1, -1, 1], atol=1e-5)
    np.testing.assert_allclose(centred[0], [0.5, -0.5, -0.5, 0.5])
    np.testing.assert_array_equal(scaled[1], 0.0)


def test_token_weights_sum_to_one_and_differ_as_they_say():
    lengths, all_of_them = np.array([1, 3]), np.ones(4, bool)
    np.testing.assert_allclose(token_weights(all_of_them, lengths, "token"), [0.25] * 4)
    np.testing.assert_allclose(
        token_weights(all_of_them, lengths, "sequence"), [0.5, 1 / 6, 1 / 6, 1 / 6], rtol=1e-6
    )


def test_token_weights_are_shared_by_the_tokens_in_the_loss_alone():
    mask, lengths = np.array([True, False, True, True, False, False]), np.array([1, 3, 2])
    np.testing.assert_allclose(
        token_weights(mask, lengths, "token"), [1 / 3, 0, 1 / 3, 1 / 3, 0, 0], rtol=1e-6
    )
    np.testing.assert_allclose(
        token_weights(mask, lengths, "sequence"), [1 / 2, 0, 1 / 4, 1 / 4, 0, 0], rtol=1e-6
    )
    with pytest.raises(ValueError, match="no token in the loss"):
        token_weights(~mask & mask, lengths, "token")


def test_the_correction_is_one_on_agreement_truncated_above_and_without_gradient():
    engine = torch.tensor([-1.0, -1.0, -3.0, -1.0])
    trainer = torch.tensor([-1.0, -1.5, -1.0, -0.9], requires_grad=True)
    weights = truncated_importance_weights(trainer, engine, cap=2.0)
    torch.testing.assert_close(
        weights, torch.tensor([1.0, np.exp(-0.5), 2.0, np.exp(0.1)], dtype=torch.float32)
    )
    assert not weights.requires_grad


def test_a_correction_beside_the_engines_own_old_logprobs_is_refused():
    from lockstep.config.recipe import with_sets

    table = {
        "model": {"path": "m"},
        "task": {"name": "t"},
        "sampling": {"max_tokens": 1},
        "training": {"steps": 1},
    }
    recipe = parse_recipe(table, "test")
    assert with_sets(recipe, ["objective.correction=tis"]).objective.correction == "tis"
    with pytest.raises(RecipeError, match=r"objective\.correction"):
        with_sets(recipe, ["objective.correction=tis", "objective.old_logprobs=engine"])


THEIRS = """\
import torch
from lockstep.objectives.base import LossOutputs
from lockstep.objectives.registry import needs


def plain(inputs, *, scale=1.0):
    return LossOutputs(loss=-inputs.mean(inputs.logprobs * scale), clipped=torch.zeros_like(inputs.loss_mask))


@needs(sequence_ids=True)
def of_sequences(inputs):
    return plain(inputs)


@needs(values=True, reference=True)
def too_much(inputs):
    return plain(inputs)


def per_token(inputs):
    return LossOutputs(loss=-inputs.logprobs.detach().sum(), clipped=torch.zeros_like(inputs.loss_mask))


def number(inputs):
    return 3.0


def raises(inputs):
    return 1 / 0


NOTHING = None
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    (tmp_path / "their_objectives.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "their_objectives:"
    sys.modules.pop("their_objectives", None)


@pytest.mark.parametrize(
    ("name", "options", "needle"),
    [
        ("grpoo", {}, "got 'grpoo', expected 'grpo' perhaps"),
        ("nothing_like_it", {}, "expected grpo, or module:function"),
        ("grpo", {"high": 0.2}, "expected none: grpo is set by objective.clip_low, objective.clip_high"),
        ("no_such_module:loss", {}, "ModuleNotFoundError"),
        ("their_objectives:NOTHING", {}, "no function"),
        ("their_objectives:plain", {"scail": 2.0}, "unexpected keyword argument 'scail'"),
        ("their_objectives:too_much", {}, "which needs values and reference"),
    ],
)
def test_an_objective_that_cannot_be_is_refused_before_anything_is_started(theirs, name, options, needle):
    for refuse in (refuse_objective, loss_of):
        with pytest.raises(RecipeError, match=re.escape(needle)):
            refuse(Objective(name=name, options=options))


def test_a_need_is_refused_with_its_reason(theirs):
    with pytest.raises(RecipeError) as raised:
        refuse_objective(Objective(name=f"{theirs}too_much"))
    assert raised.value.hint == "no value head is trained; no reference model is kept"


@pytest.mark.parametrize("name", ["plain", "of_sequences"])
def test_an_objective_of_the_users_gets_its_options(theirs, name):
    options = {"scale": 3.0} if name == "plain" else {}
    objective = Objective(name=f"{theirs}{name}", options=options)
    refuse_objective(objective)
    now = torch.tensor([-1.0, -2.0], requires_grad=True)
    outputs = loss_of(objective)(inputs_of(now, now.detach(), torch.ones(2)))
    assert float(outputs.loss.detach()) == pytest.approx(1.5 * options.get("scale", 1.0))


@pytest.mark.parametrize(
    ("name", "needle"),
    [("per_token", "a loss of shape"), ("number", "float"), ("raises", "ZeroDivisionError")],
)
def test_what_is_no_loss_is_refused_by_the_objectives_name(theirs, name, needle):
    now = torch.tensor([-1.0, -2.0], requires_grad=True)
    with pytest.raises(RecipeError, match=f"objective {theirs}{name}.*{needle}"):
        loss_of(Objective(name=f"{theirs}{name}"))(inputs_of(now, now.detach(), torch.ones(2)))


def test_the_registrys_objective_is_the_function_with_the_recipes_keys():
    now, old = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-1.5, -1.0])
    given = inputs_of(now, old, torch.tensor([1.0, -1.0]))
    own = loss_of(Objective(clip_low=0.1, clip_high=0.4))(given)
    assert torch.equal(own.loss, grpo(given, clip_low=0.1, clip_high=0.4).loss)
    assert not torch.equal(own.loss, grpo(given, clip_low=0.2, clip_high=0.2).loss)


def test_a_correction_is_a_factor_of_its_own():
    """Token weights go on summing to 1.

    The gradient is the uncorrected one, token by token times the correction.
    """
    old, advantages, factor = torch.tensor([-1.0, -2.0]), torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0])
    grads = []
    for corrections in (torch.ones(2), factor):
        now = old.clone().requires_grad_()
        given = inputs_of(now, old, advantages, corrections=corrections)
        assert float(given.token_weights.sum()) == 1.0
        grpo(given, clip_low=0.2, clip_high=0.2).loss.backward()
        grads.append(now.grad)
    torch.testing.assert_close(grads[1], grads[0] * factor)


def test_refusing_an_objective_of_our_own_imports_no_torch():
    code = (
        "import sys; from lockstep.config.recipe import Objective; "
        "from lockstep.objectives.registry import refuse_objective\n"
        "refuse_objective(Objective()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
