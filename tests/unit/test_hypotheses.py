"""Simulated engines that report each distribution in turn: the one they report must win."""

import numpy as np
import pytest
import torch

from lockstep.parity.explain.semantics.hypotheses import candidate_logprobs, candidates_of, edit, fits
from lockstep.policy.model import load_policy
from lockstep.records.samples import Group
from lockstep.records.tokens import SamplingParams
from lockstep.training.trainer import Trainer


@pytest.fixture(scope="module")
def trainer(tiny_model_dir):
    return Trainer(load_policy(tiny_model_dir, "float32", "float32"), None)


SAMPLING = SamplingParams(
    max_tokens=8,
    temperature=0.6,
    top_k=30,
    repetition_penalty=1.5,
    presence_penalty=0.7,
    frequency_penalty=0.4,
    logit_bias={3: 2.0},
)


def test_eight_candidates_under_everything_and_one_under_nothing():
    assert len(candidates_of(SAMPLING)) == 8
    assert len(candidates_of(SamplingParams(max_tokens=1))) == 1
    assert len(candidates_of(SamplingParams(max_tokens=1, temperature=0.0, top_p=0.5))) == 1, (
        "greedy truncates nothing"
    )


@pytest.mark.parametrize("at", range(8))
def test_the_distribution_that_was_reported_wins(trainer, at):
    # Tokens that the truncation keeps, so that each candidate is possible.
    rng = np.random.default_rng(at)
    candidates = candidates_of(SAMPLING)
    groups = []
    for _ in range(6):
        prompt = rng.integers(0, 97, 5).astype(np.int32)
        tokens = []
        for _ in range(8):
            group = Group(np.r_[prompt, tokens].astype(np.int32), [np.array([0], np.int32)])
            with torch.no_grad():
                logits = trainer.logits(trainer.hidden([group])[0])
            edited = edit(logits, prompt, torch.tensor([*tokens, 0]), len(tokens), SAMPLING)
            both = sorted(set(edited[0].topk(30).indices.tolist()) & set(logits[0].topk(30).indices.tolist()))
            tokens.append(both[rng.integers(len(both))])
        groups.append(Group(prompt, [np.array(tokens, np.int32)]))
    engine = np.concatenate([candidate_logprobs(trainer, g, SAMPLING, candidates)[at] for g in groups])
    engine = engine + rng.normal(0, 1e-5, engine.size).astype(np.float32)
    ranked = fits(trainer, groups, engine, SAMPLING)
    assert ranked[0].semantics == candidates[at]
    assert ranked[1].p50 > 100 * ranked[0].p50


def test_edit_is_what_vllm_documents_token_by_token():
    torch.manual_seed(0)
    logits = torch.randn(4, 10)
    prompt = np.array([1, 2], np.int32)
    completion = torch.tensor([2, 5, 5, 7])
    out = edit(logits, prompt, completion, 0, SAMPLING)
    for row in range(4):
        history = completion[:row].tolist()
        for token in range(10):
            z = float(logits[row, token]) + SAMPLING.logit_bias.get(token, 0.0)
            if token in history or token in prompt:
                z = z / 1.5 if z > 0 else z * 1.5
            z -= 0.4 * history.count(token) + 0.7 * (token in history)
            assert float(out[row, token]) == pytest.approx(z, abs=1e-5)
    torch.testing.assert_close(edit(logits[2:], prompt, completion, 2, SAMPLING), out[2:])
