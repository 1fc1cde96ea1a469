"""The loop on a tiny pair.

What is refused is never trained on, what is trained is never lost, a step says what is proven.
"""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from lockstep.config.recipe import with_sets
from lockstep.errors import ParityError, RewardError, RunError, WeightSyncError
from lockstep.faults.at_load import AtLoad
from lockstep.faults.relay import Relay
from lockstep.loop.open import open_session
from lockstep.loop.run import Run
from lockstep.loop.sync import run_steps
from lockstep.parity import canary
from lockstep.records.tokens import FLOAT32
from lockstep.records.verdicts import AfterSync, OfRollouts
from lockstep.rollout import store
from lockstep.runs.certificate import read_certificate
from lockstep.runs.layout import new_run
from lockstep.runs.manifest import write_manifest
from lockstep.runs.read import open_run, read_steps
from lockstep.runs.record import open_recorder

SETS = [
    "training.steps=3",
    "training.prompts_per_step=2",
    "training.group_size=2",
    "training.checkpoint_every=9",
    "parity.probe_prompts=4",
    "parity.probe_tokens=4",
    "parity.draw_tokens=128",
    "parity.draws_see=1",
    "optimizer.lr=1e-3",
]


class Loop:
    """One run directory, and starts of the loop on it, each with a trainer and an engine of its own."""

    def __init__(self, recipe, root):
        self.recipe = recipe
        self.layout = new_run(root / "run")
        self.said = []

    def start(self, *, resumed=False, before=lambda pair: None):
        """Run to the end; ``before`` may edit the pair. Returns the weights."""
        with open_session(self.recipe, self.layout.engine_log, self.said.append) as session:
            session.pair.task._judge._reward = lambda text, item: len(text) % 3 / 2
            if not resumed:
                write_manifest(self.layout.manifest, session.manifest)
            before(session.pair)
            self.run = Run(session, self.layout, self.said.append, open_recorder(self.layout))
            try:
                run_steps(self.run, resumed=resumed)
            finally:
                self.weights = torch.cat(
                    [p.detach().reshape(-1).clone() for p in session.pair.trainer._policy.model.parameters()]
                )
        return self.weights


@pytest.fixture
def loop(recipe, tmp_path):
    return Loop(with_sets(recipe, SETS), tmp_path)


def edits_from(step, edit):
    """An engine whose samples are edited from one training step on; the ladder's are not."""

    def edited(pair):
        original = pair.engine.sample

        def sample(prompts, params):
            completions = original(prompts, params)
            training = params[0].n > 1 and pair.version == step
            return [edit(c) for c in completions] if training else completions

        pair.engine.sample = sample

    return edited


def off_by(nats):
    def edit(completion):
        if completion.prompt_index == 0:
            return completion
        return replace(
            completion, logprobs=(np.frombuffer(completion.logprobs, FLOAT32) - np.float32(nats)).tobytes()
        )

    return edit


@pytest.mark.parametrize(
    "sets", [[], ["training.minibatches=2"], ["training.minibatches=2", "objective.old_logprobs=engine"]]
)
def test_refused_rollouts_are_never_trained_on_and_resume_draws_that_step_again(recipe, tmp_path, sets):
    clean = Loop(with_sets(recipe, SETS + sets), tmp_path / "clean")
    expected = clean.start()
    loop = Loop(clean.recipe, tmp_path / "refused")
    with pytest.raises(ParityError, match="beyond what arithmetic can bring") as raised:
        loop.start(before=edits_from(1, off_by(3.0)))
    (refused,) = loop.layout.refusals(1)
    assert str(refused) in raised.value.hint
    assert len(store.load(refused, 2, loop.recipe.sampling)) == 4
    assert not loop.layout.rollouts(1).exists()
    assert not loop.layout.drawn(1).exists()
    assert [record.step for record in read_steps(loop.layout.metrics)] == [0]
    with pytest.raises(ParityError, match=r"void|rollouts of step 1"):
        read_certificate(loop.layout.certificate)
    assert torch.equal(loop.start(resumed=True), expected)
    assert refused.exists()
    steps = read_steps(loop.layout.metrics)
    assert [record.step for record in steps] == [0, 1, 2]
    assert loop.run.watch.first == steps.records[0].metrics, "a collapse is measured over all starts"
    assert read_certificate(loop.layout.certificate).void == ""


def test_what_is_kept_has_the_trainers_numbers_admitted_or_refused(loop):
    with pytest.raises(ParityError, match="beyond what arithmetic can bring"):
        loop.start(before=edits_from(1, off_by(3.0)))
    admitted = store.load(loop.layout.rollouts(0), 2, loop.recipe.sampling)
    gap = np.abs(admitted.sampling_logprobs - admitted.engine_logprobs)
    recorded = read_steps(loop.layout.metrics).records[0].metrics
    assert gap.max() == pytest.approx(recorded["gap_abs_max_nats"], rel=1e-6)
    (path,) = loop.layout.refusals(1)
    refused = store.load(path, 2, loop.recipe.sampling)
    off = np.abs(refused.sampling_logprobs - refused.engine_logprobs).max()
    assert off == pytest.approx(3.0, abs=1e-3), "what was refused can be seen to be off"


def test_a_number_that_is_missing_is_refused_before_it_is_scored(loop):
    def lose(completion):
        logprobs = np.frombuffer(completion.logprobs, FLOAT32).copy()
        logprobs[0] = np.nan
        return replace(completion, logprobs=logprobs.tobytes(), missing=1)

    with pytest.raises(ParityError, match="4 tokens without a finite log-probability"):
        loop.start(before=edits_from(1, lose))
    (refused,) = loop.layout.refusals(1)
    assert np.isnan(store.load(refused, 2, loop.recipe.sampling).engine_logprobs).sum() == 4


def test_rollouts_of_other_weights_are_not_replayed(loop):
    loop.start()
    loop.layout.checkpoints.rename(loop.layout.root / "away")
    before = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in loop.layout.root.glob("rollouts/*.parquet")
    }

    def others(pair):
        with torch.no_grad():
            pair.trainer._policy.head.mul_(1.1)

    with pytest.raises(ParityError, match="rollouts of step 0, before they are trained on"):
        loop.start(resumed=True, before=others)
    assert {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in loop.layout.root.glob("rollouts/*.parquet")
    } == before


def test_a_replay_that_gives_other_figures_is_refused(loop):
    """With one minibatch the ratio is 1 and the loss says nothing: the entropy and the gradient do."""
    loop.start()
    loop.layout.checkpoints.rename(loop.layout.root / "away")
    text = loop.layout.metrics.read_text()
    row = read_steps(loop.layout.metrics).records[0].metrics
    loop.layout.metrics.write_text(
        text.replace(f'"grad_norm":{row["grad_norm"]}', f'"grad_norm":{row["grad_norm"] * 1.1}')
    )
    with pytest.raises(RunError, match="grad_norm"):
        loop.start(resumed=True)


def test_samples_whose_reward_failed_are_kept_and_scored_by_resume(recipe, tmp_path):
    clean = Loop(with_sets(recipe, SETS), tmp_path / "clean")
    expected = clean.start()
    loop = Loop(clean.recipe, tmp_path / "failed")

    def fail(pair):
        pair.task._judge._reward = lambda text, item: 1 / 0

    with pytest.raises(RewardError, match="ZeroDivisionError"):
        loop.start(before=fail)
    drawn = store.load(loop.layout.drawn(0), 2, loop.recipe.sampling)
    assert np.isnan(drawn.rewards).all()
    assert torch.equal(loop.start(resumed=True), expected)
    assert any("drawn before the interruption" in text for text in loop.said)


@pytest.mark.parametrize("seed", [0, 2])
def test_a_bf16_run_whose_ladder_measured_next_to_nothing_is_not_refused_for_its_rounding(
    recipe, tmp_path, seed
):
    """Both sides run the same kernels here: their medians agree to 0 until training has moved the logits."""
    sets = [
        "model.dtype=bfloat16",
        "training.steps=6",
        "training.group_size=4",
        "training.prompts_per_step=4",
    ]
    loop = Loop(
        with_sets(recipe, [*SETS, *sets, f"training.seed={seed}", "sampling.temperature=0.7"]), tmp_path
    )
    loop.start()
    medians = read_steps(loop.layout.metrics).column("gap_abs_p50_nats").tolist()
    assert len(medians) == 6
    assert max(medians) > 1e-4


def test_a_step_says_what_is_proven_and_for_how_long_it_was_not(recipe, tmp_path):
    small = Loop(with_sets(recipe, [*SETS, "optimizer.lr=1e-12"]), tmp_path / "small")
    small.start()
    lines = [text for text in small.said if text.startswith("step ")]
    assert [text.partition("weights ")[2].partition("  ")[0] for text in lines] == [
        "proven by the ladder to version 0, 1 sync not yet",
        "proven by the ladder to version 0, 2 syncs not yet",
        "proven by layer 3",
    ]
    assert read_steps(small.layout.metrics).column("unproven_syncs").tolist() == [1.0, 2.0, 0.0]
    proven = open_run(small.layout.root).verdicts[-1]
    assert (proven.when, proven.verdict.status) == (AfterSync(3), "PASS")
    large = Loop(with_sets(recipe, SETS), tmp_path / "large")
    large.start()
    assert all("weights proven by the canary" in text for text in large.said if text.startswith("step "))


class Rounds(Relay):
    """An engine whose numbers are as wide as bf16 kernels of other shapes make them.

    It loses some updates, and of others every tensor of the attention.
    """

    def __init__(self, inner, lost=(), torn=(), kept="self_attn."):
        super().__init__(inner)
        self.lost = lost
        self.torn = torn
        self.kept = kept
        self.rng = np.random.default_rng(0)
        self.trained = False

    def rounded(self, logprobs):
        values = np.frombuffer(logprobs, FLOAT32) if isinstance(logprobs, bytes) else logprobs
        return (values + 0.012 * self.rng.standard_normal(values.shape)).astype(np.float32)

    def sample(self, prompts, params):
        made = self.inner.sample(prompts, params)
        return [replace(one, logprobs=self.rounded(one.logprobs).tobytes()) for one in made]

    def _score(self, sequences, temperature):
        return [self.rounded(scores) for scores in self.inner.score(sequences, temperature)]

    def load(self, update, mode="wait"):
        engine = AtLoad(self.inner, ("not_delivered",)) if update.version in self.lost else self.inner
        weights = self.inner.model.state_dict()
        old = {name: weights[name].clone() for name in weights if self.kept in name}
        receipt = engine.load(update, mode)
        self.trained |= update.version == 1
        if update.version in self.torn and self.trained:
            for name, tensor in old.items():
                weights[name].copy_(tensor)
        return receipt


ALL = range(1, 2 * 10**9)
"""Every update from the first step's on, those of an experiment too."""
WIDE = [
    "model.dtype=bfloat16",
    "parity.direction_sequences=0",
    "training.prompts_per_step=48",
    "training.group_size=4",
    "sampling.max_tokens=8",
    "optimizer.lr=3e-4",
]


def rounding(**updates):
    def edit(pair):
        pair.engine = Rounds(pair.engine, **updates)

    return edit


@pytest.fixture
def blind_canary(monkeypatch):
    """It sees no update of these steps, whichever way this machine's bf16 takes them."""
    monkeypatch.setattr(canary, "CANARY_MULTIPLE", 20.0)


@pytest.mark.usefixtures("blind_canary")
def test_under_rounding_that_hides_an_update_from_the_canary_its_rollouts_prove_it(recipe, tmp_path):
    loop = Loop(with_sets(recipe, [*SETS, *WIDE]), tmp_path)
    loop.start(before=rounding())
    verdicts = open_run(loop.layout.root).verdicts
    after_sync = [v.verdict.status for v in verdicts if isinstance(v.when, AfterSync)]
    rollouts = [v.verdict.status for v in verdicts if isinstance(v.when, OfRollouts)]
    assert after_sync == ["NOT_RUN", "NOT_RUN", "NOT_RUN", "PASS"], "layer 3 moves each tensor"
    assert rollouts == ["PASS", "PASS"], [v.verdict.summary for v in verdicts]
    steps = read_steps(loop.layout.metrics)
    assert steps.column("unproven_syncs").tolist() == [1.0, 1.0, 0.0]
    assert np.abs(steps.column("update_missing_share")[1:]).max() < 0.3


@pytest.mark.usefixtures("blind_canary")
def test_an_update_that_is_lost_under_rounding_is_refused_by_its_rollouts(recipe, tmp_path):
    loop = Loop(with_sets(recipe, [*SETS, *WIDE]), tmp_path)
    with pytest.raises(WeightSyncError, match="not delivered") as raised:
        loop.start(before=rounding(lost=(2,)))
    assert "weight sync 2" in raised.value.boundary
    assert [record.step for record in read_steps(loop.layout.metrics)] == [0, 1]
    assert loop.layout.refusals(2)
    assert not loop.layout.rollouts(2).exists()
    with pytest.raises(ParityError, match="void"):
        read_certificate(loop.layout.certificate)


@pytest.mark.usefixtures("blind_canary")
def test_an_update_part_of_which_arrives_under_rounding_is_refused_by_its_rollouts(recipe, tmp_path):
    loop = Loop(with_sets(recipe, [*SETS, *WIDE]), tmp_path)
    with pytest.raises(WeightSyncError, match="partly delivered") as raised:
        loop.start(before=rounding(torn=(2,)))
    assert "weight sync 2" in raised.value.boundary
    assert loop.layout.refusals(2)


@pytest.mark.usefixtures("blind_canary")
def test_one_tensor_that_stays_behind_under_rounding_is_named_within_two_steps(recipe, tmp_path):
    """From the first step's sync on; the rollouts' share of the whole update does not show it."""
    loop = Loop(with_sets(recipe, [*SETS, *WIDE, "training.steps=8"]), tmp_path)
    with pytest.raises(WeightSyncError, match="stale tensors") as raised:
        loop.start(before=rounding(torn=ALL, kept="layers.1.mlp.down_proj"))
    assert "layers.1.mlp.down_proj did not move when it was moved alone" in raised.value.got
    assert "weight sync 3" in raised.value.boundary


def test_a_step_that_was_trained_is_not_drawn_again_when_its_rollouts_are_gone(loop):
    loop.start()
    loop.layout.checkpoints.rename(loop.layout.root / "away")
    loop.layout.rollouts(1).unlink()
    with pytest.raises(RunError, match="a step that metrics"):
        loop.start(resumed=True)
    assert [record.step for record in read_steps(loop.layout.metrics)] == [0, 1, 2]


def test_steps_without_an_update_are_no_lost_updates(loop, monkeypatch):
    """All rewards alike: no weight moves. What threads do to the trainer's scores is no update."""
    scored = canary.Canary.trainer_scores
    calls = itertools.count()
    monkeypatch.setattr(
        canary.Canary,
        "trainer_scores",
        lambda self, pair: scored(self, pair) + np.float32(1e-6 * (next(calls) % 2)),
    )

    trainers = []

    def flat(pair):
        pair.task._judge._reward = lambda text, item: 0.0
        trainers.append((pair.trainer, pair.trainer.weights_mark()))

    loop.start(before=flat)
    [(trainer, mark)] = trainers
    assert trainer.weights_mark() == mark
    steps = read_steps(loop.layout.metrics)
    assert steps.column("grad_norm").tolist() == [0.0] * 3
    assert steps.column("canary_shift_abs_mean_nats").max() > 0.0
