"""One training step against a plain reference, and the gate before any of its optimizer updates."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lockstep.config.recipe import parse_recipe
from lockstep.errors import DivergenceError, ParityError
from lockstep.parity.gate import Gate, Measured
from lockstep.parity.tolerances import NOISE
from lockstep.policy.model import load_policy
from lockstep.policy.packing import Group
from lockstep.records.tokens import Completion, pack_ids, pack_logprobs
from lockstep.records.versions import VersionSpan
from lockstep.rollout.collect import Rollouts
from lockstep.training.optimizer import MasterAdamW
from lockstep.training.step import train

PROMPTS, SIZE = 4, 2
LENGTHS = (3, 5, 4, 6, 2, 5, 3, 4)


@pytest.fixture
def policy(tiny_model_dir):
    return load_policy(tiny_model_dir, "float32", "float32")


def recipe(minibatches=1, old="trainer", microbatch=4096, **objective):
    return parse_recipe(
        {
            "model": {"path": "tiny"},
            "task": {"name": "a:b"},
            "sampling": {"max_tokens": 6},
            "objective": {"old_logprobs": old} | objective,
            "optimizer": {"lr": 1e-2},
            "training": {
                "steps": 1,
                "prompts_per_step": PROMPTS,
                "group_size": SIZE,
                "minibatches": minibatches,
                "tokens_per_microbatch": microbatch,
            },
        },
        "tests",
    )


def drawn(policy):
    """Completions of random ids with the trainer's own numbers, and advantages of both signs."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 97, 4 + row).astype(np.int32) for row in range(PROMPTS)]
    ids = [rng.integers(3, 97, length).astype(np.int32) for length in LENGTHS]
    groups = [Group(prompt, ids[row * SIZE : row * SIZE + SIZE]) for row, prompt in enumerate(prompts)]
    scores = policy.score(groups, 1.0)
    completions = [
        Completion(
            i // SIZE, i % SIZE, pack_ids(ids[i].tolist()), pack_logprobs(scores[i]), "length", (VersionSpan(0, len(ids[i]), 0),)
        )
        for i in range(len(ids))
    ]
    rollouts = Rollouts(0, SIZE, list(range(PROMPTS)), prompts, completions, [""] * len(ids))
    rollouts.rewards = rng.normal(size=len(ids))
    rollouts.advantages = rng.normal(size=len(ids)).astype(np.float32)
    return rollouts


def with_numbers(rollouts, sample, by):
    """One completion's numbers moved by ``by`` nats."""
    before = rollouts.completions[sample]
    logprobs = np.frombuffer(before.logprobs, "<f4") + np.float32(by)
    rollouts.completions[sample] = Completion(
        before.prompt_index, before.sample_index, before.token_ids, logprobs.tobytes(), before.finish_reason, before.version_spans
    )
    return rollouts


def gate_of(kept, temperature=1.0):
    gate = Gate(NOISE["torch.float32"], temperature, recipe().objective, Measured(1e-6, 0.0, 1e-7))

    def judge(tokens):
        kept.append(tokens)
        if reasons := gate.refusals(tokens):
            raise ParityError("step", got="; ".join(reasons), expected="", hint="")

    return judge


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("old", ["trainer", "engine"])
@pytest.mark.parametrize("minibatches", [1, 2, 4])
@pytest.mark.parametrize("sample", range(0, PROMPTS * SIZE, SIZE))
def test_a_bad_completion_in_any_minibatch_is_refused_before_the_first_update(policy, old, minibatches, sample):
    rollouts, before, seen = with_numbers(drawn(policy), sample, -20.0), parameters(policy.model), []
    optimizer = MasterAdamW(policy.model, recipe().optimizer)
    with pytest.raises(ParityError, match="tokens"):
        train(rollouts, policy, optimizer, recipe(minibatches, old), 0, gate_of(seen))
    assert torch.equal(parameters(policy.model), before)
    assert all(p.grad is None for p in policy.model.parameters())
    assert not optimizer.state()
    (tokens,) = seen
    gap = np.abs(tokens.trainer_logprobs - tokens.engine_logprobs)
    assert set(tokens.owners[gap > 1.0]) == {sample}
    assert gap.size == sum(LENGTHS)


@pytest.mark.parametrize("old", ["trainer", "engine"])
def test_numbers_so_far_off_that_the_loss_is_no_number_are_refused_by_the_gate(policy, old):
    rollouts = with_numbers(drawn(policy), 0, -200.0)
    with pytest.raises(ParityError):
        train(rollouts, policy, MasterAdamW(policy.model, recipe().optimizer), recipe(1, old), 0, gate_of([]))


def test_a_loss_that_is_no_number_stops_the_run_when_the_gate_is_content(policy):
    rollouts, before = drawn(policy), parameters(policy.model)
    rollouts.advantages[0] = np.nan
    with pytest.raises(DivergenceError, match="loss nan"):
        train(rollouts, policy, MasterAdamW(policy.model, recipe().optimizer), recipe(), 0, gate_of([]))
    assert torch.equal(parameters(policy.model), before)


@pytest.mark.parametrize("minibatches", [1, 2, 4])
@pytest.mark.parametrize("old", ["trainer", "engine"])
def test_figures_of_the_mismatch_are_over_all_tokens(policy, old, minibatches):
    rollouts = with_numbers(drawn(policy), 7, -5e-4)  # of the last minibatch
    seen = []
    figures = train(rollouts, policy, MasterAdamW(policy.model, recipe().optimizer), recipe(minibatches, old), 0, gate_of(seen))
    assert figures["gap_abs_max_nats"] == pytest.approx(5e-4, rel=0.01)
    assert figures["gap_abs_mean_nats"] == pytest.approx(5e-4 * LENGTHS[7] / sum(LENGTHS), rel=0.05)


def reference(path, rollouts, minibatches, lr=1e-2, clip=0.2):
    """GRPO written out: transformers' own model, one sequence at a time, full log-softmax, torch's AdamW. Returns the model."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def logprobs(i):
        prompt, ids = rollouts.prompts[i // SIZE], rollouts.token_ids(i)
        row = torch.tensor(np.r_[prompt, ids])[None].long()
        logits = model(input_ids=row, use_cache=False).logits[0].float()
        return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, row[0, len(prompt) :, None])[:, 0]

    with torch.no_grad():
        old = [logprobs(i) for i in range(len(LENGTHS))]
    per = PROMPTS // minibatches * SIZE
    for first in range(0, len(LENGTHS), per):
        part = range(first, first + per)
        n = sum(LENGTHS[i] for i in part)
        loss = 0.0
        for i in part:
            ratio, advantage = torch.exp(logprobs(i) - old[i]), float(rollouts.advantages[i])
            loss = loss - torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).sum() / n
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(("minibatches", "microbatch"), [(1, 4096), (2, 12), (4, 8)])
def test_minibatches_and_microbatches_train_as_the_plain_reference_does(policy, tiny_model_dir, minibatches, microbatch):
    rollouts = drawn(policy)
    start = parameters(policy.model)
    train(
        rollouts,
        policy,
        MasterAdamW(policy.model, recipe().optimizer),
        recipe(minibatches, microbatch=microbatch),
        0,
        gate_of([]),
    )
    other = reference(tiny_model_dir, rollouts, minibatches)
    moved = (parameters(policy.model) - start).abs().max()
    assert moved > 5e-3
    # Adam's first updates are sign-like: an element whose gradient is rounding noise may go either way, so all but a few agree.
    apart = (parameters(policy.model) - parameters(other)).abs()
    assert apart.quantile(0.999) < 1e-4 * moved
    assert apart.mean() < 1e-4 * moved
