"""What of the pair is proven, and when.

    prove             before the first step    the ladder: certificate, gate, canary
    prove_sync        after each sync          the canary: is this version served?
    prove_rollouts    before each step         where the canary could not see: what the version drew
    prove_transport   every few syncs, before  where the canary could not: layer 3's perturbation of every
                      a checkpoint             tensor, on fresh tokens

Each writes its verdict, and what refutes stops the run.
"""

import numpy as np

from lockstep.errors import WeightSyncError
from lockstep.loop.delivery import CANARY
from lockstep.loop.run import Run
from lockstep.loop.unproven import go_on, stamp
from lockstep.parity.alarms import Watch
from lockstep.parity.canary import Canary, CanaryResult, TrainerSide
from lockstep.parity.causes import finding
from lockstep.parity.certificate import issue
from lockstep.parity.gate import Gate
from lockstep.parity.ladder import PROOF_TOKENS, LadderResult, climb
from lockstep.parity.layers import weights as layer3_weights
from lockstep.parity.pair import draw
from lockstep.parity.probes import probe_prompts
from lockstep.records.samples import Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import AfterSync, OfRollouts, Verdict, When
from lockstep.rollout import store
from lockstep.training.step import AtSampling

PROOF_PROMPTS = 8


def prove(run: Run, when: When) -> LadderResult:
    """Run the ladder and write its verdicts; on PASS issue the certificate and set the gate.

    Raises:
        ParityError: when a layer fails: training on this pair would be training on another policy's samples.
    """
    result = climb(run.pair, lambda layer: run.say(f"ladder: {layer}"))
    stamp(run, result)
    for verdict in result.verdicts:
        run.recorder.verdict(when, verdict)
        run.say(f"  {verdict.layer:<10} {verdict.status:<8} {verdict.summary}")
    if not result.passed:
        go_on(run, result)
        return result
    issue(run.pair, result.verdicts, run.layout.certificate, key=run.sign_key)
    run.canary = result.canary
    run.unproven = 0
    run.deliveries.settle(run.pair.version, "the ladder")
    figures = next(v.figures for v in result.verdicts if v.layer == "numerics")
    run.gate = Gate.of(run.pair, figures)
    run.watch = Watch(
        gap_p50=figures["gap_abs_p50_nats"],
        ess=figures["mismatch_ess"],
        unfelt=run.gate.unfelt,
        max_lag=run.max_lag,
        first=run.first_figures(),
    )
    return result


def prove_sync(run: Run, version: int, trainer: TrainerSide) -> CanaryResult:
    """Hold what the engine serves now to the canary; what it cannot see for too long, layer 3 proves.

    Args:
        trainer: what it says of the canary under ``version``.

    Raises:
        WeightSyncError: where other weights are served than those that were sent; the cause is named.
    """
    assert run.canary is not None
    result = run.canary.measure(run.pair, trainer)
    verdict = _sync_verdict(run, result, version)
    run.recorder.verdict(AfterSync(version), verdict)
    _refuse_version(verdict, version)
    run.unproven = 0 if verdict.status == "PASS" else run.unproven + 1
    if verdict.status == "PASS":
        run.deliveries.settle(version, CANARY)
    # Rollouts may have proven the update as a whole since; a tensor that stays behind is lost in their noise,
    # and the perturbation alone tells, however small the update was.
    elif version - run.deliveries.each > run.recipe.parity.prove_within:
        prove_transport(run, version, AfterSync(version))
    return result


def prove_rollouts(run: Run, version: int, rollouts: Samples, tokens: AtSampling) -> dict[str, float]:
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
        store.refuse(run.layout, version)  # version k draws step k
    _refuse_version(verdict, version)
    return spent | verdict.figures


def prove_transport(run: Run, version: int, when: When) -> None:
    """Where updates were too small for the canary, layer 3's perturbation proves their way into the engine.

    Raises:
        WeightSyncError: when it is refuted.
    """
    if run.unproven and run.override is None:
        verdict = _perturbed(run)
        run.recorder.verdict(when, verdict)
        _refuse_version(verdict, version)
        if verdict.status == "PASS":
            run.unproven = 0
            run.deliveries.settle(version, "layer 3")


def _refuse_version(verdict: Verdict, version: int) -> None:
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
        # The canary keeps the mean of its tokens' gaps, and not each.
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
