"""Which objectives there are, what they are given, and what is refused."""

import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from lockstep.config.imported import imported
from lockstep.config.objective import Kl
from lockstep.config.recipe import Objective, parse_recipe
from lockstep.errors import RecipeError
from lockstep.objectives.aggregation import token_weights
from lockstep.objectives.catalogue import OBJECTIVES, Needs
from lockstep.objectives.grpo import grpo
from lockstep.objectives.registry import loss_of, needs_of, refuse_objective
from tests.unit.loss_inputs import inputs_of


def test_token_weights_sum_to_one_and_differ_as_they_say():
    lengths = np.array([1, 3])
    all_of_them = np.ones(4, bool)
    np.testing.assert_allclose(token_weights(all_of_them, lengths, "token-mean", 8), [0.25] * 4)
    np.testing.assert_allclose(
        token_weights(all_of_them, lengths, "seq-mean-token-mean", 8), [0.5, 1 / 6, 1 / 6, 1 / 6], rtol=1e-6
    )


def test_token_weights_are_shared_by_the_tokens_in_the_loss_alone():
    mask = np.array([True, False, True, True, False, False])
    lengths = np.array([1, 3, 2])
    np.testing.assert_allclose(
        token_weights(mask, lengths, "token-mean", 8), [1 / 3, 0, 1 / 3, 1 / 3, 0, 0], rtol=1e-6
    )
    np.testing.assert_allclose(
        token_weights(mask, lengths, "seq-mean-token-mean", 8), [1 / 2, 0, 1 / 4, 1 / 4, 0, 0], rtol=1e-6
    )
    with pytest.raises(ValueError, match="no token in the loss"):
        token_weights(~mask & mask, lengths, "token-mean", 8)


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


@needs(pairs=True)
def of_pairs(inputs):
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
        ("nothing_like_it", {}, "expected cispo, decoupled_ppo, "),
        (
            "grpo",
            {"cliphigh": 0.2},
            "objective.options.cliphigh: got an option that grpo does not have, "
            "expected 'objective.clip_high' perhaps",
        ),
        ("gspo", {"hihg": 0.2}, "expected 'objective.options.high' perhaps"),
        ("gspo", {"epsilon": 0.2}, "expected low, high"),
        ("gspo", {"low": "little"}, "objective.options.low: got 'little', expected `float`"),
        ("topr", {"high": 0.5}, "objective.options.high: got 0.5, expected `float` >= 1.0"),
        ("no_such_module:loss", {}, "ModuleNotFoundError"),
        ("their_objectives:NOTHING", {}, "no function"),
        ("their_objectives:plain", {"scail": 2.0}, "unexpected keyword argument 'scail'"),
    ],
)
def test_an_objective_that_cannot_be_is_refused_before_anything_is_started(theirs, name, options, needle):
    for refuse in (refuse_objective, loss_of):
        with pytest.raises(RecipeError, match=re.escape(needle)):
            refuse(Objective(name=name, options=options))


def test_what_an_objective_needs_is_its_own_and_its_kl_terms(theirs):
    assert needs_of(Objective(name=f"{theirs}too_much")) == Needs(values=True, reference=True)
    assert needs_of(Objective(name=f"{theirs}of_pairs")) == Needs(pairs=True)
    assert needs_of(Objective(kl=Kl(coef=0.1))) == Needs(reference=True)
    assert needs_of(Objective()) == Needs()


@pytest.mark.parametrize(("name", "advantage"), [("ppo", "group"), ("grpo", "gae")])
def test_values_and_the_estimator_that_is_made_of_them_go_together(name, advantage):
    with pytest.raises(RecipeError, match=r"objective\.advantage"):
        refuse_objective(Objective(name=name, advantage=advantage))


UNREAD = {
    "correction": {"correction": "tis"},
    "kl.place": {"kl": Kl(coef=0.1, place="reward")},
    "aggregation": {"aggregation": "seq-mean-token-sum"},
    "advantage": {"advantage": "leave_one_out"},
    "advantage_scale": {"advantage_scale": "none"},
}


@pytest.mark.parametrize("key", UNREAD)
def test_a_key_that_a_loss_of_pairs_does_not_read_is_refused_and_another_objective_takes_it(key):
    with pytest.raises(
        RecipeError, match=rf"key objective\.{re.escape(key)}: got '.*' with 'dpo', expected '"
    ):
        refuse_objective(Objective(name="dpo", **UNREAD[key]))
    refuse_objective(Objective(name="grpo", **UNREAD[key]))


@pytest.mark.parametrize("beside", [{"kl": Kl(coef=0.1)}, {"entropy_coef": 0.01}])
def test_with_a_mean_over_tokens_beside_its_pairs_dpo_has_an_aggregation(beside):
    refuse_objective(Objective(name="dpo", aggregation="seq-mean-token-sum", **beside))


def test_what_an_objective_of_the_users_reads_beside_its_pairs_is_not_refused(theirs):
    refuse_objective(Objective(name=f"{theirs}of_pairs", correction="tis", aggregation="seq-mean-token-mean"))


@pytest.mark.parametrize("name", ["plain", "of_pairs"])
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
    now = torch.tensor([-1.0, -2.0], requires_grad=True)
    old = torch.tensor([-1.5, -1.0])
    given = inputs_of(now, old, torch.tensor([1.0, -1.0]))
    own = loss_of(Objective(clip_low=0.1, clip_high=0.4, options={"dual_clip": 9.0}))(given)
    assert torch.equal(own.loss, grpo(given, clip_low=0.1, clip_high=0.4, dual_clip=9.0).loss)
    assert not torch.equal(own.loss, grpo(given, clip_low=0.2, clip_high=0.2, dual_clip=9.0).loss)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_options_are_the_keyword_arguments_of_the_function(name):
    known = OBJECTIVES[name]
    _, *arguments = inspect.signature(imported(known.function, "objective.name")).parameters.values()
    assert {a.name for a in arguments} == {*known.keys, *known.options.__struct_fields__}
    assert all(a.default is a.empty for a in arguments), "a default stands in options.py alone"


def test_a_correction_is_a_factor_of_its_own():
    """Token weights go on summing to 1.

    The gradient is the uncorrected one, token by token times the correction.
    """
    old = torch.tensor([-1.0, -2.0])
    advantages = torch.tensor([1.0, -1.0])
    factor = torch.tensor([0.5, 2.0])
    grads = []
    for corrections in (torch.ones(2), factor):
        now = old.clone().requires_grad_()
        given = inputs_of(now, old, advantages, corrections=corrections)
        assert float(given.token_weights.sum()) == 1.0
        grpo(given, clip_low=0.2, clip_high=0.2, dual_clip=float("inf")).loss.backward()
        grads.append(now.grad)
    torch.testing.assert_close(grads[1], grads[0] * factor)


def test_refusing_an_objective_of_our_own_imports_no_torch():
    code = (
        "import sys; from lockstep.config.recipe import Objective; "
        "from lockstep.objectives.registry import refuse_objective\n"
        "refuse_objective(Objective(name='gspo', options={'low': .1})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
