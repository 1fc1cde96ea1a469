"""Rollouts as minibatches of packed rows: every token once, in order, with its values and its loss share."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.records.samples import Sample, Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.versions import VersionSpan
from lockstep.training.batch import minibatches
from lockstep.training.beside import score_under_sampling_weights
from lockstep.training.rehearsal import rehearse
from lockstep.training.step import accumulate
from lockstep.training.tokens import StepTokens
from tests.unit.bag_pair import VOCABULARY, Bag, BagPolicy, recipe_of


def policy_of(share=True):
    model = Bag()
    return BagPolicy(model, model.head, None, torch.float32, None, share, "", "")


POLICY = policy_of()


def rollouts_of(lengths, group_size, seed=0, masked=0.0):
    """Samples of these many tokens; engine log-probabilities and advantages tell all tokens apart."""
    rng = np.random.default_rng(seed)
    prompts = [
        rng.integers(3, VOCABULARY, 2 + int(n)).astype(np.int32) for n in rng.integers(1, 30, len(lengths))
    ]
    samples = []
    for row, n in enumerate(lengths):
        mask = rng.random(n) >= masked
        mask[rng.integers(n)] = True
        samples.append(
            Sample(
                group=row // group_size,
                sample=row % group_size,
                item=row // group_size,
                prompt_ids=prompts[row // group_size],
                token_ids=rng.integers(3, VOCABULARY, n).astype(np.int32),
                loss_mask=mask,
                engine_logprobs=-rng.random(n).astype(np.float32),
                advantages=rng.normal(size=n).astype(np.float32),
                version_spans=(VersionSpan(0, n, 0),),
                finish_reason="length",
            )
        )
    return Samples(samples, SamplingParams(max_tokens=64))


def recipe(groups, group_size, minibatches=1, microbatch=4096, **objective):
    training = {"prompts_per_step": groups, "group_size": group_size, "minibatches": minibatches}
    return recipe_of(
        training={"steps": 1, "tokens_per_microbatch": microbatch} | training, objective=objective
    )


def joined(parts, name):
    return np.concatenate([getattr(micro, name).numpy() for part in parts for micro in part])


shapes = st.tuples(
    st.sampled_from([(1, 4), (2, 2), (4, 2), (6, 3)]),
    st.sampled_from([8, 40, 4096]),
    st.sampled_from([0.0, 0.4]),
)


@settings(max_examples=25)
@given(
    shape=shapes,
    minibatch=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
    scale=st.sampled_from(["token-mean", "seq-mean-token-mean"]),
)
def test_every_token_is_in_one_row_with_its_own_values_and_weights_sum_to_1(shape, minibatch, seed, scale):
    (groups, size), microbatch, masked = shape
    n_parts = minibatch if groups % minibatch == 0 else 1
    lengths = np.random.default_rng(seed).integers(1, 20, groups * size)
    rollouts = rollouts_of(lengths, size, seed, masked)
    parts = minibatches(rollouts, POLICY, recipe(groups, size, n_parts, microbatch, aggregation=scale))
    assert len(parts) == n_parts
    targets = np.concatenate([micro.row.targets.numpy() for part in parts for micro in part])
    np.testing.assert_array_equal(targets, rollouts.token_ids)
    np.testing.assert_array_equal(joined(parts, "engine_logprobs"), rollouts.engine_logprobs)
    np.testing.assert_array_equal(joined(parts, "loss_mask"), rollouts.loss_mask)
    np.testing.assert_array_equal(
        joined(parts, "advantages"), np.where(rollouts.loss_mask, rollouts.advantages, 0.0)
    )
    assert (joined(parts, "token_weights")[~rollouts.loss_mask] == 0.0).all()
    for number, part in enumerate(parts):
        assert sum(float(micro.token_weights.double().sum()) for micro in part) == pytest.approx(
            1.0, abs=1e-5
        )
        owners = np.concatenate([micro.sequence_ids.numpy() for micro in part])
        per = groups * size // n_parts
        np.testing.assert_array_equal(owners, rollouts[number * per : number * per + per].owners)
        for micro in part:
            assert micro.row.token_ids.numel() <= microbatch or len(micro.row.blocks) == 1, (
                "one block, if any, is longer"
            )


def test_by_token_each_counts_alike_and_by_sequence_each_sample_does():
    rollouts = rollouts_of([2, 8, 5, 5], 2)
    by_token = joined(minibatches(rollouts, POLICY, recipe(2, 2, aggregation="token-mean")), "token_weights")
    np.testing.assert_allclose(by_token, 1 / 20, rtol=1e-6)
    by_sequence = joined(
        minibatches(rollouts, POLICY, recipe(2, 2, aggregation="seq-mean-token-mean")), "token_weights"
    )
    for sample, length in enumerate([2, 8, 5, 5]):
        np.testing.assert_allclose(by_sequence[rollouts.owners == sample], 1 / 4 / length, rtol=1e-6)


def test_a_nan_where_the_model_did_not_sample_reaches_no_advantage():
    rollouts = rollouts_of([4, 4], 2)
    first = rollouts[0]
    mask = np.array([True, False, True, True])
    rollouts.samples[0] = replace(
        first, loss_mask=mask, advantages=np.where(mask, 1.0, np.nan).astype(np.float32)
    )
    assert joined(minibatches(rollouts, POLICY, recipe(1, 2)), "advantages")[1] == 0.0


def gradients(policy):
    return {name: None if p.grad is None else p.grad.clone() for name, p in policy.model.named_parameters()}


def test_the_sum_over_microbatches_is_the_gradient_of_the_whole_minibatch():
    """However the rows are cut, and whether prompts are shared in them or not."""
    rollouts = rollouts_of(range(3, 15), 3, masked=0.3)
    found = []
    for share, microbatch in ((True, 4096), (True, 16), (False, 4096)):
        policy = policy_of(share)
        asked = recipe(4, 3, 1, microbatch)
        (part,) = minibatches(rollouts, policy, asked)
        loss = accumulate(part, policy, asked, StepTokens(), on_sampling_weights=True)
        found.append((len(part), loss, gradients(policy)))
    assert found[1][0] > 1, "it is cut"
    for _, loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][1], abs=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[0][2][name], rtol=1e-4, atol=1e-7)


def test_the_old_logprob_pass_and_the_forward_pass_of_training_give_the_same_numbers_bit_for_bit():
    rollouts = rollouts_of([5, 3, 7, 2], 2)
    asked = recipe(2, 2, 2, 12)
    parts = minibatches(rollouts, POLICY, asked)
    score_under_sampling_weights(parts, POLICY, asked.sampling.temperature)
    for part in parts:
        tokens = StepTokens()
        with torch.no_grad():
            accumulate(part, POLICY, asked, tokens, on_sampling_weights=False)
        assert not np.concatenate(tokens.log_ratio).any()


# ── rehearsal ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rehearsal_is_the_loss_that_train_would_begin_with_and_leaves_nothing_behind():
    policy = policy_of()
    asked = recipe(4, 2, clip_low=0.1, clip_high=0.1)
    rollouts = rollouts_of(range(2, 10), 2, masked=0.3)
    rollouts.fill(engine_logprobs=np.concatenate(policy.score(rollouts.groups, 1.0)) + np.float32(0.01))
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    found = rehearse(rollouts, policy, asked)
    assert all(torch.equal(before[name], p) for name, p in policy.model.named_parameters())
    assert all(p.grad is None for p in policy.model.parameters())
    n = int(rollouts.loss_mask.sum())
    assert found.gap.size == found.log_ratio.size == found.owners.size == n, "of what the model sampled alone"
    np.testing.assert_array_equal(found.owners, rollouts.owners[rollouts.loss_mask])
    np.testing.assert_allclose(found.gap, -0.01, atol=1e-5)
    assert not found.log_ratio.any()
    assert found.clip_fraction == 0.0
    (part,) = minibatches(rollouts, policy, asked)
    assert found.loss == accumulate(part, policy, asked, StepTokens(), on_sampling_weights=True)
    # With the engine's numbers each ratio is e^gap, within the clip range.
    weights, advantages = joined([part], "token_weights"), joined([part], "advantages")
    assert found.loss_borrowed == pytest.approx(-(weights * np.exp(-0.01) * advantages).sum(), abs=1e-6)


def test_a_rehearsal_is_uncorrected_for_a_correction_hides_what_is_judged():
    policy = policy_of()
    rollouts = rollouts_of([6, 4], 2)
    plain, corrected = (rehearse(rollouts, policy, recipe(1, 2, correction=kind)) for kind in ("none", "tis"))
    assert plain.loss == corrected.loss
    assert plain.loss_borrowed == corrected.loss_borrowed


def test_a_rehearsal_that_diverges_leaves_no_gradient_either():
    from lockstep.errors import DivergenceError

    policy = policy_of()
    rollouts = rollouts_of([6, 4], 2)
    rollouts.samples[1] = replace(rollouts[1], advantages=np.full(4, np.nan, np.float32))
    with pytest.raises(DivergenceError, match="loss nan"):
        rehearse(rollouts, policy, recipe(1, 2))
    assert all(p.grad is None for p in policy.model.parameters())
