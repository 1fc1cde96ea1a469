"""What differs between two engines of an upgrade, each with its effect, its cause and its flag."""

from collections.abc import Iterator, Sequence
from math import isfinite, nan

from msgspec import Struct

from lockstep.diagnose.sides import IN_FLIGHT, FirstRun, Left, Side, cannot
from lockstep.parity.tolerances import MODE_Z, Z_OF_95
from lockstep.records.verdicts import Verdict

TOPICS = ("semantics", "path", "weight updates", "numerics", "speed", "configuration")
AT_UPDATES = {
    "pause_wait": "a load can wait for requests in flight",
    "pause_keep": "a load can hold requests in flight and go on with them",
    "version_spans": "the engine's worker tells which weights drew which tokens",
}
"""Capabilities that say what a weight update may do."""


class Difference(Struct, frozen=True, kw_only=True):
    """One thing that is otherwise in the new engine, or that its defaults leave open."""

    topic: str
    what: str
    before: str
    after: str
    effect_nats: float = nan
    """``unit`` says of what. NaN where it moves no number, or was not measured."""
    ci95: tuple[float, float] = (nan, nan)
    unit: str = ""
    cause: str = ""
    flag: str = ""
    note: str = ""


def differences(old: Side, seen: FirstRun, head: Side | str) -> list[Difference]:
    """Everything: topics in the ladder's order, within one the largest effect first.

    Args:
        head: the new engine with its head in bf16, or why it was not measured.
    """
    new = seen.side
    found = [
        *_modes(old, new),
        *_prompts(old, new, seen.untempered),
        *_named(seen.verdicts),
        *_path(old, new),
        *_updates(old, new, seen.left),
        *_numerics(old, new, head),
        *_speed(old, new),
        *_configuration(old, new),
    ]
    # What has no number comes after what has one.
    size = {id(one): -abs(one.effect_nats) if isfinite(one.effect_nats) else 1.0 for one in found}
    return sorted(found, key=lambda one: (TOPICS.index(one.topic), size[id(one)]))


def _modes(old: Side, new: Side) -> Iterator[Difference]:
    """Which distribution sampled tokens' numbers are of, seen where it shows."""
    before, after = (_resolved(side, "log-probability mode") for side in (old, new))
    if before == after and abs(new.gap_mean_nats) <= MODE_Z * new.gap_mean_error_nats:
        return
    low, high = (new.gap_mean_nats + sign * Z_OF_95 * new.gap_mean_error_nats for sign in (-1, 1))
    yield Difference(
        topic="semantics",
        what=f"log-probabilities of sampled tokens, at T = {new.temperature:g}",
        before=f"{'processed, no other mode' if before == 'None' else before}: {old.gap_mean_nats:+.1e}",
        after=f"{after}: {new.gap_mean_nats:+.4f}",
        effect_nats=new.gap_mean_nats,
        ci95=(low, high),
        unit="mean of trainer − engine",
        cause="raw_logprobs" if "raw" in after else "",
        flag='engine.options.logprobs_mode = "processed_logprobs"',
        note="at T = 1 raw and processed are the same, and nothing shows",
    )


def _prompts(old: Side, new: Side, untempered: float) -> Iterator[Difference]:
    """Whether prompt log-probabilities are tempered."""
    tempered = [side for side in (old, new) if side.can["rescore_at_temperature"]]
    if len(tempered) == 1:
        agrees = f"{tempered[0].prompt_temperature_nats:.1e}"
        yield Difference(
            topic="semantics",
            what="prompt log-probabilities",
            before=_prompts_of(old),
            after=_prompts_of(new),
            effect_nats=untempered,
            unit=f"mean |difference| of the two at T = {new.temperature:g}",
            flag="re-score at T = 1, or in the trainer",
            note=f"{tempered[0].engine} asked at T agrees with the trainer at T to {agrees} nats",
        )


def _prompts_of(side: Side) -> str:
    can = side.can["rescore_at_temperature"]
    return "tempered by the request's T" if can else "of the model, T = 1 whatever is asked"


def _named(verdicts: Sequence[Verdict]) -> Iterator[Difference]:
    """What the ladder named on the new engine as it comes, but for the mode, which has a row of its own."""
    for verdict in verdicts:
        for one in verdict.findings:
            if one.cause == "raw_logprobs":
                continue
            yield Difference(
                topic={"weights": "weight updates", "objective": "numerics"}.get(
                    verdict.layer, verdict.layer
                ),
                what=one.cause.replace("_", " "),
                before="",
                after=one.evidence,
                effect_nats=one.effect_nats,
                ci95=one.ci95,
                unit="mean |gap|",
                cause=one.cause,
                flag=one.fix,
            )


def _path(old: Side, new: Side) -> Iterator[Difference]:
    yield Difference(
        topic="path",
        what="decode against the engine's own prefill at T = 1",
        before=f"{old.decode_to_prefill_nats:.1e}",
        after=f"{new.decode_to_prefill_nats:.1e}",
        effect_nats=new.decode_to_prefill_nats,
        unit="largest |A − B|",
    )


def _updates(old: Side, new: Side, left: Sequence[Left]) -> Iterator[Difference]:
    for one in left:
        yield Difference(
            topic="weight updates",
            what=one.what,
            before=_of_old(old, one.fault),
            after=one.reason or one.how,
            effect_nats=one.effect_nats,
            ci95=one.ci95,
            unit="mean |engine − trainer| after an update" if isfinite(one.effect_nats) else "",
            cause=one.fault,
            flag=one.fix or "Lockstep's worker: pause, load, re-pack the head, clear the cache, resume",
            note="not measured here" if one.reason else "",
        )
    for name, what in AT_UPDATES.items():
        if old.can.get(name) != new.can.get(name):
            before, after = (
                f"{'yes' if side.can.get(name) else 'no'}: {side.how.get(name, '')}" for side in (old, new)
            )
            yield Difference(topic="weight updates", what=what, before=before, after=after)


def _of_old(old: Side, fault: str) -> str:
    if fault == IN_FLIGHT:
        return old.how.get("pause_keep", "")
    return cannot(fault, old.generation, old.resolved) or "so as well"


def _numerics(old: Side, new: Side, head: Side | str) -> Iterator[Difference]:
    yield Difference(
        topic="numerics",
        what="|trainer − engine| at T = 1, in the recipe's dtype",
        before=_quantiles(old),
        after=_quantiles(new),
        effect_nats=new.gap_abs_nats["p50"],
        unit="median |gap|",
    )
    measured = not isinstance(head, str)
    yield Difference(
        topic="numerics",
        what="the head in bf16, as the engine's own dtype=auto takes a checkpoint in fp32",
        before=_resolved(old, "head precision"),
        after=head if isinstance(head, str) else _quantiles(head),
        effect_nats=nan if isinstance(head, str) else head.gap_abs_nats["p50"],
        unit="median |gap|" if measured else "",
        cause="head_precision",
        flag='engine.head_dtype = "float32" with model.head_dtype = "float32"',
        note="" if measured else "not measured",
    )


def _quantiles(side: Side) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in side.gap_abs_nats.items())


def _speed(old: Side, new: Side) -> Iterator[Difference]:
    note = "one timing each; other work on the machine moves it"
    speeds = [f"{side.tokens_per_s:.0f}" for side in (old, new)]
    loads = [f"{side.load_s:.2f} s" for side in (old, new)]
    what = "tokens a second on the probes"
    yield Difference(topic="speed", what=what, before=speeds[0], after=speeds[1], note=note)
    yield Difference(topic="speed", what="one weight update", before=loads[0], after=loads[1], note=note)


def _configuration(old: Side, new: Side) -> Iterator[Difference]:
    """Settings that move numbers or state and resolved otherwise, or that RL needs otherwise."""
    for row in new.rows:
        before = _resolved(old, row.knob)
        held = row.verdict in ("change", "watch")
        if row.resolved != before or held:
            yield Difference(
                topic="configuration",
                what=row.knob,
                before=before,
                after=row.resolved,
                flag=row.flag if held else "",
                note=row.why,
            )


def _resolved(side: Side, knob: str) -> str:
    return next((row.resolved for row in side.rows if row.knob == knob), "-")
