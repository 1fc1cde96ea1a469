"""One training step against a plain reference, and the gate before any of its optimizer updates."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lockstep.config.recipe import parse_recipe
from lockstep.errors import DivergenceError, ParityError
from lockstep.objectives.base import LossOutputs
from lockstep.parity.gate import Gate, Measured
from lockstep.parity.tolerances import NOISE
from lockstep.policy.model import load_policy
from lockstep.records.samples import Group, Samples
from lockstep.records.tokens import Completion, SamplingParams, pack_ids, pack_logprobs
from lockstep.records.versions import VersionSpan
from lockstep.training import step
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
            i // SIZE,
            i % SIZE,
            pack_ids(ids[i].tolist()),
            pack_logprobs(scores[i]),
            "length",
            (VersionSpan(0, len(ids[i]), 0),),
        )
        for i in range(len(ids))
    ]
    rollouts = Samples.of(prompts, completions, SamplingParams(max_tokens=6))
    rollouts.fill(advantages=np.repeat(rng.normal(size=len(ids)).astype(np.float32), rollouts.lengths))
    return rollouts


def with_numbers(rollouts, sample, by):
    """One completion's numbers moved by ``by`` nats."""
    before = rollouts[sample]
    rollouts.samples[sample] = replace(before, engine_logprobs=before.engine_logprobs + np.float32(by))
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
def test_a_bad_completion_in_any_minibatch_is_refused_before_the_first_update(
    policy, old, minibatches, sample
):
    rollouts = with_numbers(drawn(policy), sample, -20.0)
    before = parameters(policy.model)
    seen = []
    optimizer = MasterAdamW(policy.model, recipe().optimizer)
    with pytest.raises(ParityError, match="tokens"):
        train(rollouts, policy, optimizer, recipe(minibatches, old), 0, gate_of(seen))
    assert torch.equal(parameters(policy.model), before)
    assert all(p.grad is None for p in policy.model.parameters())
    assert not optimizer.state()
    (tokens,) = seen
    gap = np.abs(tokens.sampling_logprobs - tokens.engine_logprobs)
    assert set(tokens.owners[gap > 1.0]) == {sample}
    assert gap.size == sum(LENGTHS)


@pytest.mark.parametrize("old", ["trainer", "engine"])
def test_numbers_so_far_off_that_the_loss_is_no_number_are_refused_by_the_gate(policy, old):
    rollouts = with_numbers(drawn(policy), 0, -200.0)
    with pytest.raises(ParityError):
        train(rollouts, policy, MasterAdamW(policy.model, recipe().optimizer), recipe(1, old), 0, gate_of([]))


def test_a_loss_that_is_no_number_stops_the_run_when_the_gate_is_content(policy):
    rollouts = drawn(policy)
    before = parameters(policy.model)
    rollouts.samples[0] = replace(rollouts[0], advantages=np.full(LENGTHS[0], np.nan, np.float32))
    with pytest.raises(DivergenceError, match="loss nan"):
        train(rollouts, policy, MasterAdamW(policy.model, recipe().optimizer), recipe(), 0, gate_of([]))
    assert torch.equal(parameters(policy.model), before)


@pytest.mark.parametrize("minibatches", [1, 2, 4])
@pytest.mark.parametrize("old", ["trainer", "engine"])
def test_figures_of_the_mismatch_are_over_all_tokens(policy, old, minibatches):
    rollouts = with_numbers(drawn(policy), 7, -5e-4)  # of the last minibatch
    seen = []
    figures = train(
        rollouts,
        policy,
        MasterAdamW(policy.model, recipe().optimizer),
        recipe(minibatches, old),
        0,
        gate_of(seen),
    )
    assert figures["gap_abs_max_nats"] == pytest.approx(5e-4, rel=0.01)
    assert figures["gap_abs_mean_nats"] == pytest.approx(5e-4 * LENGTHS[7] / sum(LENGTHS), rel=0.05)


def reference(path, rollouts, minibatches, lr=1e-2, clip=0.2):
    """GRPO written out: transformers' own model, one sequence at a time, full log-softmax, torch's AdamW.

    Returns the model.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def logprobs(i):
        prompt, ids = rollouts[i].prompt_ids, rollouts[i].token_ids
        row = torch.tensor(np.r_[prompt, ids])[None].long()
        logits = model(input_ids=row, use_cache=False).logits[0].float()
        return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, row[0, len(prompt) :, None])[:, 0]

    with torch.no_grad():
        old = [logprobs(i) for i in range(len(LENGTHS))]
    per = PROMPTS // minibatches * SIZE
    for first in range(0, len(LENGTHS), per):
        part = range(first, first + per)
        n = sum(rollouts[i].loss_mask.sum() for i in part)
        loss = 0.0
        for i in part:
            # What is not in the loss is read by the model, and by nothing else.
            chosen = np.flatnonzero(rollouts[i].loss_mask)
            ratio = torch.exp(logprobs(i)[chosen] - old[i][chosen])
            advantage = torch.from_numpy(rollouts[i].advantages[chosen])
            loss = (
                loss - torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).sum() / n
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def with_tools(rollouts, engine_says=np.nan):
    """Tokens in the middle of some samples, and at one's end, that a tool put there.

    The engine's numbers there are nobody's.
    """
    for sample, masked in {0: [1], 1: [1, 2, 3], 5: [0], 6: [2]}.items():
        before = rollouts[sample]
        mask = before.loss_mask.copy()
        numbers = before.engine_logprobs.copy()
        mask[masked] = False
        numbers[masked] = engine_says
        rollouts.samples[sample] = replace(before, loss_mask=mask, engine_logprobs=numbers)
    return rollouts


N_TOOLS = 6


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize(("minibatches", "microbatch"), [(1, 4096), (2, 12), (4, 8)])
def test_minibatches_and_microbatches_train_as_the_plain_reference_does(
    policy, tiny_model_dir, minibatches, microbatch, tools
):
    rollouts = with_tools(drawn(policy)) if tools else drawn(policy)
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
    # Adam's first updates are sign-like: an element whose gradient is rounding noise may go either way, so
    # all but a few agree.
    apart = (parameters(policy.model) - parameters(other)).abs()
    assert apart.quantile(0.999) < 1e-4 * moved
    assert apart.mean() < 1e-4 * moved


@pytest.mark.parametrize(
    ("objective", "engine_says"),
    [
        ({}, np.nan),
        ({}, -40.0),
        ({"old": "engine"}, np.nan),
        ({"correction": "tis"}, -np.inf),
        ({"aggregation": "seq-mean-token-mean"}, np.nan),
    ],
)
def test_what_stands_where_the_model_did_not_sample_changes_nothing(
    policy, tiny_model_dir, objective, engine_says
):
    """Neither the engine's number nor the advantage there.

    Not the loss, not a gradient, not a figure, not the gate.
    """
    outcomes = []
    for says, advantage in ((-0.5, 0.0), (engine_says, np.nan)):
        trained = load_policy(tiny_model_dir, "float32", "float32")
        seen = []
        rollouts = with_tools(drawn(trained), says)
        rollouts.fill(advantages=np.where(rollouts.loss_mask, rollouts.advantages, np.float32(advantage)))
        assert rollouts.missing == 0
        optimizer = MasterAdamW(trained.model, recipe().optimizer)
        figures = train(rollouts, trained, optimizer, recipe(2, **objective), 0, gate_of(seen))
        del figures["train_s"]
        outcomes.append((figures, parameters(trained.model)))
        assert seen[0].owners.size == sum(LENGTHS) - N_TOOLS
        assert figures["gap_abs_max_nats"] < 1e-5
        assert np.isfinite(rollouts.sampling_logprobs).all(), "the trainer has numbers of all tokens"
    assert outcomes[0][0] == outcomes[1][0]
    assert torch.equal(outcomes[0][1], outcomes[1][1])


def test_a_wrong_number_of_a_sampled_token_is_refused_beside_tokens_that_nobody_judges(policy):
    rollouts = with_tools(drawn(policy))
    seen = []
    numbers = rollouts[1].engine_logprobs.copy()
    numbers[0] -= 20.0
    rollouts.samples[1] = replace(rollouts[1], engine_logprobs=numbers)
    with pytest.raises(ParityError, match="1 of 26 tokens"):
        train(rollouts, policy, MasterAdamW(policy.model, recipe().optimizer), recipe(), 0, gate_of(seen))
    gap = np.abs(seen[0].sampling_logprobs - seen[0].engine_logprobs)
    assert seen[0].owners[gap.argmax()] == 1


@pytest.mark.parametrize("sets", [{}, {"correction": "tis"}])
def test_grpo_through_the_registry_is_the_formula_bit_for_bit(tiny_model_dir, sets, monkeypatch):
    """As the step computed it before there were other objectives.

    Corrected weights times the lesser of both, summed.
    """

    def written_out(inputs):
        ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
        free = ratio * inputs.advantages
        held = ratio.clamp(1.0 - 0.2, 1.0 + 0.2) * inputs.advantages
        weights = inputs.token_weights * (inputs.corrections if sets.get("correction") else 1.0)
        return LossOutputs(loss=-(weights * torch.minimum(free, held)).sum(), clipped=(held < free).detach())

    weights = []
    for loss_of in (step.loss_of, lambda objective: written_out):
        monkeypatch.setattr(step, "loss_of", loss_of)
        policy = load_policy(tiny_model_dir, "float32", "float32")
        optimizer = MasterAdamW(policy.model, recipe().optimizer)
        for number in range(3):
            train(drawn(policy), policy, optimizer, recipe(2, **sets), number, gate_of([]))
        weights.append(parameters(policy.model))
    assert torch.equal(*weights)
