"""The loop in flight, whole runs on the tiny model and the transformers engine."""

import dataclasses
import hashlib
import json
import threading

import numpy as np
import pytest
from transformers import LogitsProcessorList

from lockstep import api
from lockstep.config.recipe import with_sets
from lockstep.errors import (
    CapabilityError,
    EngineDied,
    EngineError,
    RecipeError,
    WeightSyncError,
)
from lockstep.loop import in_flight, replays
from lockstep.loop.flights import Flights
from lockstep.records.capabilities import Capability
from lockstep.records.verdicts import BeforeStep, InFlight
from lockstep.records.versions import VersionSpan
from lockstep.rollout import store
from lockstep.runs.layout import RunLayout
from lockstep.runs.read import read_steps, read_verdicts
from lockstep.runs.record import Recorder

STEPS = 6
SETS = [
    f"training.steps={STEPS}",
    "training.prompts_per_step=2",
    "training.group_size=2",
    "training.minibatches=2",
    "training.checkpoint_every=2",
    "optimizer.lr=1e-3",
    "task.reward=tests.faults.test_loop_in_flight:varied",
    "parity.probe_prompts=4",
    "parity.probe_tokens=4",
    "parity.draw_tokens=128",
    "engine.max_model_len=128",
    "sampling.max_tokens=6",
]
IN_FLIGHT = ["loop.kind=in_flight", "rollout.update=wait"]


def varied(text, item):
    """A reward that moves the weights at every step."""
    return len(text) % 3 / 2


def run(recipe, out, *sets):
    api.train(with_sets(recipe, [*SETS, *sets]), out=out, say=print)
    return RunLayout(out)


def sha256(layout):
    (saved,) = layout.checkpoints.iterdir()
    files = ("model.safetensors", "trainer/optimizer.safetensors")
    return [hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in files]


def ledger(layout):
    return [json.loads(line) for line in layout.ledger.read_text().splitlines()]


@pytest.fixture(scope="module")
def synchronous(recipe, tmp_path_factory):
    return run(recipe, tmp_path_factory.mktemp("sync") / "run")


def test_with_no_lag_it_is_the_synchronous_loop_bit_for_bit(recipe, synchronous, tmp_path):
    found = run(recipe, tmp_path / "run", *IN_FLIGHT, "rollout.max_lag=0")
    assert sha256(found) == sha256(synchronous)
    names = ("loss", "grad_norm", "reward_mean", "gap_abs_max_nats", "policy_ratio_mean", "lag_steps")
    for ours, theirs in zip(read_steps(found.metrics), read_steps(synchronous.metrics), strict=True):
        assert [ours.metrics[name] for name in names] == [theirs.metrics[name] for name in names]
        assert ours.metrics["grad_norm"] > 0, "every step moves the weights, or a lost one would not show"


@pytest.mark.parametrize(("update", "max_lag"), [("keep", 1), ("recompute", 2), ("abort", 1)])
def test_with_lag_each_token_is_scored_under_its_version_and_none_is_lost(
    recipe, tmp_path, monkeypatch, update, max_lag
):
    shown = []
    monkeypatch.setattr(Recorder, "completions", lambda self, some: shown.append(some.step))
    monkeypatch.setattr(replays, "POWER_SHARE", 0.0)  # of a slow machine's time one more is a small share
    sets = [*IN_FLIGHT, f"rollout.update={update}", f"rollout.max_lag={max_lag}", "rollout.ring=disk"]
    found = run(recipe, tmp_path / "run", *sets, "sampling.max_tokens=90", "recording.sinks=['csv']")
    steps = read_steps(found.metrics)
    assert 0 < steps.column("lag_max_steps").max() <= max_lag
    assert steps.column("gap_abs_max_nats").max() < 1e-4, "the mismatch is measured at the sampling version"
    of_step = [store.load(found.rollouts(step), 2, recipe.sampling) for step in range(STEPS)]
    stored = [np.abs(some.sampling_logprobs - some.engine_logprobs).max() for some in of_step]
    assert stored == pytest.approx(steps.column("gap_abs_max_nats"), rel=1e-6), (
        "what is on disk is what is said"
    )
    assert steps.column("policy_kl_k3_nats").max() > 1e-9, "what is left is the policy's own move"
    assert steps.column("spanning_fraction").max() > 0.0
    assert len(list((found.root / "versions").glob("*"))) == max_lag
    rows = ledger(found)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert rows[-1]["issued"] == rows[-1]["trained"] == STEPS * 4
    assert rows[-1]["open_groups"] == rows[-1]["reissued"] == 0
    assert rows[-1]["drawn_tokens"] == rows[-1]["trained_tokens"] == steps.column("n_tokens").sum()
    records = read_verdicts(found.verdicts)
    assert all(record.verdict.status == "PASS" for record in records)
    judged = [record.verdict for record in records if isinstance(record.when, InFlight)]
    assert judged[0].figures["told_apart"] == 1.0
    assert "told_apart" not in judged[1].figures, "the other cache is tried in a small share of the time"
    assert shown == list(range(STEPS)), "what is drawn in flight is shown to people too"


@pytest.mark.parametrize("update", ["keep", "recompute"])
def test_a_span_that_is_off_by_a_token_is_named_before_it_is_trained_on(
    recipe, tmp_path, monkeypatch, update
):
    whole = in_flight.leave_out
    moved = []

    def off_by_one(run, step, rollouts):
        whole(run, step, rollouts)
        for row, sample in enumerate(rollouts):
            if (
                len(sample.version_spans) == 2
                and sample.version_spans[1].stop > sample.version_spans[1].start + 1
            ):
                first, second = sample.version_spans
                edge = second.start + 1
                spans = (VersionSpan(0, edge, first.version), VersionSpan(edge, second.stop, second.version))
                rollouts.samples[row] = dataclasses.replace(sample, version_spans=spans)
                moved.append(step)

    monkeypatch.setattr(in_flight, "leave_out", off_by_one)
    sets = [*IN_FLIGHT, f"rollout.update={update}", "sampling.max_tokens=90", "optimizer.lr=1e-2"]
    with pytest.raises(WeightSyncError, match="span: it fits with version"):
        run(recipe, tmp_path / "run", *sets)
    layout = RunLayout(tmp_path / "run")
    assert len(read_steps(layout.metrics)) == moved[0]
    assert not layout.rollouts(moved[0]).exists()
    assert list((layout.root / "rollouts" / "refused").iterdir()), "kept, and not trained on"
    kept = store.load(next((layout.root / "rollouts" / "refused").glob("*.parquet")), 2, recipe.sampling)
    assert not np.isnan(kept.sampling_logprobs).any(), "with what the trainer says of each token"


def test_an_engine_that_was_refused_and_overridden_is_not_held_to_replays(recipe, tmp_path, monkeypatch):
    from lockstep.engines import transformers

    def raw_first(some=()):
        """The engine reports its logits before it divides them by the temperature."""
        return LogitsProcessorList(
            sorted(some, key=lambda one: not isinstance(one, transformers._TakeLogprobs))
        )

    monkeypatch.setattr(transformers, "LogitsProcessorList", raw_first)
    sets = [*IN_FLIGHT, "rollout.update=keep", "sampling.max_tokens=90", "sampling.temperature=0.7"]
    found = run(recipe, tmp_path / "run", *sets, "parity.override=what the figures do is looked at")
    steps = read_steps(found.metrics)
    assert steps.column("spanning_fraction").max() > 0.0, "such a sequence is no proof of anything here"
    assert steps.column("mismatch_kl_k3_nats").min() > 0.01, "the engine's numbers are raw"
    assert [row["step"] for row in ledger(found)] == list(range(STEPS))


def dies_once(monkeypatch, at):
    """The engine dies in the loop's request number ``at``, counted over all engines; not in a ladder's."""
    from lockstep.engines.transformers import TransformersEngine

    drawn = TransformersEngine._in_turn
    calls = []

    def dying(self, prompts, params):
        if threading.current_thread() is not threading.main_thread():
            calls.append(self)
        if len(calls) == at:
            calls.append(self)
            raise EngineDied("engine process", got="its end", expected="a running engine", hint="none")
        return drawn(self, prompts, params)

    monkeypatch.setattr(TransformersEngine, "_in_turn", dying)
    return calls


def test_an_engine_that_dies_is_started_again_proven_and_given_its_requests_again(
    recipe, synchronous, tmp_path, monkeypatch
):
    calls = dies_once(monkeypatch, at=5)
    found = run(recipe, tmp_path / "run", *IN_FLIGHT, "rollout.max_lag=0")
    assert len(set(map(id, calls))) == 2
    assert sha256(found) == sha256(synchronous)
    ladders = {str(r.when) for r in read_verdicts(found.verdicts) if isinstance(r.when, BeforeStep)}
    assert len(ladders) == 2, "before the first step, and after the restart"
    assert ledger(found)[-1]["reissued"] > 0
    assert ledger(found)[-1]["issued"] == ledger(found)[-1]["trained"] == STEPS * 4


def test_all_that_a_dead_engine_was_drawing_is_one_death(recipe, tmp_path, monkeypatch):
    """As of a process: each of its requests fails, and so does what is asked of it later."""
    from lockstep.engines.transformers import TransformersEngine

    drawn = TransformersEngine._in_turn
    dead = []

    def dying(self, prompts, params):
        in_loop = threading.current_thread() is not threading.main_thread()
        if not dead and in_loop and self.calls_in_loop == 3:
            dead.append(self)
        self.calls_in_loop += in_loop
        if self in dead:
            raise EngineDied("engine process", got="its end", expected="a running engine", hint="none")
        return drawn(self, prompts, params)

    monkeypatch.setattr(TransformersEngine, "calls_in_loop", 0, raising=False)
    monkeypatch.setattr(TransformersEngine, "_in_turn", dying)
    found = run(recipe, tmp_path / "run", *IN_FLIGHT, "rollout.max_lag=2", "engine.restarts=1")
    assert len(dead) == 1
    assert ledger(found)[-1]["reissued"] > 2, "more than one group was being drawn"
    assert ledger(found)[-1]["issued"] == ledger(found)[-1]["trained"] == STEPS * 4


def test_an_engine_that_dies_in_an_evaluation_or_at_a_checkpoint_is_started_again(
    recipe, tmp_path, monkeypatch
):
    died = []

    def dying(real, name):
        def once(*args):
            if name not in died:
                died.append(name)
                raise EngineDied("engine process", got="its end", expected="a running engine", hint="none")
            return real(*args)

        return once

    for name in ("evaluate", "checkpoint"):
        monkeypatch.setattr(in_flight, name, dying(getattr(in_flight, name), name))
    found = run(recipe, tmp_path / "run", *IN_FLIGHT)
    assert died == ["evaluate", "checkpoint"]
    assert [row["step"] for row in ledger(found)] == list(range(STEPS))
    assert ledger(found)[-1]["issued"] == ledger(found)[-1]["trained"] == STEPS * 4


def test_an_engine_that_dies_too_often_ends_the_run(recipe, tmp_path, monkeypatch):
    dies_once(monkeypatch, at=5)
    with pytest.raises(EngineDied):
        run(recipe, tmp_path / "run", *IN_FLIGHT, "engine.restarts=0")


@pytest.mark.parametrize(
    ("without", "update", "other"),
    [
        (["pause_keep"], "keep", r"rollout\.update=abort"),
        (["pause_keep", "pause_abort"], "keep", r"rollout\.update=wait"),
        (["pause_wait", "pause_abort"], "wait", r"loop\.kind=sync"),
    ],
)
def test_an_engine_without_a_pause_is_told_before_anything_is_drawn(
    recipe, tmp_path, monkeypatch, without, update, other
):
    from lockstep.engines import transformers

    for name in without:
        monkeypatch.setitem(transformers.CAN, name, Capability(False, "not this one"))
    with pytest.raises(CapabilityError, match=other):
        run(recipe, tmp_path / "run", "loop.kind=in_flight", f"rollout.update={update}")


def test_old_logprobs_of_the_current_weights_are_refused_by_name(recipe):
    with pytest.raises(RecipeError, match="nothing is ever clipped"):
        with_sets(recipe, ["objective.old_logprobs=current"])


def test_a_wait_in_which_nothing_happens_ends_and_says_who_waits_for_what(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Flights, "_take_in", lambda self, handle: None)
    with pytest.raises(EngineError, match=r"step 1 waits for 2 groups \(\d in flight"):
        run(recipe, tmp_path / "run", *IN_FLIGHT, "loop.deadline_s=2")
