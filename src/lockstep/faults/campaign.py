"""Plant every fault in a real engine and a real trainer, and climb each time.

What was named is compared with what was planted.

recipe ─► engine ─► fault, fault, fault …   those that need engine flags share one start per set of flags
             └────► clean, clean …          nothing planted: every layer must pass
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from lockstep.config.recipe import Recipe, with_sets
from lockstep.deep import in_flight
from lockstep.engines.registry import Choice, choose
from lockstep.errors import LockstepError
from lockstep.faults.at_load import AtLoad, plants
from lockstep.faults.fault import Fault
from lockstep.loop.open import Say, open_session
from lockstep.parity.ladder import climb
from lockstep.parity.pair import Pair
from lockstep.records.verdicts import Verdict


def clean_configurations(generation: str) -> list[tuple[str, tuple[str, ...]]]:
    """Name and overrides of configurations on which the ladder must stay silent.

    Dtypes, temperatures, seeds of the probes.

    V0's bf16 is left out: 0.8.5's norms round between their steps, and the gap that makes (0.12 nats in the
    median on a CPU) is a true finding.
    """
    return [
        (
            f"clean, {dtype}, T={t:g}, seed {seed}",
            (
                f"engine.dtype={dtype}",
                f"model.dtype={dtype}",
                f"sampling.temperature={t}",
                f"parity.seed={seed}",
            ),
        )
        for dtype in (("float32",) if generation == "V0" else ("float32", "bfloat16"))
        for t in (1.0, 0.7)
        for seed in range(4 if generation == "V0" else 2)
    ]


class Job(NamedTuple):
    """One climb to be made."""

    name: str
    sets: tuple[str, ...]
    """Recipe overrides."""
    fault: Fault | None
    """None where nothing is planted."""

    @property
    def start(self) -> tuple[str, ...]:
        """The overrides that need an engine or a model of their own; a running pair takes the others over."""
        return tuple(key for key in self.sets if key.startswith(("engine.", "model.")))


class Outcome(Struct, frozen=True, kw_only=True):
    """What one climb of the ladder came to."""

    name: str
    planted_layer: str
    """Empty where nothing was planted."""
    planted_cause: str
    found_layer: str
    """The layer that failed; empty where none did."""
    found_cause: str
    effect_nats: float
    statuses: tuple[str, ...]
    seconds: float
    evidence: str
    must_say: str = ""
    """What the evidence must say."""
    not_run: str = ""
    """Why it could not be planted here; such an outcome is neither hit nor miss."""

    @property
    def hit(self) -> bool:
        """True when the planted layer and cause were named and the layers above passed.

        For a clean climb, when all passed.
        """
        if not self.planted_layer:
            return set(self.statuses) == {"PASS"}
        above = self.statuses[: self.statuses.index("FAIL")] if "FAIL" in self.statuses else ("NOT_RUN",)
        same = (self.found_layer, self.found_cause) == (self.planted_layer, self.planted_cause)
        return same and set(above) <= {"PASS"} and self.must_say in self.evidence


def run_campaign(
    recipe: Recipe,
    faults: Sequence[Fault],
    log: Path,
    say: Say,
    *,
    clean: bool,
    on_outcome: Callable[[Outcome], None],
    done: Sequence[Outcome] = (),
) -> list[Outcome]:
    """Climb once for each fault, and once for each clean configuration if ``clean``.

    Each outcome is told as it comes.

    Args:
        done: what an earlier campaign came to (``journal.py``); returned with the rest and not climbed again.

    Raises:
        EngineError: when an engine does not start without a fault's own flags.
    """
    outcomes = list(done)
    generation = generation_of(choose(recipe.engine))
    for fault in faults:
        if generation not in fault.generations:
            outcomes.append(
                _outcome(fault.name, fault, [], 0.0, f"cannot be planted in a {generation} engine")
            )
            on_outcome(outcomes[-1])
    planned = [Job(fault.name, fault.sets, fault) for fault in faults if generation in fault.generations]
    planned += [Job(name, sets, None) for name, sets in (clean_configurations(generation) if clean else ())]
    known = {outcome.name for outcome in done}
    starts: dict[tuple[str, ...], list[Job]] = {}
    for job in planned:
        if job.name not in known:
            starts.setdefault(job.start, []).append(job)
    for own, jobs in starts.items():
        left = list(jobs)
        try:
            with open_session(with_sets(recipe, own), log, say, plants()) as session:
                while left:
                    job = left[0]
                    session.pair.recipe = with_sets(recipe, job.sets)
                    outcomes.append(_climb(session.pair, job.name, job.fault))
                    on_outcome(outcomes[-1])
                    del left[0]  # once it is told: what an error interrupts is among those that are left
        except LockstepError as error:
            # Under a fault's own flags an engine may not start, which says nothing of other faults; without
            # any it is the campaign that cannot be run.
            if not own:
                raise
            for job in left:
                outcomes.append(_outcome(job.name, job.fault, [], 0.0, f"{error.boundary}: {error.got}"))
                on_outcome(outcomes[-1])
    return outcomes


def generation_of(choice: Choice) -> str:
    """V0 or V1 of an engine with an environment, ``generate`` of transformers."""
    return choice.environment.generation if choice.environment is not None else "generate"


def _climb(pair: Pair, name: str, fault: Fault | None) -> Outcome:
    if (
        fault is not None
        and "stale_head" in fault.worker
        and pair.engine.ready.resolved.get("worker.head_packed") is False
    ):
        return _outcome(
            name, fault, [], 0.0, "this engine keeps no packed copy of its head here, so none goes stale"
        )
    began = time.perf_counter()
    with planted(pair, fault) if fault is not None else ExitStack():
        verdicts = climbed(pair, fault)
    return _outcome(name, fault, verdicts, time.perf_counter() - began)


def climbed(pair: Pair, fault: Fault | None) -> list[Verdict]:
    """The ladder's verdicts, with what the fault needs to show."""
    if fault is None or not fault.in_flight:
        return climb(pair).verdicts
    return climb(pair, deeper={"weights": lambda verdict: in_flight.deepen(pair, verdict)}).verdicts


def _outcome(
    name: str, fault: Fault | None, verdicts: list[Verdict], seconds: float, not_run: str = ""
) -> Outcome:
    failed = next((v for v in verdicts if v.status == "FAIL"), None)
    finding = failed.findings[0] if failed is not None else None
    return Outcome(
        name=name,
        planted_layer=fault.layer if fault else "",
        planted_cause=fault.cause if fault else "",
        found_layer=failed.layer if failed is not None else "",
        found_cause=finding.cause if finding else "",
        effect_nats=finding.effect_nats if finding else 0.0,
        statuses=tuple(v.status for v in verdicts),
        seconds=seconds,
        evidence=finding.evidence if finding else next((v.reason for v in verdicts if v.reason), ""),
        must_say=fault.must_say if fault else "",
        not_run=not_run,
    )


@contextmanager
def planted(pair: Pair, fault: Fault) -> Iterator[None]:
    """The pair with the fault in it.

    Afterwards everything is as it was, and the engine holds the trainer's weights.
    """
    engine = pair.engine
    try:
        with ExitStack() as stack:
            if fault.trainer is not None:
                stack.enter_context(fault.trainer(pair))
            if fault.proxy is not None:
                pair.engine = fault.proxy(pair)
            if fault.at_start:
                pair.sync(pair.version)
            if fault.lifted:
                pair.engine = engine
            if fault.worker:
                pair.engine = AtLoad(pair.engine, fault.worker)
            yield
    finally:
        pair.engine = engine
        pair.sync(pair.version)
