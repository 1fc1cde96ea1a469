"""The stages of a step, each a function of the run. The loops of this folder only put them in order.

    sample ─► reward ─► train_gated ───────────► sync ─► record ─► checkpoint
      │         │          gate │                  │
      │         │     refused ◄─┴─► admitted       └► canary: is version k + 1 served?
      ▼         ▼        ▼             ▼
    rollouts/drawn/…   rollouts/refused/…   rollouts/step-….parquet

A step's samples are on disk before anything else is done with them. They get the name that resume trains on
only when the gate has admitted every token of them, and the gate is in the one stage that trains, replayed or
not.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lockstep.config.recipe import Recipe
from lockstep.errors import ParityError, RewardError, WeightSyncError
from lockstep.loop.delivery import CANARY, Deliveries
from lockstep.loop.figures import rollout_figures
from lockstep.loop.open import Session
from lockstep.loop.unproven import go_on
from lockstep.parity.alarms import Watch
from lockstep.parity.canary import Canary, CanaryResult
from lockstep.parity.causes import finding
from lockstep.parity.certificate import issue
from lockstep.parity.gate import Gate, unscored
from lockstep.parity.ladder import PROOF_TOKENS, LadderResult, climb
from lockstep.parity.layers import weights as layer3_weights
from lockstep.parity.pair import Pair, draw
from lockstep.parity.probes import probe_prompts
from lockstep.records.alarms import Override
from lockstep.records.samples import Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import AfterSync, BeforeCheckpoint, OfRollouts, Verdict, When
from lockstep.records.versions import LoadMode
from lockstep.rollout import collect, store
from lockstep.runs.certificate import void
from lockstep.runs.layout import RunLayout
from lockstep.runs.record import Recorder
from lockstep.training.step import AtSampling
from lockstep.training.versions import Before

Say = Callable[[str], None]
PROOF_PROMPTS = 8


@dataclass(eq=False)
class Run:
    """A run under way."""

    session: Session
    layout: RunLayout
    say: Say
    recorder: Recorder
    canary: Canary | None = None
    gate: Gate | None = None
    """What rollouts are held to; from the ladder that passed last."""
    unproven: int = 0
    """Syncs since the last proof, tensor by tensor, whose update was too small for the canary to miss."""
    deliveries: Deliveries = field(default_factory=Deliveries)
    """Which version is proven, by the canary, by rollouts or by layer 3."""
    watch: Watch = field(default_factory=Watch)
    """Looks at each step's figures."""
    override: Override | None = None
    """Where the ladder did not pass and the recipe goes on all the same."""
    sign_key: bytes = b""
    """Signs the certificate where the user gave one (``runs/signature.py``)."""
    restarts: int = 0
    """Engines that were started in the place of one that died."""
    quiet: Callable[[], AbstractContextManager[None]] = nullcontext
    """While it is entered the engine draws nothing for the loop: other weights may be loaded."""

    @property
    def pair(self) -> Pair:
        """Both sides."""
        return self.session.pair

    @property
    def max_lag(self) -> int:
        """Versions that a token may be old by when it is trained on."""
        return 0 if self.recipe.loop.kind == "sync" else self.recipe.rollout.max_lag

    @property
    def recipe(self) -> Recipe:
        """What is run."""
        return self.session.pair.recipe


@contextmanager
def certified(run: Run) -> Iterator[None]:
    """While a run goes on, whatever refuses the pair (ladder, gate or sync) voids the run's certificate."""
    try:
        yield
    except ParityError as error:
        void(run.layout.certificate, f"{error.boundary}: {error.got}")
        raise


def prove(run: Run, when: When) -> LadderResult:
    """Run the ladder and write its verdicts; on PASS issue the certificate and set the gate.

    Raises:
        ParityError: when a layer fails: training on this pair would be training on another policy's samples.
    """
    result = climb(run.pair, lambda layer: run.say(f"ladder: {layer}"))
    for verdict in result.verdicts:
        run.recorder.verdict(when, verdict)
        run.say(f"  {verdict.layer:<10} {verdict.status:<8} {verdict.summary}")
    if not result.passed:
        go_on(run, result)
        return result
    issue(run.pair, result.verdicts, run.layout.certificate, key=run.sign_key)
    run.canary, run.unproven = result.canary, 0
    run.deliveries.settle(run.pair.version, "the ladder")
    figures = next(v.figures for v in result.verdicts if v.layer == "numerics")
    run.gate, run.watch = Gate.of(run.pair, figures), Watch(figures["gap_abs_p50_nats"], run.max_lag)
    return result


def sample(run: Run, step: int) -> Samples:
    """Draw one step's samples and store them before anything else; or take those that an interruption left.

    Raises:
        ParityError: for a token without a finite log-probability, and where the engine itself says that other
            weights drew a completion than those that were sent.
    """
    drawn = run.layout.drawn(step)
    if drawn.is_file():
        run.say(f"step {step + 1}: its samples were drawn before the interruption")
        rollouts = store.load_step(drawn, step, run.recipe, run.pair.trainer.vocabulary)
    else:
        rollouts = collect.sample(run.pair.engine, run.pair.task, run.pair.renderer, run.recipe, step)
        store.save(drawn, rollouts)
    if 0 < rollouts.missing <= run.recipe.parity.missing_share * rollouts.loss_mask.sum():
        rollouts.leave_out_missing()
    if rollouts.missing:
        raise refuse(run, step, [f"{rollouts.missing} tokens without a finite log-probability"])
    versions = {span.version for sample in rollouts for span in sample.version_spans}
    if versions != {step}:  # this loop publishes once a step, and waits for the load
        told = ", ".join(map(str, sorted(versions)))
        raise refuse(
            run, step, [f"the engine says that version {told} drew them, and was sent version {step}"]
        )
    return rollouts


def reward(run: Run, step: int, rollouts: Samples) -> None:
    """Score a step's samples, unless an earlier start has.

    Raises:
        RewardError: when the reward function fails; the samples stay where they are, and resume scores them
            again.
    """
    if rollouts.rewarded:
        return
    drawn = run.layout.drawn(step)
    try:
        collect.score(rollouts, run.pair.task, run.recipe)
    except RewardError as error:
        store.save(drawn, rollouts)
        error.add_note(f"the samples of step {step} are kept in {drawn}; resume scores them again")
        raise
    store.save(drawn, rollouts)


def train_gated(
    run: Run, step: int, rollouts: Samples, before: Before | None = None, *, replayed: bool = False
) -> dict[str, float]:
    """Train on a step's rollouts, every token of which the gate has admitted.

    Returns figures by catalog name.

    Args:
        before: scores of what versions before ``step`` drew; None: they drew nothing.
        replayed: they were admitted by an earlier start, and are judged again.

    Raises:
        ParityError: when the gate refuses them, or they were drawn from other weights than those that were
            sent; no weight has changed.
        DivergenceError: for a non-finite loss or gradient.
    """

    version = step  # the loop publishes once a step: before step k the trainer holds version k
    said: dict[str, float] = {}

    def admit(tokens: AtSampling) -> None:
        assert run.gate is not None or run.recipe.parity.override, "the ladder comes before the first step"
        reasons = run.gate.refusals(tokens) if run.gate is not None else unscored(tokens)
        if reasons:
            raise refuse(run, step, reasons, replayed=replayed)
        if not replayed:
            if run.override is None:
                said.update(delivered(run, version, rollouts, tokens))
            store.admit(run.layout, step)

    return rollout_figures(rollouts, version) | run.pair.trainer.step(rollouts, step, admit, before) | said


def delivered(run: Run, version: int, rollouts: Samples, tokens: AtSampling) -> dict[str, float]:
    """Where the canary could not prove the sync of ``version``: what the rollouts that it drew say of it.

    Returns figures by catalog name.

    Raises:
        WeightSyncError: when they were drawn from other weights; they are put where nothing trains on them.
    """
    # What several versions drew proves none of them.
    of_one = all(span.version == version for sample in rollouts for span in sample.version_spans)
    verdict = run.deliveries.judge(run.pair, version, rollouts, tokens) if of_one else None
    spent = {"delivery_s": run.deliveries.spent_s}
    if verdict is None:
        return spent
    run.recorder.verdict(OfRollouts(version), verdict)
    if verdict.status == "FAIL":
        store.refuse(run.layout, version)
    _refuse_sync(verdict, version)
    return spent | verdict.figures


def refuse(run: Run, step: int, reasons: list[str], *, replayed: bool = False) -> ParityError:
    """Put a step's samples where nothing trains on them, and say why.

    Replayed ones stay: they were trained on.
    """
    kept = run.layout.rollouts(step) if replayed else store.refuse(run.layout, step)
    return ParityError(
        f"rollouts of step {step}, before they are trained on",
        got="; ".join(reasons),
        expected="every token as the trainer scores it under the weights that drew it",
        hint=f"they are kept in {kept} and are not trained on; lockstep check names the cause",
    )


def sync(run: Run, version: int, mode: LoadMode = "wait") -> dict[str, float]:
    """Publish, load, and prove by the canary that the engine serves what it was sent.

    Args:
        mode: what becomes of what is being drawn.

    Raises:
        WeightSyncError: when it does not; the cause is named.
    """
    began = time.perf_counter()
    if run.canary is None:
        assert run.override is not None
        run.pair.sync(version, mode)
        run.pair.version, run.unproven = version, run.unproven + 1
        return {"unproven_syncs": float(run.unproven), "sync_s": time.perf_counter() - began}
    with run.pair.loading(version, mode):
        trainer = run.canary.trainer_scores(run.pair)
    run.pair.version = version
    loaded = time.perf_counter()
    result = run.canary.measure(run.pair, trainer)
    verdict = _sync_verdict(run, result, version)
    run.recorder.verdict(AfterSync(version), verdict)
    _refuse_sync(verdict, version)
    run.unproven = 0 if verdict.status == "PASS" else run.unproven + 1
    if verdict.status == "PASS":
        run.deliveries.settle(version, CANARY)
    elif version - run.deliveries.proven > run.recipe.parity.prove_within:
        prove_transport(run, version, AfterSync(version))
    return {
        "canary_gap_abs_max_nats": result.gap_abs_max_nats,
        "canary_shift_abs_mean_nats": result.shift_abs_mean_nats,
        "unproven_syncs": float(version - run.deliveries.proven),
        "sync_s": loaded - began,
        "canary_s": time.perf_counter() - loaded,
    }


def record(run: Run, step: int, figures: dict[str, float], spent_s: float) -> None:
    """A step's line in ``metrics.jsonl``, and one for people."""
    figures |= {
        "step_s": spent_s,
        "tokens_per_s": figures["n_tokens"] / spent_s,
        "samples_per_s": figures["n_samples"] / spent_s,
    }
    run.recorder.step(step, step + 1, figures)
    run.say(_line(run, step, figures))
    alarm = run.watch.look(step, figures)
    if alarm is not None:
        run.recorder.alarm(alarm)
        run.say(f"ALARM {alarm}")


def checkpoint(run: Run, version: int, also: Callable[[Path], None] = lambda partial: None) -> None:
    """Save the weights of ``version``, once their way into the engine is proven.

    Args:
        also: writes what else belongs to it.

    Raises:
        WeightSyncError: when it is refuted.
    """
    prove_transport(run, version, BeforeCheckpoint(version))
    run.pair.trainer.save(run.layout.checkpoints, version, run.session.model_path, also)


def prove_transport(run: Run, version: int, when: When) -> None:
    """Where updates were too small for the canary, layer 3's perturbation proves their way into the engine.

    Raises:
        WeightSyncError: when it is refuted.
    """
    if run.unproven and run.override is None:
        verdict = _perturbed(run)
        run.recorder.verdict(when, verdict)
        _refuse_sync(verdict, version)
        if verdict.status == "PASS":
            run.unproven = 0
            run.deliveries.settle(version, "layer 3")


def _refuse_sync(verdict: Verdict, version: int) -> None:
    if verdict.status == "FAIL":
        first = verdict.findings[0]
        raise WeightSyncError(
            f"weight sync {version}, cause {first.cause.replace('_', ' ')}",
            got=first.evidence,
            expected="the engine to serve the weights that it was sent",
            hint=first.fix,
        )


def _perturbed(run: Run) -> Verdict:
    """Layer 3 on fresh tokens, against the gap that the ladder measured."""
    with run.quiet():
        return _perturbed_alone(run)


def _perturbed_alone(run: Run) -> Verdict:
    assert run.canary is not None
    drawn = draw(
        run.pair,
        probe_prompts(run.pair, PROOF_PROMPTS, run.pair.seed),
        SamplingParams(max_tokens=8),
        run.pair.seed,
    )
    proof = Canary.of(drawn, PROOF_TOKENS)
    proof.clean_gap_nats = run.canary.clean_gap_nats
    return layer3_weights.judge(run.pair, proof, drawn)


def _sync_verdict(run: Run, result: CanaryResult, version: int) -> Verdict:
    agreement = (
        f"mean |gap| {result.gap_abs_mean_nats:.1e} nats over {result.n_tokens} tokens, "
        f"limit {result.limit_nats:.1e}"
    )
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
            reason=f"the update moved the canary by {result.shift_abs_mean_nats:.1e} nats, "
            "less than the limit: had it been lost, this would not have shown",
        )
    # One stale tensor moves little in one step; layer 3 moves every tensor far enough to name it.
    run.say(f"canary: {agreement}; looking for the cause")
    named = _perturbed(run)
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


def _line(run: Run, step: int, figures: dict[str, float]) -> str:
    canary = figures.get("canary_gap_abs_max_nats")
    proven = (
        f"canary {canary:.0e}  weights {run.deliveries.told(step + 1)}"
        if canary is not None
        else str(run.override)
    )
    return (
        f"step {step + 1:>3}/{run.recipe.training.steps}  reward {figures['reward_mean']:.3f}  "
        f"entropy {figures['entropy_mean_nats']:.2f}  "
        f"|gap| max {figures['gap_abs_max_nats']:.0e}  {proven}  {figures['step_s']:.1f} s"
    )
