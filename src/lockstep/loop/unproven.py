"""A run whose ladder did not pass ends, or the recipe says in a sentence why it goes on."""

from collections.abc import Sequence

from lockstep.errors import ParityError
from lockstep.loop.run import Run
from lockstep.parity.alarms import Watch
from lockstep.parity.ladder import LadderResult
from lockstep.records.alarms import Override
from lockstep.records.verdicts import Verdict
from lockstep.runs.certificate import void
from lockstep.runs.manifest import read_manifest, stamp_override


def stamp(run: Run, result: LadderResult) -> None:
    """Have all that is recorded from here on say that nothing is proven, where the recipe's override is used.

    In manifest and checkpoints it stays, whatever a later start proves.

    Raises:
        RunError: when the manifest cannot be written.
    """
    sentence = run.recipe.parity.override
    if not sentence:
        return
    if result.passed:
        run.ever_overridden = read_manifest(run.layout.manifest).override
        return
    run.override = run.recorder.override = overriding(sentence, result.verdicts)
    run.ever_overridden = run.override
    stamp_override(run.layout.manifest, run.override)


def overriding(sentence: str, verdicts: Sequence[Verdict]) -> Override:
    """What stands in for a ladder that did not pass, by its verdicts."""
    verdict = next(v for v in verdicts if v.status != "PASS")
    cause = verdict.findings[0].cause.replace("_", " ") if verdict.findings else verdict.reason
    return Override(reason=sentence, layer=verdict.layer, cause=cause)


def go_on(run: Run, result: LadderResult) -> None:
    """Go on without a proof where the recipe says why.

    Raises:
        ParityError: where it does not.
    """
    error = refusal(result)
    if run.override is None:
        if run.recipe.objective.correction != "none":
            error.add_note(
                f"objective.correction = {run.recipe.objective.correction!r} is locked until the ladder "
                "passes: mend the backend, do not correct for it"
            )
        raise error
    void(run.layout.certificate, f"{error.boundary}: {error.got}")
    run.watch = Watch(max_lag=run.max_lag, known_layer=run.override.layer, first=run.first_figures())
    run.canary, run.gate = None, None
    run.say(str(run.override))


def refusal(result: LadderResult) -> ParityError:
    """The error that a ladder without a PASS ends in."""
    verdict = next(v for v in result.verdicts if v.status != "PASS")
    if verdict.status == "NOT_RUN":
        return ParityError(f"layer {verdict.layer}", got="NOT_RUN", expected="PASS", hint=verdict.reason)
    first = verdict.findings[0]
    return ParityError(
        f"layer {verdict.layer}, cause {first.cause.replace('_', ' ')}",
        got=(
            f"{verdict.summary}; effect {first.effect_nats:.3g} nats per token "
            f"(95 % {first.ci95[0]:.3g} to {first.ci95[1]:.3g})"
        ),
        expected="PASS before the first step",
        hint=first.fix,
    )
