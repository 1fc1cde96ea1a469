"""The synchronous loop: sample, train, sync, prove, and again.

    step k   engine  ──sample──►            idle              ──load──────────► score canary ─► …
             trainer    idle      rollouts ─► train ─► publish ──score canary─►     idle        …
                                     │                                          │
                                     └► rollouts/step-k.parquet                 └► metrics.jsonl, verdicts.jsonl

A step's rollouts are on disk before they are trained on, and its line in ``metrics.jsonl`` is written when its weights are
proven in the engine. So a killed run goes on from its last checkpoint by training on the stored rollouts again, from the
weights that did not see them yet, and samples only what was never sampled: nothing is lost, nothing is trained on twice.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from lockstep.config.recipe import Recipe
from lockstep.errors import ParityError, RewardError, RunError, WeightSyncError
from lockstep.loop.session import Session
from lockstep.metrics.reduce import quantiles_abs
from lockstep.parity import layer3_weights
from lockstep.parity.canary import Canary, CanaryResult
from lockstep.parity.causes import finding
from lockstep.parity.certificate import issue
from lockstep.parity.ladder import PROOF_TOKENS, LadderResult, climb
from lockstep.parity.pair import Pair, draw
from lockstep.parity.probes import probe_prompts
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import Verdict
from lockstep.rollout import collect, store
from lockstep.rollout.collect import Rollouts
from lockstep.runs.layout import RunLayout
from lockstep.runs.read import drop_partial_line, number, read_lines
from lockstep.runs.write import append_metrics, append_verdict
from lockstep.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from lockstep.training.optimizer import MasterAdamW
from lockstep.training.step import train

Say = Callable[[str], None]
PROOF_PROMPTS = 8
REPLAY_RTOL = 1e-4
"""A replayed step must give the recorded loss: the same rollouts, weights and code. Threads may sum in another order."""


@dataclass(eq=False)
class Run:
    """A run under way."""

    session: Session
    layout: RunLayout
    optimizer: MasterAdamW
    say: Say
    canary: Canary | None = None
    unproven: int = 0
    """Syncs since the last proof whose update was too small for the canary to miss."""

    @property
    def pair(self) -> Pair:
        """Both sides."""
        return self.session.pair

    @property
    def recipe(self) -> Recipe:
        """What is run."""
        return self.session.pair.recipe


def prove(run: Run, when: str) -> LadderResult:
    """Run the ladder and write its verdicts; on PASS issue the certificate.

    Raises:
        ParityError: when a layer fails: training on this pair would be training on another policy's samples.
    """
    result = climb(run.pair, lambda layer: run.say(f"ladder: {layer}"))
    for verdict in result.verdicts:
        append_verdict(run.layout.verdicts, verdict, when)
        run.say(f"  {verdict.layer:<10} {verdict.status:<8} {verdict.summary}")
    if not result.passed:
        raise refusal(result)
    issue(run.pair, result.verdicts, run.layout.certificate)
    run.canary = result.canary
    return result


def refusal(result: LadderResult) -> ParityError:
    """The error that a ladder without a PASS ends in."""
    verdict = next(v for v in result.verdicts if v.status != "PASS")
    if verdict.status == "NOT_RUN":
        return ParityError(f"layer {verdict.layer}", got="NOT_RUN", expected="PASS", hint=verdict.reason)
    first = verdict.findings[0]
    return ParityError(
        f"layer {verdict.layer}, cause {first.cause.replace('_', ' ')}",
        got=f"{verdict.summary}; effect {first.effect_nats:.3g} nats per token (95 % {first.ci95[0]:.3g} to {first.ci95[1]:.3g})",
        expected="PASS before the first step",
        hint=first.fix,
    )


def run_steps(run: Run, *, resumed: bool) -> None:
    """Prove, then train to the recipe's last step.

    Raises:
        ParityError, WeightSyncError: when a proof fails.
        RewardError, DivergenceError, EngineError: as they say; everything sampled so far is on disk.
    """
    run.pair.engine.need("load")
    first = catch_up(run) if resumed else 0
    if resumed:
        run.pair.version = first
        run.pair.sync(first)
    prove(run, f"before step {first}")
    for step in range(first, run.recipe.training.steps):
        began = time.perf_counter()
        rollouts = sample(run, step)
        gate = partial(refuse_gap, run, step)
        figures = rollout_figures(rollouts, step) | train(rollouts, run.pair.policy, run.optimizer, run.recipe, step, gate)
        figures |= sync(run, step + 1)
        spent = time.perf_counter() - began
        figures |= {
            "step_s": spent,
            "tokens_per_s": figures["n_tokens"] / spent,
            "samples_per_s": figures["n_samples"] / spent,
        }
        append_metrics(run.layout.metrics, step, step + 1, figures)
        run.say(_line(step, run.recipe.training.steps, figures))
        if (step + 1) % run.recipe.training.checkpoint_every == 0 or step + 1 == run.recipe.training.steps:
            prove_transport(run, step + 1)
            save_checkpoint(run.layout.checkpoints, step + 1, run.pair.policy, run.optimizer, run.session.model_path)


def sample(run: Run, step: int) -> Rollouts:
    """Draw and score one step's rollouts, and store them before anything is trained."""
    rollouts = collect.sample(run.pair.engine, run.pair.task, run.pair.renderer, run.recipe, step)
    if rollouts.missing:
        store.save(run.layout.failed_rollouts(step), rollouts)
        raise ParityError(
            f"rollouts of step {step}",
            got=f"{rollouts.missing} tokens without a finite log-probability",
            expected="one for every token",
            hint=f"they are kept in {run.layout.failed_rollouts(step)}; lockstep check names the cause",
        )
    try:
        collect.score(rollouts, run.pair.task, run.pair.renderer, run.recipe)
    except RewardError as error:
        store.save(run.layout.failed_rollouts(step), rollouts)
        error.add_note(f"the rollouts of step {step} are kept in {run.layout.failed_rollouts(step)}")
        raise
    store.save(run.layout.rollouts(step), rollouts)
    return rollouts


def refuse_gap(run: Run, step: int, gap: np.ndarray) -> None:
    """Every rollout token is a canary too: the forward pass that trains on it has scored it under the weights that drew it.

    Raises:
        ParityError: when the tail of |gap| is beyond what arithmetic allows; no optimizer step has used these tokens.
    """
    tail, limit = quantiles_abs(gap)["p999"], run.pair.noise.p999
    if not tail <= limit:
        raise ParityError(
            f"rollouts of step {step}, before they are trained on",
            got=f"|gap| p99.9 {tail:.2e} nats over {gap.size} tokens",
            expected=f"at most {limit:g}",
            hint=f"they are kept in {run.layout.rollouts(step)}; lockstep check names the cause",
        )


def sync(run: Run, version: int) -> dict[str, float]:
    """Publish, load, and prove by the canary that the engine serves what it was sent.

    Raises:
        WeightSyncError: when it does not; the cause is named.
    """
    assert run.canary is not None
    began = time.perf_counter()
    with run.pair.loading(version):
        trainer = run.canary.trainer_scores(run.pair)
    run.pair.version = version
    loaded = time.perf_counter()
    result = run.canary.measure(run.pair, trainer)
    verdict = _sync_verdict(run, result, version)
    append_verdict(run.layout.verdicts, verdict, f"after sync {version}")
    _refuse(verdict, version)
    run.unproven += verdict.status != "PASS"
    return {
        "canary_gap_abs_max_nats": result.gap_abs_max_nats,
        "canary_shift_abs_mean_nats": result.shift_abs_mean_nats,
        "sync_s": loaded - began,
        "canary_s": time.perf_counter() - loaded,
    }


def prove_transport(run: Run, version: int) -> None:
    """Where updates were too small for the canary, layer 3's perturbation proves their way into the engine before a checkpoint.

    Raises:
        WeightSyncError: when it is refuted.
    """
    if run.unproven:
        verdict = _prove(run)
        append_verdict(run.layout.verdicts, verdict, f"before checkpoint {version}")
        _refuse(verdict, version)
        run.unproven = 0


def _refuse(verdict: Verdict, version: int) -> None:
    if verdict.status == "FAIL":
        found = verdict.findings[0]
        raise WeightSyncError(
            f"weight sync {version}, cause {found.cause.replace('_', ' ')}",
            got=found.evidence,
            expected="engine and trainer to agree on the canary",
            hint=found.fix,
        )


def _prove(run: Run) -> Verdict:
    """Layer 3 on fresh tokens, against the gap that the ladder measured."""
    assert run.canary is not None
    sample = draw(run.pair, probe_prompts(run.pair, PROOF_PROMPTS, run.pair.seed), SamplingParams(max_tokens=8), run.pair.seed)
    proof = Canary.of(sample, PROOF_TOKENS)
    proof.clean_gap_nats = run.canary.clean_gap_nats
    return layer3_weights.judge(run.pair, proof, sample)


def _sync_verdict(run: Run, result: CanaryResult, version: int) -> Verdict:
    agreement = f"mean |gap| {result.gap_abs_mean_nats:.1e} nats over {result.n_tokens} tokens, limit {result.limit_nats:.1e}"
    if result.proven:
        return Verdict(
            layer="weights",
            status="PASS",
            summary=f"version {version} is served: {agreement}",
            n_tokens=result.n_tokens,
        )
    if not result.refuted:
        return Verdict(
            layer="weights",
            status="NOT_RUN",
            summary=f"version {version} is not refuted: {agreement}",
            n_tokens=result.n_tokens,
            reason=f"the update moved the canary by {result.shift_abs_mean_nats:.1e} nats, less than the limit: "
            "had it been lost, this would not have shown",
        )
    # One stale tensor moves little in one step; layer 3 moves every tensor far enough to name it.
    run.say(f"canary: {agreement}; looking for the cause")
    assert run.canary is not None
    named = _prove(run)
    findings = named.findings
    if named.status != "FAIL":
        cause = "not_delivered" if result.not_delivered else "unexplained_weights"
        size = np.full(result.n_tokens, result.gap_abs_mean_nats)
        findings = (finding(cause, size, np.arange(size.size), agreement, run.pair.engine.fix(cause)),)
    return Verdict(
        layer="weights",
        status="FAIL",
        summary=agreement,
        n_tokens=result.n_tokens,
        findings=findings,
        figures=named.figures,
    )


def catch_up(run: Run) -> int:
    """Bring a killed run's trainer to where it was. Returns the first step that has no rollouts yet.

    Raises:
        RunError: when a replayed step does not give the recorded loss.
    """
    drop_partial_line(run.layout.metrics)
    drop_partial_line(run.layout.verdicts)
    recorded = {row["step"]: row["metrics"] for row in read_lines(run.layout.metrics)}
    checkpoint = newest_checkpoint(run.layout.checkpoints)
    step = load_checkpoint(checkpoint, run.pair.policy, run.optimizer) if checkpoint else 0
    run.say(f"resume: {checkpoint.name if checkpoint else 'no checkpoint yet, from the start'}")
    while step < run.recipe.training.steps and run.layout.rollouts(step).is_file():
        rollouts = store.load(run.layout.rollouts(step), run.recipe.training.group_size)
        figures = rollout_figures(rollouts, step) | train(rollouts, run.pair.policy, run.optimizer, run.recipe, step)
        if step not in recorded:
            append_metrics(run.layout.metrics, step, step + 1, figures)
        elif not np.isclose(figures["loss"], number(recorded[step]["loss"]), rtol=REPLAY_RTOL, atol=REPLAY_RTOL):
            raise RunError(
                f"resume, step {step} replayed from its rollouts",
                got=f"loss {figures['loss']:.6g}",
                expected=f"{number(recorded[step]['loss']):.6g}, as recorded",
                hint="was the recipe, the code or the model changed since? Start a new run",
            )
        run.say(f"resume: step {step} replayed from its stored rollouts")
        step += 1
    return step


def rollout_figures(rollouts: Rollouts, step: int) -> dict[str, float]:
    """What can be said of rollouts before training, by catalog name."""
    lengths, rewards = rollouts.lengths(), rollouts.rewards.reshape(-1, rollouts.group_size)
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "flat_group_fraction": float((rewards.std(axis=1) == 0.0).mean()),
        "completion_tokens_mean": float(lengths.mean()),
        "truncated_fraction": float(np.mean([c.finish_reason == "length" for c in rollouts.completions])),
        "n_tokens": float(lengths.sum()),
        "n_samples": float(len(lengths)),
        "missing_logprobs": float(rollouts.missing),
        "lag_steps": float(np.mean([step - span.version for c in rollouts.completions for span in c.version_spans])),
        "sample_s": rollouts.sample_s,
        "reward_s": rollouts.reward_s,
    }


def _line(step: int, steps: int, figures: dict[str, float]) -> str:
    return (
        f"step {step + 1:>3}/{steps}  reward {figures['reward_mean']:.3f}  entropy {figures['entropy_mean_nats']:.2f}  "
        f"|gap| p99.9 {figures['gap_abs_p999_nats']:.0e}  canary {figures['canary_gap_abs_max_nats']:.0e}  "
        f"{figures['step_s']:.1f} s"
    )
