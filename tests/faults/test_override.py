"""A run whose ladder does not pass: it ends with layer and reason, or goes on stamped, on a tiny pair.

The engine reports raw log-probabilities of tokens that it draws at T = 0.7, as the story's did.
"""

import csv
import itertools
import re
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from lockstep.config.recipe import with_sets
from lockstep.errors import ParityError
from lockstep.records.samples import Samples
from lockstep.records.tokens import pack_logprobs
from lockstep.report.arms import read_arms
from lockstep.report.build import of_run
from lockstep.rollout import store
from lockstep.runs.checkpoints import read_state
from lockstep.runs.read import open_run
from lockstep.summary import summarise, summary_table
from tests.faults.test_loop import SETS, Loop, edits_from

SENTENCE = "the old cluster cannot be mended before Monday"
RAW = ["sampling.temperature=0.7", "training.steps=2", "objective.correction=tis"]


@pytest.fixture
def loop(recipe, tmp_path):
    return Loop(with_sets(recipe, [*SETS, *RAW]), tmp_path)


def says_raw(pair):
    """Every number of a sampled token is of the whole distribution at T = 1."""
    original = pair.engine.sample

    def sample(prompts, params):
        completions = original(prompts, params)
        drawn = Samples.of(prompts, completions, params[0])
        raw = [pair.trainer.score([group], 1.0) for group in drawn.apart().groups]
        return [
            msgspec.structs.replace(completion, logprobs=pack_logprobs(numbers[0].tolist()))
            for completion, numbers in zip(completions, raw, strict=True)
        ]

    pair.engine.sample = sample


def test_a_correction_without_a_certificate_is_locked_with_layer_and_reason(loop):
    with pytest.raises(ParityError, match="layer semantics, cause raw logprobs") as raised:
        loop.start(before=says_raw)
    assert raised.value.exit_code == 1
    assert any("objective.correction = 'tis' is locked" in note for note in raised.value.__notes__)
    assert not loop.layout.metrics.exists()


def test_with_the_override_every_artefact_says_so_and_one_alarm_names_the_layer(loop):
    loop.recipe = with_sets(loop.recipe, [f"parity.override={SENTENCE}"])
    loop.start(before=says_raw)
    run = open_run(loop.layout.root)
    assert len(run.steps) == 2
    assert run.certificate is None
    told = f"OVERRIDDEN (semantics: raw logprobs): {SENTENCE}"
    assert str(run.manifest.override) == told
    for path in (loop.layout.metrics, loop.layout.verdicts, loop.layout.alarms):
        lines = path.read_text().splitlines()
        assert lines, path
        assert all(f'"override":"{told}"' in line for line in lines), path
    assert str(read_state(loop.layout.checkpoint(2)).override) == told
    assert not unstamped(loop.layout.root)
    assert sum(SENTENCE in line for line in loop.said) == 3, "once when it goes on, and with each step"
    assert told in summary_table(summarise(run))
    (alarm,) = run.alarms
    assert (alarm.layer, alarm.name) == ("semantics", "mismatch")
    assert sum("ALARM" in line for line in loop.said) == 1
    first = run.steps.records[0].metrics
    # What the story saw: the ratio is off 1, tokens clip and a KL stands where no update has been.
    assert abs(first["mismatch_ratio_mean"] - 1.0) > 0.01
    assert first["phantom_clip_fraction"] > 0.05
    assert first["mismatch_kl_k3_nats"] > 1e-3
    assert first["policy_ratio_mean"] == 1.0, "and the policy's own has not moved"


def unstamped(root):
    """Files that people or programs read and that do not say it, by their path in the run."""
    data = {".parquet", ".safetensors"}
    texts = {path for path in root.rglob("*") if path.is_file() and path.suffix not in data}
    silent = {str(path.relative_to(root)) for path in texts if SENTENCE not in path.read_text()}
    # What a checkpoint has of the model's own, for any tool that loads one.
    return {name for name in silent if not re.fullmatch(r"checkpoints/[^/]+/[^/]+", name)}


def test_who_holds_runs_side_by_side_or_reports_one_is_told_that_it_was_not_proven(loop):
    loop.recipe = with_sets(loop.recipe, [f"parity.override={SENTENCE}"])
    loop.start(before=says_raw)
    (arm,) = read_arms([str(loop.layout.root)], {})
    assert any("was trained without proof" in note and SENTENCE in note for note in arm.notes)
    report = of_run(open_run(loop.layout.root))
    assert SENTENCE in report.words[0]
    header, *rows = csv.reader(report.downloads[0].text.splitlines())
    assert header[-1] == "override"
    assert len(rows) == 2
    assert all(row[-1].endswith(SENTENCE) and len(row) == len(header) for row in rows)


def test_a_proof_after_the_backend_was_mended_takes_nothing_back_of_what_was_trained(loop):
    loop.recipe = with_sets(loop.recipe, [f"parity.override={SENTENCE}"])
    loop.start(before=says_raw)
    loop.recipe = with_sets(loop.recipe, ["training.steps=3"])
    loop.start(resumed=True)
    run = open_run(loop.layout.root)
    assert run.certificate is not None
    assert [SENTENCE in record.override for record in run.steps] == [True, True, False]
    for stamp in (run.manifest.override, read_state(loop.layout.checkpoint(3)).override):
        assert stamp.reason == SENTENCE
    assert SENTENCE in run.override


def test_an_override_that_nothing_needs_changes_nothing(recipe, tmp_path):
    loop = Loop(with_sets(recipe, [*SETS, "training.steps=1", f"parity.override={SENTENCE}"]), tmp_path)
    loop.start()
    run = open_run(loop.layout.root)
    assert run.certificate is not None
    assert run.manifest.override is None
    assert run.override == ""
    assert unstamped(loop.layout.root) >= {"metrics.jsonl", "verdicts.jsonl", "certificate.json"}
    assert read_state(loop.layout.checkpoint(1)).override is None
    assert not any(SENTENCE in line for line in loop.said)


def first_is_missing(completion):
    """The engine has no number of the first token."""
    numbers = np.frombuffer(completion.logprobs, np.float32).copy()
    numbers[0] = np.nan
    return msgspec.structs.replace(completion, logprobs=numbers.tobytes(), missing=1)


def test_missing_numbers_are_refused_where_the_recipe_allows_none(recipe, tmp_path):
    loop = Loop(with_sets(recipe, [*SETS, "training.steps=2"]), tmp_path)
    with pytest.raises(ParityError, match="4 tokens without a finite log-probability"):
        loop.start(before=edits_from(1, first_is_missing))


def test_missing_numbers_leave_loss_and_denominator_where_a_share_is_allowed(recipe, tmp_path):
    """And never become a ratio of 1: the loss is that of the other tokens alone."""
    loop = Loop(with_sets(recipe, [*SETS, "training.steps=2", "parity.missing_share=0.9"]), tmp_path)
    # Of two samples of a group the first is the better one, and the first of them all lacks a number.
    rewards = itertools.cycle([1.0, 0.0])
    edits = itertools.chain([first_is_missing], itertools.repeat(lambda completion: completion))

    def before(pair):
        pair.task._judge._reward = lambda text, item: next(rewards)
        edits_from(1, lambda completion: next(edits)(completion))(pair)

    loop.start(before=before)
    first, second = open_run(loop.layout.root).steps.records
    assert [step.metrics["missing_logprobs"] for step in (first, second)] == [0.0, 1.0]
    stored = store.load(loop.layout.rollouts(1), 2, loop.recipe.sampling)
    assert stored.left_out == 1
    kept = stored.loss_mask
    assert np.flatnonzero(~kept).tolist() == [0]
    advantages = np.repeat([sample.advantages[-1] for sample in stored], stored.lengths)
    # Before the first update each ratio is 1: a token's loss is minus its advantage.
    alone = -advantages[kept].sum() / kept.sum()
    others = {"left in": -advantages.mean(), "left in the denominator": -advantages[kept].sum() / kept.size}
    assert second.metrics["loss"] == pytest.approx(alone, abs=1e-6)
    for told, loss in others.items():
        assert abs(alone - loss) > 1e-4, told
    whole = replace(stored[0], loss_mask=np.ones(len(stored[0].token_ids), bool))
    assert whole.missing == 1
