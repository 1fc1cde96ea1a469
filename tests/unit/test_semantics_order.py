"""One order for a live engine and a log: the same rollouts, judged as either, get the same cause."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace as changed

from lockstep.engines.logged import LoggedEngine
from lockstep.logged.part import LogPart
from lockstep.logged.rows import Collected
from lockstep.parity.evidence import gather
from lockstep.parity.layers import semantics
from lockstep.parity.pair import Pair
from tests.unit.bag_pair import BOS, bag_pair

WHOLE = (slice(None), slice(None))
NONE = np.zeros(0, np.int32)


def as_logged(pair, sample, lead=NONE):
    """The rollouts as a log holds them, with ids before each prompt."""
    collected = Collected([])
    for row, one in enumerate(sample):
        numbers = one.engine_logprobs.astype(np.float64)
        collected.add(row + 1, np.r_[lead, one.prompt_ids], one.token_ids, numbers, {}, 0, WHOLE)
    logged = collected.done(Path("x.jsonl"), [sample.sampling], padded=False)
    rows = logged.usable()
    side = Pair(LoggedEngine("float32"), pair.trainer, pair.renderer, None, pair.recipe)
    return LogPart(side, logged, rows, rows)


def causes(pair, edit=lambda rows: rows):
    """What the rollouts are called when the engine can be asked, and when they are all there is.

    ``edit``: what becomes of every sample's numbers on their way, by row.
    """
    evidence = gather(pair)
    for sample in evidence.samples:
        rows = [sample.engine_logprobs[sample.owners == row] for row in range(len(sample))]
        sample.fill(engine_logprobs=np.concatenate(edit(rows)))
    verdicts = semantics.judge(pair, evidence), as_logged(pair, evidence.own).semantics()
    return [verdict.findings[0].cause if verdict.findings else verdict.status for verdict in verdicts]


def pair_of(plant=None, temperature=0.7, **asked):
    pair = bag_pair(
        sampling={"max_tokens": 24, "temperature": temperature} | asked,
        parity={"probe_prompts": 16, "probe_tokens": 24, "draw_tokens": 0},
    )
    if plant is not None:
        plant(pair.engine)
    return pair


def draws(**others):
    """Tokens are drawn with settings that were not asked for."""

    def plant(engine):
        engine.params = lambda asked: changed(asked, **others)

    return plant


def numbers(change):
    """What the engine reports is another thing."""

    def plant(engine):
        engine.numbers = lambda said, *_: np.asarray(change(said), np.float32)

    return plant


def scored(at=None, **others):
    """Tokens are drawn with other settings, and numbers are those of a temperature: ``at``, or as asked."""

    def plant(engine):
        asked_for = []

        def params(asked):
            asked_for.append(asked.temperature)
            return changed(asked, **others)

        def said(_, prompt, ids):
            return engine._of(np.r_[prompt, ids], at or asked_for[-1])[len(prompt) - 1 :]

        engine.params = params
        engine.numbers = said

    return plant


def noisy():
    noise = np.random.default_rng(0)
    return numbers(lambda said: said + noise.normal(0, 0.3, said.size))


@pytest.mark.parametrize(
    ("cause", "pair"),
    [
        ("PASS", lambda: pair_of()),
        ("logprobs_transformed", lambda: pair_of(numbers(lambda said: said / np.log(2)))),
        ("logprobs_transformed", lambda: pair_of(numbers(lambda said: np.maximum(said, -4.0)))),
        ("logprobs_transformed", lambda: pair_of(numbers(lambda said: said / np.log(2)), top_p=0.9)),
        ("shifted_logprobs", lambda: pair_of(numbers(lambda said: np.r_[said[1:], said[:1]]))),
        ("truncation_unmodelled", lambda: pair_of(top_p=0.9)),
        ("truncation_unmodelled", lambda: pair_of(top_p=0.9, presence_penalty=0.8)),
        ("truncation_unmodelled", lambda: pair_of(noisy(), top_p=0.9)),
        ("penalties_unmodelled", lambda: pair_of(presence_penalty=0.8)),
        ("penalties_unmodelled", lambda: pair_of(noisy(), presence_penalty=0.8)),
        ("penalties_unmodelled", lambda: pair_of(draws(temperature=0.9), presence_penalty=0.8)),
        ("temperature_altered", lambda: pair_of(draws(temperature=0.9))),
        ("temperature_altered", lambda: pair_of(draws(temperature=1.0), temperature=0.4)),
        ("hidden_truncation", lambda: pair_of(draws(top_k=5))),
        ("unexplained_semantics", lambda: pair_of(noisy())),
        ("raw_logprobs", lambda: pair_of(scored(at=1.0))),
        ("draws_differ", lambda: pair_of(scored(top_k=4))),
    ],
)
def test_rollouts_are_called_the_same_live_and_logged(cause, pair):
    assert causes(pair()) == [cause, cause]


@pytest.mark.parametrize(
    ("cause", "edit"),
    [
        ("missing_logprobs", lambda rows: [np.r_[np.float32("nan"), row[1:]] for row in rows]),
        ("rows_swapped", lambda rows: rows[1:] + rows[:1]),
    ],
)
@pytest.mark.parametrize("asked", [{}, {"top_p": 0.9, "presence_penalty": 0.8}])
def test_numbers_that_are_mangled_are_named_before_what_was_asked_for(cause, edit, asked):
    assert causes(pair_of(**asked), edit) == [cause, cause]


@pytest.mark.parametrize("asked", [{}, {"top_p": 0.9}])
def test_a_doubled_bos_is_named_before_anything_that_is_fitted(asked):
    pair = pair_of(noisy(), **asked)
    evidence = gather(pair)
    prompt = pair.renderer.prompt
    pair.renderer.prompt = lambda messages: np.r_[BOS, prompt(messages)].astype(np.int32)
    logged = as_logged(pair, evidence.own, np.full(2, BOS, np.int32))
    for verdict in (semantics.judge(pair, evidence), logged.semantics()):
        assert verdict.findings[0].cause == "bos_doubled"
