"""A killed run's trainer is brought to where it was, or refuses to go on, from constructed directories."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lockstep.config.recipe import with_sets
from lockstep.errors import ParityError, RunError
from lockstep.loop import stages
from lockstep.loop.resume import REPLAYED, _recorded_gate, _refuse_other_figures, catch_up
from lockstep.loop.run import Run
from lockstep.parity.gate import Gate, Measured
from lockstep.records.verdicts import BeforeStep, Finding, Verdict
from lockstep.records.versions import VersionSpan
from lockstep.rollout import store
from lockstep.runs.layout import RunLayout
from lockstep.runs.read import read_steps
from lockstep.runs.record import open_recorder
from tests.unit.bag_pair import TASK, VOCABULARY, bag_pair

STEPS = 4
FIGURES = {"gap_abs_p50_nats": 1e-6, "gap_mean_nats": 0.0, "gap_mean_se_nats": 1e-7}
NUMERICS = Verdict(layer="numerics", status="PASS", summary="", n_tokens=96, figures=FIGURES)
TRAINING = {"steps": STEPS, "prompts_per_step": 4, "group_size": 4, "minibatches": 2}


def start(directory, model_path=None):
    """A process: the weights as they are at the start of every run, and the directory as it lies."""
    pair = bag_pair(training=TRAINING, optimizer={"lr": 1e-2}, sampling={"max_tokens": 6, "temperature": 0.8})
    pair.task = SimpleNamespace(
        **vars(TASK), rewards=lambda texts, items: (float(len(set(text)) % 3) for text in texts)
    )
    directory.mkdir(exist_ok=True)
    layout = RunLayout(directory)
    said = []
    run = Run(SimpleNamespace(pair=pair, model_path=model_path), layout, said.append, open_recorder(layout))
    run.deliveries.judge = lambda *_: None  # the loop's proofs are not what is shown here
    run.said = said
    return run


def train(run, steps, *, record=True):
    """Steps as the loop makes them, without its proofs."""
    for step in steps:
        rollouts = stages.sample(run, step)
        stages.reward(run, step, rollouts)
        figures = stages.train_gated(run, step, rollouts)
        run.pair.version = step + 1
        run.pair.sync(step + 1)
        if record:
            run.recorder.step(step, step + 1, figures)


@pytest.fixture
def model_path(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def killed(tmp_path, model_path):
    """A run that was killed after two trained steps, with no checkpoint yet; and its weights then."""
    run = start(tmp_path / "run", model_path)
    run.recorder.verdict(BeforeStep(0), NUMERICS)
    run.gate = Gate.of(run.pair, FIGURES)
    train(run, range(2))
    return run


def same(one, other):
    ours, theirs = one.pair.trainer.weights(), other.pair.trainer.weights()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def again(killed):
    return start(killed.layout.root, killed.session.model_path)


def test_from_rollouts_alone_the_weights_come_back_bit_for_bit(killed):
    resumed = again(killed)
    assert not same(resumed, killed)
    assert catch_up(resumed) == 2
    assert same(resumed, killed)
    assert resumed.said[0] == "resume: no whole checkpoint, from the start"
    assert len(read_steps(killed.layout.metrics)) == 2, "what stands there is not written again"


def test_the_optimizers_moments_came_back_too(killed):
    """Else the next step would be another."""
    resumed = again(killed)
    catch_up(resumed)
    for run in (killed, resumed):
        run.pair.sync(2)
    train(killed, [2])
    kept = store.load(killed.layout.rollouts(2), 4, killed.recipe.sampling)
    resumed.pair.trainer.step(kept, 2, lambda tokens: None)
    assert same(resumed, killed)


def test_from_a_checkpoint_only_what_came_after_it_is_replayed(killed):
    killed.pair.trainer.save(killed.layout.checkpoints, 2, killed.session.model_path)
    train(killed, [2])
    killed.layout.rollouts(0).unlink()
    resumed = again(killed)
    assert catch_up(resumed) == 3
    assert same(resumed, killed)
    assert resumed.said == ["resume: step-000002", "resume: step 3 replayed from its stored rollouts"]


def test_a_checkpoint_that_is_cut_is_passed_over_and_said(killed):
    path = killed.pair.trainer.save(killed.layout.checkpoints, 2, killed.session.model_path)
    model = next(path.glob("*.safetensors"))
    model.write_bytes(model.read_bytes()[:-1])
    resumed = again(killed)
    assert catch_up(resumed) == 2
    assert same(resumed, killed)
    told = "resume: checkpoint step-000002 is not whole and is passed over; it is kept as step-000002.damaged"
    assert resumed.said[0] == told


def test_weights_of_which_a_byte_changed_are_never_gone_on_with(killed):
    """No length changes, and no step comes after it whose figures would show it."""
    path = killed.pair.trainer.save(killed.layout.checkpoints, 2, killed.session.model_path)
    model = next(path.glob("*.safetensors"))
    content = bytearray(model.read_bytes())
    content[-2] ^= 0x40
    model.write_bytes(content)
    resumed = again(killed)
    assert catch_up(resumed) == 2
    assert same(resumed, killed)
    assert "step-000002 is damaged (model.safetensors: other bytes" in resumed.said[0]


def test_a_step_that_was_trained_and_not_recorded_is_recorded(killed):
    train(killed, [2], record=False)
    with killed.layout.metrics.open("ab") as file:
        file.write(b'{"schema": "lockstep.met')
    resumed = again(killed)
    assert catch_up(resumed) == 3
    steps = list(read_steps(killed.layout.metrics))
    assert [(row.step, row.weight_version) for row in steps] == [(0, 1), (1, 2), (2, 3)]
    assert same(resumed, killed)


def test_drawn_and_refused_rollouts_are_no_steps(killed):
    rollouts = stages.sample(killed, 2)
    assert catch_up(again(killed)) == 2
    stages.refuse(killed, 2, ["so"])
    assert catch_up(again(killed)) == 2
    assert len(rollouts) == 16


@pytest.mark.parametrize(("share", "left"), [(0.0, None), (0.02, None), (0.05, 3)])
def test_tokens_without_a_number_leave_the_loss_as_far_as_the_recipe_lets_them(killed, share, left):
    killed.pair.recipe = with_sets(killed.recipe, [f"parity.missing_share={share}"])
    rollouts = stages.sample(killed, 2)
    before = int(rollouts.loss_mask.sum())
    for row, number in enumerate((np.nan, -np.inf, -9999.0)):
        numbers = np.r_[number, rollouts[row].engine_logprobs[1:]].astype(np.float32)
        rollouts.samples[row] = replace(rollouts[row], engine_logprobs=numbers)
    if left is None:
        with pytest.raises(ParityError, match="3 tokens without a finite log-probability"):
            stages.leave_out(killed, 2, rollouts)
        assert killed.layout.refused(2).is_file()
    else:
        stages.leave_out(killed, 2, rollouts)
        assert not rollouts.missing
    assert before - int(rollouts.loss_mask.sum()) == rollouts.left_out == (left or 0)


def test_a_run_that_was_killed_before_its_first_step_starts_there(tmp_path):
    run = start(tmp_path / "run")
    assert catch_up(run) == 0
    assert run.gate is None, "it is the ladder that sets it"


@pytest.mark.parametrize("name", REPLAYED)
def test_a_step_that_does_not_give_the_recorded_figures_again_stops_the_run(killed, name):
    rows = [json.loads(line) for line in killed.layout.metrics.read_bytes().splitlines()]
    rows[1]["metrics"][name] += 0.01 * abs(rows[1]["metrics"][name]) + 1e-4
    killed.layout.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(RunError, match=f"step 2 replayed from its rollouts: got {name}"):
        catch_up(again(killed))


def test_weights_that_are_not_those_that_drew_the_rollouts_are_refused_by_the_gate(killed):
    resumed = again(killed)
    with torch.no_grad():
        resumed.pair.trainer._policy.head += 0.05
        resumed.pair.trainer._policy.model.embed += 0.05
    with pytest.raises(ParityError, match="rollouts of step 0, before they are trained on") as refused:
        catch_up(resumed)
    assert str(killed.layout.rollouts(0)) in refused.value.hint, "they stay: they were trained on"
    assert killed.layout.rollouts(0).is_file()


def test_rollouts_that_are_another_steps_are_not_trained_on(killed):
    """A copy made by hand: under small updates the gate would take it, and a step be trained on twice."""
    killed.layout.rollouts(1).write_bytes(killed.layout.rollouts(0).read_bytes())
    with pytest.raises(RunError, match=r"step-000001\.parquet: got those of step 0"):
        catch_up(again(killed))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"token_ids": np.array([3, VOCABULARY], np.int32)}, f"token id {VOCABULARY}, of {VOCABULARY}"),
        ({"prompt_ids": np.array([-1], np.int32)}, f"token id -1, of {VOCABULARY}"),
        ({"prompt_ids": np.array([], np.int32)}, "no prompt"),
        ({"loss_mask": np.array([True])}, "1 loss_mask for 2 tokens"),
        ({"advantages": np.zeros(3, np.float32)}, "3 advantages for 2 tokens"),
        ({"version_spans": ()}, "no version of 2 tokens"),
        ({"version_spans": (VersionSpan(0, 1, 0),)}, "of 2 tokens"),
        ({"version_spans": (VersionSpan(0, 2, 5),)}, "version=5"),
    ],
)
def test_drawn_rollouts_that_cannot_be_are_named_before_they_are_scored(killed, change, says):
    rollouts = stages.sample(killed, 2)
    whole = {
        "token_ids": np.array([3, 4], np.int32),
        "loss_mask": np.ones(2, bool),
        "engine_logprobs": np.full(2, -1, np.float32),
        "version_spans": (VersionSpan(0, 2, 2),),
    }
    rollouts.samples[1] = replace(rollouts[1], **whole | change)
    store.save(killed.layout.drawn(2), rollouts)
    with pytest.raises(RunError, match=rf"drawn/step-000002\.parquet: got sample 1: .*{says}") as raised:
        stages.sample(killed, 2)
    assert raised.value.hint.startswith("rm "), "they are drawn again"


def test_completions_that_the_engine_says_other_weights_drew_are_refused(killed):
    """Under small updates its numbers alone may not show it."""
    killed.pair.engine.version = 1
    with pytest.raises(ParityError, match="version 1 drew them, and was sent version 2"):
        stages.sample(killed, 2)
    assert killed.layout.refused(2).is_file()
    assert not killed.layout.drawn(2).exists()


@pytest.mark.parametrize("lost", [0, 1])
def test_rollouts_of_a_recorded_step_that_are_gone_stop_the_run(killed, lost):
    killed.layout.rollouts(lost).unlink()
    with pytest.raises(RunError, match=r"no rollouts of a step that metrics\.jsonl has as trained") as raised:
        catch_up(again(killed))
    assert str(killed.layout.rollouts(lost)) in raised.value.boundary


def recorded(run, *verdicts):
    run.layout.verdicts.unlink()
    for verdict in verdicts:
        run.recorder.verdict(BeforeStep(0), verdict)
    return again(run)


SEMANTICS = Verdict(layer="semantics", status="PASS", summary="", n_tokens=8)
OTHER = Verdict(layer="weights", status="PASS", summary="", n_tokens=8)
WITHOUT = Verdict(layer="numerics", status="PASS", summary="", n_tokens=8, figures={"gap_abs_p50_nats": 1e-6})
FOUND = Finding(cause="c", effect_nats=0.0, ci95=(0.0, 0.0), n_tokens=1, fix="", evidence="")
REFUSED = Verdict(layer="numerics", status="FAIL", summary="", findings=(FOUND,), figures=FIGURES)


@pytest.mark.parametrize(
    "verdicts", [(OTHER,), (WITHOUT,), (REFUSED,)], ids=["of another layer", "no figures", "a failure"]
)
def test_without_a_ladder_that_passed_nothing_is_replayed(killed, verdicts):
    before = again(killed)
    resumed = recorded(killed, *verdicts)
    with pytest.raises(RunError, match="no passing verdict of layer numerics with its figures"):
        catch_up(resumed)
    assert same(resumed, before)


def test_the_gate_is_that_of_the_last_ladder_that_passed(killed):
    later = Verdict(
        layer="numerics", status="PASS", summary="", n_tokens=8, figures=FIGURES | {"gap_abs_p50_nats": 2e-6}
    )
    gate = _recorded_gate(recorded(killed, NUMERICS, later, REFUSED, OTHER), 0)
    assert gate.measured == Measured(2e-6, 0.0, 1e-7)
    assert (gate.temperature, gate.noise) == (0.8, killed.pair.noise)


def test_an_override_stands_in_for_the_gate_only_where_no_ladder_passed(killed):
    """Steps 0 and 1 followed a ladder that passed, step 2 one that failed, step 3 one that passed again."""
    run = recorded(killed, SEMANTICS, NUMERICS)
    failed = Verdict(layer="semantics", status="NOT_RUN", summary="", n_tokens=0, reason="no number")
    run.recorder.verdict(BeforeStep(2), failed)
    for verdict in (SEMANTICS, NUMERICS):
        run.recorder.verdict(BeforeStep(3), verdict)
    run.pair.recipe = with_sets(run.pair.recipe, ["parity.override=it cannot be mended before Monday"])
    assert [_recorded_gate(run, step) is not None for step in range(4)] == [True, True, False, True]


def test_a_step_that_is_recorded_by_the_next_start_says_that_nothing_was_proven_before_it(killed):
    """The kill came between the gate and the step's line; this start's own ladder comes later."""
    failed = Verdict(layer="semantics", status="NOT_RUN", summary="", n_tokens=0, reason="no number")
    sentence = "it cannot be mended before Monday"
    for run in (killed, resumed := recorded(killed, SEMANTICS, NUMERICS)):
        run.pair.recipe = with_sets(run.pair.recipe, [f"parity.override={sentence}"])
    killed.recorder.verdict(BeforeStep(2), failed)
    train(killed, [2], record=False)
    assert catch_up(resumed) == 3
    assert [row.override for row in read_steps(killed.layout.metrics)] == [
        *("", ""),
        f"OVERRIDDEN (semantics: no number): {sentence}",
    ]
    assert resumed.recorder.override is None


@pytest.mark.parametrize(
    ("dtype", "off", "refused"),
    [
        ("torch.float32", 1e-4, False),
        ("torch.float32", 2e-3, True),
        ("torch.bfloat16", 2e-3, False),
        ("torch.bfloat16", 0.06, True),
        ("torch.float32", float("nan"), True),
    ],
)
def test_figures_are_held_to_what_another_machines_rounding_may_bring(dtype, off, refused):
    run = SimpleNamespace(pair=SimpleNamespace(trainer=SimpleNamespace(dtype=dtype)))
    then = {"loss": -0.5, "entropy_mean_nats": 3.0, "grad_norm": 1.25, "step_s": 9.0}
    now = then | {"loss": -0.5 * (1 + off), "step_s": 1.0}
    if not refused:
        _refuse_other_figures(run, 3, now, then)
        return
    with pytest.raises(RunError, match="step 4 replayed from its rollouts: got loss"):
        _refuse_other_figures(run, 3, now, then)


def test_a_loss_of_0_is_held_to_an_absolute_bound():
    run = SimpleNamespace(pair=SimpleNamespace(trainer=SimpleNamespace(dtype="torch.float32")))
    then = {"loss": 0.0, "entropy_mean_nats": 3.0, "grad_norm": 1.0}
    _refuse_other_figures(run, 0, then | {"loss": 9e-7}, then)
    with pytest.raises(RunError):
        _refuse_other_figures(run, 0, then | {"loss": 2e-6}, then)


def test_a_record_without_a_figure_that_is_replayed_is_an_error_that_says_so(killed):
    rows = [json.loads(line) for line in killed.layout.metrics.read_bytes().splitlines()]
    del rows[0]["metrics"]["grad_norm"]
    killed.layout.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(RunError, match=r"got grad_norm .*, expected one in metrics\.jsonl"):
        catch_up(again(killed))
