"""Layer 3: does the engine serve the weights it is sent?

Perturb → sync → prove. Every tensor of the trainer gets noise, the weights are published and loaded, and both sides score
known tokens. The residue is explained by the hypothesis that fits best: all tensors new; none delivered; the head old under a
new body; the body old under a new head. Then the weights are put back, exactly, and proven again. Prompts that were in the
prefix cache before the update are drawn from after it: a stale cache shows there, and only there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from lockstep.metrics.reduce import bootstrap_mean_ci95
from lockstep.parity.canary import Canary
from lockstep.parity.pair import Pair, Sampled, draw
from lockstep.parity.tolerances import PERTURBATION, PERTURBATION_OVER_NOISE
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import Finding, Verdict

PROBE_VERSION = 10**9
"""Version number of perturbed weights: no training run counts as far."""
CACHE_TOKENS = 2
CACHE_PROMPTS = 4

CAUSES = {"head old": "stale_head", "none delivered": "not_delivered", "body old": "stale_body"}


def judge(pair: Pair, canary: Canary, neutral: Sampled, seed: int) -> Verdict:
    """The verdict of layer 3. Leaves trainer and engine with the weights they had, and the canary with its clean gap."""
    cached = _cache_prompts(neutral)
    one = SamplingParams(max_tokens=CACHE_TOKENS)
    draw(pair, cached, one, seed)  # fills the prefix cache under the old weights
    old = canary.trainer_scores(pair)
    with perturbed(pair, seed) as before:
        pair.sync(PROBE_VERSION)
        engine = canary.engine_scores(pair)
        old_head = before[pair.policy.head]
        fits = {
            "all new": canary.trainer_scores(pair),
            "none delivered": old,
            "head old": canary.trainer_scores(pair, head=old_head),
        }
        after = draw(pair, cached, one, seed)
        cache_gap = np.concatenate(pair.policy.score(after.groups, 1.0)) - after.engine_logprobs
        with restored_body(pair, before):
            fits["body old"] = canary.trainer_scores(pair)
    pair.sync(pair.version)
    restored = canary.measure(pair)
    residues = {name: np.abs(scores - engine) for name, scores in fits.items()}
    figures = {f"residue_{name.replace(' ', '_')}_abs_mean_nats": float(r.mean()) for name, r in residues.items()}
    figures |= {
        "shift_abs_mean_nats": float(np.abs(fits["all new"] - old).mean()),
        "after_restore_abs_max_nats": restored.gap_abs_max_nats,
        "cache_abs_max_nats": float(np.abs(cache_gap).max()),
    }
    return _verdict(pair, canary, residues, (cache_gap, after.owners), restored.gap_abs_mean_nats, figures)


def _verdict(
    pair: Pair,
    canary: Canary,
    residues: dict[str, np.ndarray],
    cache: tuple[np.ndarray, np.ndarray],
    clean: float,
    figures: dict,
) -> Verdict:
    n = len(canary.scores) * 2 + cache[0].size
    shift, new = figures["shift_abs_mean_nats"], float(residues["all new"].mean())
    if not shift >= PERTURBATION_OVER_NOISE * pair.noise.p50:
        reason = f"the perturbation moved the canary by {shift:.1e} nats only: no stale weight could be seen"
        return Verdict(layer="weights", status="NOT_RUN", summary="nothing proven", reason=reason, figures=figures)
    delivered = new <= pair.noise.p50 * 2
    if not delivered or not clean <= pair.noise.p50 * 2:
        best = min(residues, key=lambda name: residues[name].mean())
        cause = CAUSES.get(best, "unexplained_weights") if not delivered else "unexplained_weights"
        named = {"stale_head": "the engine's lm_head is stale: its packed copy holds the old weights"}
        summary = f"after a sync the engine does not serve the weights it was sent: {named.get(cause, cause.replace('_', ' '))}"
        evidence = ", ".join(f"{name}: {r.mean():.1e}" for name, r in sorted(residues.items(), key=lambda kv: kv[1].mean()))
        return _fail(
            pair,
            cause,
            summary,
            residues["all new"],
            canary.owners,
            f"mean |engine − trainer|, nats, by hypothesis: {evidence}",
            n,
            figures,
        )
    if not np.abs(cache[0]).max() <= pair.noise.p999:
        summary = "after a sync the engine answers from a prefix cache of the old weights"
        evidence = (
            f"tokens drawn over prompts that were cached before the update are off by up to {np.abs(cache[0]).max():.1e} nats"
        )
        return _fail(pair, "stale_prefix_cache", summary, np.abs(cache[0]), cache[1], evidence, n, figures)
    canary.clean_gap_nats = clean
    summary = f"a change of {shift:.2f} nats arrived to within {new:.1e}, and back again; no stale head, body or prefix cache"
    return Verdict(layer="weights", status="PASS", summary=summary, n_tokens=n, figures=figures)


def _fail(
    pair: Pair, cause: str, summary: str, size: np.ndarray, owners: np.ndarray, evidence: str, n: int, figures: dict
) -> Verdict:
    found = finding(pair, cause, float(size.mean()), size.size, evidence, bootstrap_mean_ci95(size, owners))
    return Verdict(layer="weights", status="FAIL", summary=summary, n_tokens=n, findings=(found,), figures=figures)


def finding(
    pair: Pair,
    cause: str,
    effect_nats: float,
    n_tokens: int,
    evidence: str,
    ci95: tuple[float, float] = (float("nan"), float("nan")),
) -> Finding:
    """A cause of this layer, with this engine's mend."""
    return Finding(
        cause=cause,
        effect_nats=effect_nats,
        ci95=ci95,
        n_tokens=n_tokens,
        fix=pair.engine.fix(cause),
        evidence=evidence,
    )


@contextmanager
def perturbed(pair: Pair, seed: int) -> Iterator[dict[torch.nn.Parameter, torch.Tensor]]:
    """Noise on every parameter of the trainer, in place; yields each parameter's old value and puts it back exactly."""
    before = {parameter: parameter.detach().clone() for parameter in pair.policy.model.parameters()}
    generator = torch.Generator(device=pair.policy.head.device).manual_seed(seed)
    try:
        with torch.no_grad():
            for parameter, value in before.items():
                scale = PERTURBATION * value.float().square().mean().sqrt()
                noise = torch.randn(value.shape, generator=generator, device=value.device) * scale
                parameter.add_(noise.to(value.dtype))
        yield before
    finally:
        _put_back(before)


@contextmanager
def restored_body(pair: Pair, before: dict[torch.nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """All parameters but the head at their old values; with tied embeddings the input embedding stays new with the head."""
    now = {parameter: parameter.detach().clone() for parameter in before}
    _put_back({p: value for p, value in before.items() if p is not pair.policy.head})
    try:
        yield
    finally:
        _put_back(now)


@torch.no_grad()
def _put_back(values: dict[torch.nn.Parameter, torch.Tensor]) -> None:
    for parameter, value in values.items():
        parameter.copy_(value)


def _cache_prompts(neutral: Sampled) -> list[np.ndarray]:
    """The longest prompts: those that fill at least a block of the prefix cache."""
    return sorted(neutral.prompts, key=len)[-CACHE_PROMPTS:]
