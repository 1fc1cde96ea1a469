"""The loop in flight: the engine never stops sampling, and the trainer never stops training.

    rollouts   submit ─► step k + 1's and k + 2's samples ───────────────────────────────► … (flights.py)
                 ▲              │ finished                   │ weights k + 1 enter in mid-sequence
    trainer      │  next_batch ─┴► score ─► replay ─► gate ─► train ─► sync ─► confirm(k + 1)
                 └───────────────────────────────────────────────────────────────────────────┘

    who waits               for what                               what unblocks it
    the trainer             enough groups that are due             a group that ends, or loop.deadline_s
    a group, to be drawn    fewer than (v + max_lag + 1) steps'     confirm(v): version v is proven served
    an update (``wait``)    what is being drawn                    its end

The engine says which version drew which token; the bound on their age is a theorem, and asserted
(docs/concepts/in-flight.md). Each stage is ``stages.py``'s. An engine that dies is started again, proven
again, and given its requests again. Ctrl-C lets what is drawn end for :data:`DRAIN_S`, saves, and ends; a
second one ends at once.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import msgspec
import numpy as np

from lockstep.errors import CapabilityError, EngineDied, RunError, Stopped
from lockstep.loop.drawn import drawing_of
from lockstep.loop.evaluate import evaluate
from lockstep.loop.figures import lag_0_figures
from lockstep.loop.flights import QUEUE, SCHEDULE, Flights
from lockstep.loop.proofs import prove
from lockstep.loop.replays import replay
from lockstep.loop.resume import catch_up
from lockstep.loop.run import Now, Run, certified
from lockstep.loop.shown import show
from lockstep.loop.stages import checkpoint, leave_out, record, reward, sync, train_gated
from lockstep.records.capabilities import CAPABILITIES
from lockstep.records.samples import Samples
from lockstep.records.verdicts import BeforeStep
from lockstep.rollout import store
from lockstep.rollout.ledger import State
from lockstep.runs.checkpoints import newest_checked
from lockstep.runs.durable import make_directory
from lockstep.runs.manifest import finished
from lockstep.runs.strict import append, drop_partial_line, plain, read_lines
from lockstep.weights.sync import threads

T = TypeVar("T")
DRAIN_S = 5.0
SCHEMA_LEDGER = "lockstep.ledger/1"


def run_steps(run: Run, *, resumed: bool) -> None:
    """Prove, then train to the recipe's last step.

    Raises:
        ParityError, WeightSyncError: when a proof fails.
        ScheduleError: for a token past the staleness bound, or a ledger that does not close.
        RewardError, DivergenceError, EngineError: as they say; everything trained so far is on disk.
    """
    _refuse_update(run)
    _keep_versions(run)
    with certified(run), threads(lambda every: _threads_left(run, every)):
        flights = _gone_on(run) if resumed else Flights(run)
        first = flights.schedule.state.step
        run.quiet = flights.quiet
        prove(run, BeforeStep(first))
        flights.confirm(first)
        flights.start()
        try:
            with run.live(lambda: now(run, flights)) if run.live else nullcontext():
                while not flights.schedule.done:
                    _step(run, flights)
            if first == run.recipe.training.steps and not finished(run.layout, run.recipe):
                checkpoint(
                    run, first, flights.write
                )  # the kill came between the last step and its checkpoint
        except Stopped:
            _end_in_order(run, flights)
            raise
        finally:
            flights.stop()
            run.say(told(flights.schedule.state))


def _threads_left(run: Run, every: int) -> int:
    """The trainer's threads: OpenMP threads that outnumber the cores wait by spinning."""
    return max(1, every - run.recipe.engine_cores) if run.pair.shares_cores else every


def _refuse_update(run: Run) -> None:
    engine = run.pair.engine
    update = _update(run)
    engine.need("load")
    can = engine.ready.capabilities
    needs = {"wait": "pause_wait", "abort": "pause_abort"}.get(update, "pause_keep")
    if not can[needs].supported:
        ways = (("pause_abort", "rollout.update=abort"), ("pause_wait", "rollout.update=wait"))
        other = next((way for name, way in ways if can[name].supported), "loop.kind=sync")
        raise CapabilityError(
            f"engine {engine.ready.engine} {engine.ready.version}, rollout.update = {update!r}",
            got=can[needs].how,
            expected=CAPABILITIES[needs],
            hint=f"--set {other}",
        )


def _step(run: Run, flights: Flights) -> None:
    began = time.perf_counter()
    step = flights.schedule.state.step
    rollouts = _alive(run, flights, flights.next_batch)
    store.save(run.layout.drawn(step), rollouts)
    flights.refuse_stale(rollouts)
    leave_out(run, step, rollouts)
    figures = train(run, step, rollouts)
    show(run, step, rollouts)
    flights.trained(rollouts)
    figures |= _alive(run, flights, lambda: _sync(run, flights, step + 1), lambda: _proven_again(run))
    flights.confirm(step + 1)
    figures |= flights.figures() | _alive(run, flights, lambda: evaluate(run, step + 1))
    record(run, step, figures, time.perf_counter() - began)
    _keep_ledger(run, flights.schedule.state)
    flights.settled = step + 1
    training = run.recipe.training
    if (step + 1) % training.checkpoint_every == 0 or step + 1 == training.steps:
        _alive(run, flights, lambda: checkpoint(run, step + 1, flights.write))


def train(run: Run, step: int, rollouts: Samples, *, replayed: bool = False) -> dict[str, float]:
    """Reward; score each token under the version that drew it, replay what spans an update, gate, train.

    Returns figures by catalog name.
    """
    trainer = run.pair.trainer
    began = time.perf_counter()
    before = trainer.versions.before(rollouts, step, drawing_of(run))
    figures = {"earlier_s": time.perf_counter() - began, "replay_s": 0.0}

    def judge() -> None:
        if not replayed:
            figures.update(replay(run, step, rollouts, before))
        trainer.versions.remember(step)  # only now: the oldest version goes

    if not replayed:
        rollouts.fill(
            sampling_logprobs=before.scored
        )  # stored with the rewards: a resume need not have the weights
        reward(run, step, rollouts)
    versions = rollouts.versions
    trained = train_gated(run, step, rollouts, before, judge, replayed=replayed)
    return (
        trained
        | figures  # filled in the midst of the step
        | lag_0_figures(rollouts, step)
        | {
            "wait_s": rollouts.sample_s,
            "lag_max_steps": float(step - versions.min()),
            "earlier_fraction": float((versions < step).mean()),
            "spanning_fraction": float(np.mean([len(sample.version_spans) > 1 for sample in rollouts])),
            "audited_fraction": float(before.audited.mean()),
        }
    )


def _sync(run: Run, flights: Flights, version: int) -> dict[str, float]:
    update = _update(run)
    if update == "abort":
        with flights.cut_off():
            return sync(run, version)
    return sync(run, version, update)


def _update(run: Run) -> Any:
    """With a lag of 0 nothing is drawn while weights are loaded, and no cache need survive."""
    return run.recipe.rollout.update if run.recipe.rollout.max_lag else "wait"


# ── engines that die ────────────────────────────────────────────────────────────────────────────────────────


def _alive(run: Run, flights: Flights, do: Callable[[], T], after: Callable[[], T] | None = None) -> T:
    """What ``do`` gives; where the engine dies meanwhile, another takes its place first.

    Args:
        after: in place of ``do`` once more.
    """
    while True:
        try:
            return do()
        except EngineDied as death:
            dead = death
            while dead is not None:
                dead = _revived(run, flights, dead)
            do = after or do


def _revived(run: Run, flights: Flights, death: EngineDied) -> EngineDied | None:
    """None; or the death of the engine that was started in place of the one that died.

    Raises:
        EngineDied: when ``engine.restarts`` are used up.
    """
    most = run.recipe.engine.restarts
    if run.restarts >= most:
        raise death
    run.restarts += 1
    state = flights.schedule.state
    lost = len(state.in_flight) + len(state.reissue)
    many = f"restart {run.restarts} of at most {most}, {lost} groups are issued again"
    run.say(f"the engine died ({death.got}); {many}")
    flights.stop()
    try:
        run.session.restart_engine()
        run.pair.version = state.step
        run.pair.sync(state.step)
        prove(run, BeforeStep(state.step))
    except EngineDied as another:
        return another
    flights.start()
    return None


def _proven_again(run: Run) -> dict[str, float]:
    """The figures of a sync that a restart and its ladder took the place of."""
    if run.canary is None:
        return {"unproven_syncs": float(run.unproven)}
    with run.pair.as_beside_a_load():
        side = run.canary.trainer_side(run.pair)
    result = run.canary.measure(run.pair, side)
    return {"canary_gap_abs_max_nats": result.gap_abs_max_nats, "unproven_syncs": 0.0}


# ── going on, and ending ────────────────────────────────────────────────────────────────────────────────────


def _keep_versions(run: Run) -> None:
    directory = None
    if run.recipe.rollout.ring == "disk":
        directory = run.layout.root / "versions"
        make_directory(directory)
        for left in directory.glob("*.safetensors"):
            left.unlink()
    run.pair.trainer.keep_versions(run.recipe.rollout.max_lag, directory)


def _gone_on(run: Run) -> Flights:
    """The trained frontier, the finished queue and what is to be issued again; the engine has the weights."""
    newest = newest_checked(run.layout.checkpoints, lambda told: run.say(f"resume: checkpoint {told}"))
    state, queue = (None, None) if newest is None else _read(run, newest.path)
    flights = Flights(run, state, queue)

    def again(step: int, rollouts: Samples) -> dict[str, float]:
        flights.refuse_stale(rollouts)
        figures = train(run, step, rollouts, replayed=True)
        flights.replayed(rollouts)
        if step not in kept:
            _keep_ledger(run, flights.schedule.state)
        return figures

    drop_partial_line(run.layout.ledger)
    kept = {row["step"] for row in read_lines(run.layout.ledger)}
    first = catch_up(run, again)
    run.layout.drawn(first).unlink(missing_ok=True)  # its groups are in the queue, or issued again
    run.pair.version = first
    run.pair.sync(first)
    flights.settled = first
    flights.schedule.close()
    return flights


def _read(run: Run, newest: Any) -> tuple[State, Samples | None]:
    try:
        state = msgspec.json.decode((newest / SCHEDULE).read_bytes(), type=State)
    except (OSError, msgspec.MsgspecError) as error:
        raise RunError(
            f"checkpoint {newest}, {SCHEDULE}",
            got=str(error),
            expected="the schedule of a run in flight",
            hint="loop.kind is the run's own; start a new run to change it",
        ) from error
    kept = newest / QUEUE
    size = run.recipe.training.group_size
    return state, store.load(kept, size, run.recipe.sampling) if kept.is_file() else None


def _end_in_order(run: Run, flights: Flights) -> None:
    """Save the last step with all that has been drawn since, where it is proven and on record.

    Else the checkpoint before it is gone on from, and the step is trained again from its stored samples; so
    is one whose samples the gate is about to admit, for the oldest weights are gone then, or has admitted,
    for its weights may be between two versions.
    """
    state = flights.schedule.state
    run.say(f"ending: what is being drawn has {DRAIN_S:g} s to end")
    flights.stop(DRAIN_S)
    judged = state.step in run.pair.trainer.versions.ring or run.layout.rollouts(state.step).is_file()
    if (state.training and judged) or flights.settled != state.step or not state.step or run.unproven:
        return
    checkpoint(run, state.step, flights.write)
    finished = len(state.finished) + len(state.training)
    run.say(f"saved at step {state.step}: {finished} groups finished, {len(state.reissue)} to reissue")


def _keep_ledger(run: Run, state: State) -> None:
    open_groups = len(state.in_flight) + len(state.reissue) + len(state.finished)
    row = {"schema": SCHEMA_LEDGER, "step": state.step - 1, "open_groups": open_groups}
    append(run.layout.ledger, row | plain(state.ledger))


def now(run: Run, flights: Flights) -> Now:
    """What the run is doing, and what its last step was like, for people."""
    state = flights.schedule.state
    ledger = state.ledger
    last = run.latest
    found = {
        "now": flights.schedule.waits_for() or f"step {state.step + 1} is about to be trained",
        "in flight, finished": f"{len(state.in_flight)}, {len(state.finished)} groups",
        "ledger": f"{ledger.issued} samples issued, {ledger.trained} trained, "
        f"{sum(ledger.dropped.values())} dropped, {ledger.reissued} issued again",
    }
    if not last:
        return found
    idle, waits = (last[name] / last["step_s"] for name in ("engine_idle_s", "wait_s"))
    return found | {
        "last step": f"reward {last['reward_mean']:.3f}, {last['tokens_per_s']:.0f} tokens/s, "
        f"{last['step_s']:.1f} s",
        "lag": f"{last['lag_steps']:.2f} versions, at most {last['lag_max_steps']:.0f} of {run.max_lag}",
        "idle": f"engine {idle:.0%}, trainer {waits:.0%} of the step",
    }


def told(state: State) -> str:
    """The ledger, for people."""
    ledger = state.ledger
    dropped, gone = sum(ledger.dropped.values()), sum(ledger.dropped_tokens.values())
    why = "".join(f", {n} {reason}" for reason, n in ledger.dropped.items())
    open_samples = ledger.issued - ledger.trained - dropped
    held = ledger.drawn_tokens - ledger.trained_tokens - gone
    text = (
        f"ledger: {ledger.issued} samples = {ledger.trained} trained + {dropped} dropped"
        f" + {open_samples} open; {ledger.drawn_tokens} tokens drawn = {ledger.trained_tokens} trained"
        f" + {gone} dropped + {held} held"
        f"; {ledger.reissued} samples issued again{why}"
    )
    if dropped:
        text += f"\nlengths, by the power of two above: trained {_bars(ledger.kept_lengths)}; "
        text += f"dropped {_bars(ledger.dropped_lengths)}"
    return text


def _bars(histogram: dict[int, int]) -> str:
    total = sum(histogram.values())
    return " ".join(f"≤{length}: {n / total:.0%}" for length, n in sorted(histogram.items()))
