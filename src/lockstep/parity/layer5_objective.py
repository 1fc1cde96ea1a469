"""Layer 5: is the objective at lag 0 what the certificate predicts?

Real rollouts of the recipe's own task go through the real training code, without an optimizer step. On version-exact tokens
the policy ratio is 1, nothing is clipped, and the loss with the engine's numbers as denominator differs from the loss with the
trainer's by no more than the largest gap can bring about.
"""

import numpy as np
import torch

from lockstep.metrics.reduce import bootstrap_mean_ci95, mismatch_figures, policy_figures
from lockstep.objectives.base import LossInputs
from lockstep.objectives.grpo import grpo
from lockstep.parity.pair import Pair
from lockstep.parity.tolerances import LOSS_SLACK, POLICY_RATIO_AT_LAG_0
from lockstep.policy.packing import Group
from lockstep.records.tokens import FLOAT32, INT32
from lockstep.records.verdicts import Finding, Verdict
from lockstep.rollout.collect import request

PROMPTS = 4
GROUP = 4


def judge(pair: Pair, seed: int) -> Verdict:
    """The verdict of layer 5."""
    prompts = [pair.renderer.prompt(pair.task.messages(pair.task.item(number))) for number in range(PROMPTS)]
    params = [request(pair.recipe, pair.renderer, seed + row, n=GROUP) for row in range(PROMPTS)]
    completions = pair.engine.sample(prompts, params)
    ids = [np.frombuffer(c.token_ids, INT32) for c in completions]
    groups = [Group(prompt, ids[row * GROUP : (row + 1) * GROUP]) for row, prompt in enumerate(prompts)]
    engine = torch.from_numpy(np.frombuffer(b"".join(c.logprobs for c in completions), FLOAT32).copy())
    temperature = pair.recipe.sampling.temperature
    old, now = (torch.from_numpy(np.concatenate(pair.policy.score(groups, temperature))) for _ in range(2))
    # Alternating signs, so that both sides of the clip are exercised whatever the rewards of so few samples are.
    signs = torch.tensor([1.0 if i % 2 else -1.0 for i in range(len(ids))])
    advantages = signs.repeat_interleave(torch.tensor([len(i) for i in ids]))
    clip = pair.recipe.objective.clip_low, pair.recipe.objective.clip_high
    weights = torch.full_like(now, 1.0 / now.numel())
    exact = grpo(LossInputs(now, old, advantages, weights), *clip)
    borrowed = grpo(LossInputs(now, engine, advantages, weights), *clip)
    gap, log_ratio = (now - engine).numpy(), (now - old).numpy()
    figures = mismatch_figures(gap, *clip) | policy_figures(log_ratio, *clip)
    figures |= {
        "clip_fraction": float(exact.clipped.float().mean()),
        "loss_with_trainer_old": float(exact.loss),
        "loss_with_engine_old": float(borrowed.loss),
        "loss_bound": LOSS_SLACK * float(np.expm1(np.abs(gap).max())),
    }
    owners = np.repeat(np.arange(len(ids)), [len(i) for i in ids])
    return _verdict(pair, gap, log_ratio, owners, figures)


def _verdict(pair: Pair, gap: np.ndarray, log_ratio: np.ndarray, owners: np.ndarray, figures: dict[str, float]) -> Verdict:
    n = gap.size
    moved = abs(figures["loss_with_engine_old"] - figures["loss_with_trainer_old"])
    cause, evidence, size = "", "", np.abs(gap)
    if not np.abs(log_ratio).max() <= POLICY_RATIO_AT_LAG_0:
        cause, size = "trainer_not_repeatable", np.abs(log_ratio)
        evidence = f"the trainer's second pass over the same tokens differs by {size.max():.1e} nats"
    elif not quantile_ok(pair, gap):
        cause, evidence = (
            "task_tokens_differ",
            f"|gap| reaches {size.max():.1e} nats on the task's own tokens, not on the probes",
        )
    elif not moved <= figures["loss_bound"] + np.finfo(np.float32).eps:
        cause, evidence = (
            "loss_not_explained",
            f"the loss moves by {moved:.1e}, the gaps allow {figures['loss_bound']:.1e}",
        )
    if cause:
        found = Finding(
            cause=cause,
            effect_nats=float(size.mean()),
            ci95=bootstrap_mean_ci95(size, owners),
            n_tokens=n,
            fix=pair.engine.fix(cause),
            evidence=evidence,
        )
        return Verdict(layer="objective", status="FAIL", summary=evidence, n_tokens=n, findings=(found,), figures=figures)
    summary = (
        f"at lag 0 the policy ratio is 1, {figures['clip_fraction']:.2%} clipped, mismatch ESS {figures['mismatch_ess']:.6f}; "
        f"the engine's numbers as old log-probabilities move the loss by {moved:.1e}"
    )
    return Verdict(layer="objective", status="PASS", summary=summary, n_tokens=n, figures=figures)


def quantile_ok(pair: Pair, gap: np.ndarray) -> bool:
    """True when the gap on the task's own tokens is within what layer 4 allows on the probes."""
    return bool(np.isfinite(gap).all() and np.quantile(np.abs(gap), 0.999) <= pair.noise.p999)
