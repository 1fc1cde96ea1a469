"""KL estimators, entropy bonus, DPO and PPO's value loss: closed forms and finite differences."""

import math

import numpy as np
import pytest
import torch

from lockstep.config.objective import Kl, Objective
from lockstep.objectives.dpo import pairs_of
from lockstep.objectives.registry import loss_of
from lockstep.objectives.regularisers import kl, regulariser
from lockstep.policy.logprobs import token_logprobs
from tests.unit.loss_inputs import inputs_of

D = torch.tensor([-1.2, -0.1, 0.0, 0.3, 2.0], dtype=torch.float64)
VALUES = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(-d) + d - 1}
SLOPES = {"k1": lambda d: np.ones_like(d), "k2": lambda d: d, "k3": lambda d: 1 - np.exp(-d)}
SLOPES |= {"k1+": SLOPES["k2"], "k3+": SLOPES["k2"]}
VALUES |= {"k1+": VALUES["k1"], "k3+": VALUES["k3"]}


@pytest.mark.parametrize("estimator", SLOPES)
def test_an_estimator_has_its_value_and_its_gradient(estimator):
    now = (D - 1.0).requires_grad_()
    found = kl(estimator, now, torch.full_like(D, -1.0))
    found.sum().backward()
    np.testing.assert_allclose(found.detach(), VALUES[estimator](D.numpy()), atol=1e-14)
    np.testing.assert_allclose(now.grad, SLOPES[estimator](D.numpy()), atol=1e-14)


def test_the_regulariser_is_by_weight_whatever_the_correction():
    now = D.clone().requires_grad_()
    zero = torch.zeros_like(D)
    weights = torch.tensor([0.5, 0.0, 0.2, 0.2, 0.1], dtype=torch.float64)
    entropy = torch.arange(5, dtype=torch.float64)
    inputs = inputs_of(
        now, zero, zero, reference_logprobs=zero, token_weights=weights, corrections=zero, entropy=entropy
    )
    found = regulariser(inputs, Objective(kl=Kl(coef=0.3, estimator="k2"), entropy_coef=0.2))
    assert float(found.detach()) == pytest.approx(
        float(0.3 * (weights * D**2 / 2).sum() - 0.2 * (weights * entropy).sum())
    )
    assert regulariser(inputs, Objective()) is None
    assert regulariser(inputs, Objective(kl=Kl(coef=0.3, place="reward"))) is None


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_entropy_has_the_gradient_of_finite_differences_beside_that_of_the_logprobs(softcap):
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (4, 11))
    targets = torch.tensor([1, 5, 0, 9])
    weights = torch.randn(2, 4, generator=generator, dtype=torch.float64)

    def loss(hidden, head):
        found = token_logprobs(hidden, head, targets, temperature=0.7, softcap=softcap, with_entropy=True)
        return (weights[0] * found.logprobs + weights[1] * found.entropy).sum()

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), head.requires_grad_()))


OWNERS = torch.tensor([0, 0, 1, 2, 2, 3])


def dpo_loss(now, kind="sigmoid", mask=None):
    reference = torch.tensor([-1.0, -2.0, -0.5, -1.5, -1.0, -0.7], dtype=torch.float64)
    mask = torch.ones(6, dtype=torch.bool) if mask is None else mask
    inputs = inputs_of(
        now,
        reference,
        torch.zeros_like(now),
        reference_logprobs=reference,
        loss_mask=mask,
        sequence_ids=OWNERS + 4,
        pairs=torch.tensor([[6, 4], [5, 7]]),
        pair_weight=0.5,
    )
    return loss_of(Objective(name="dpo", options={"kind": kind, "beta": 0.3}))(inputs).loss


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo_is_its_formula_over_pairs_of_sequences_and_its_gradient_finite_differences(kind):
    reference = np.array([-1.0, -2.0, -0.5, -1.5, -1.0, -0.7])
    now = torch.tensor([-1.2, -1.5, -0.1, -1.0, -1.4, -2.0], dtype=torch.float64, requires_grad=True)
    moved = np.bincount(OWNERS, now.detach().numpy() - reference)
    h = np.array([moved[2] - moved[0], moved[1] - moved[3]])
    expected = np.log1p(np.exp(-0.3 * h)) if kind == "sigmoid" else (h - 1 / 0.6) ** 2
    loss = dpo_loss(now, kind)
    assert float(loss.detach()) == pytest.approx(expected.mean(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda at: dpo_loss(at, kind), (now,))


def test_dpo_reads_no_token_that_the_model_did_not_sample():
    now = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, True, True, True])
    dpo_loss(now, mask=mask).backward()
    assert float(now.grad[1]) == 0.0
    assert (now.grad[mask] != 0.0).all()


def test_pairs_are_best_against_worst_and_ties_are_none():
    rewards = np.array([0.0, 1.0, 0.5, 1.0, 0.3, 0.3, 0.3, 0.3, 0.0, 0.0, 0.0, 2.0])
    np.testing.assert_array_equal(pairs_of(rewards, 4), [[1, 0], [3, 2], [11, 10]])
    assert len(pairs_of(np.ones(8), 4)) == 0


def test_the_value_loss_is_the_worse_of_the_value_and_the_clipped_value():
    old = torch.tensor([0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    values = torch.tensor([0.1, 0.5, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([1.0, 1.0, -1.0, 0.1], dtype=torch.float64)
    zero = torch.zeros_like(old)
    inputs = inputs_of(zero, zero, zero, values=values, old_values=old, returns=returns)
    outputs = loss_of(Objective(name="ppo", options={"value_clip": 0.2, "value_coef": 2.0}))(inputs)
    # errors² .81 .25 2.25 .36; clipped to .1 .2 .2 −.2: .81 .64 1.44 .09
    assert float(outputs.value_loss) == pytest.approx(0.5 * (0.81 + 0.64 + 2.25 + 0.36) / 4)
    outputs.loss.backward()
    np.testing.assert_allclose(values.grad, np.array([-0.9, 0.0, 1.5, -0.6]) * 2.0 / 4, atol=1e-12)
    assert math.isclose(float(outputs.loss.detach()), 2.0 * float(outputs.value_loss))
