"""What every engine owes a loop that never stops: requests that begin at once, and each end by themselves."""

import threading
import time

import numpy as np
import pytest
from tests.contract.conftest import MODEL, ids_of, logprobs_of
from tests.contract.test_contract import EXACT_NATS, QUICKSTART, draw, groups_of, prompts_of

from lockstep.config.recipe import load_recipe
from lockstep.policy.pretrained import resolve_model
from lockstep.records.tokens import SamplingParams
from lockstep.rendering import Renderer
from lockstep.rollout import collect
from lockstep.rollout.tasks import Task

DEADLINE_S = 300.0
CALCULATOR = QUICKSTART.with_name("calculator.toml")


def test_what_is_submitted_comes_as_it_ends_and_is_what_is_sampled(side):
    prompts = prompts_of(6, seed=21)
    lengths = [24, 2, 24, 2, 24, 2]
    asked = [SamplingParams(max_tokens=n, seed=row, n=2) for row, n in enumerate(lengths)]
    order = []
    handles = side.engine.submit(prompts, asked, lambda handle: order.append(handle.params.max_tokens))
    found = [handle.result(DEADLINE_S) for handle in handles]
    assert [len(group) for group in found] == [2] * 6
    assert side.engine.drain(DEADLINE_S) == 0
    assert sorted(order) == sorted(lengths)
    if side.name != "transformers":  # which draws one request after the other
        assert order[:3] == [2, 2, 2], "the short ones do not wait for the long ones"
    for prompt, group in zip(prompts, found, strict=True):
        scores = np.concatenate(side.scored(groups_of([prompt], group)))
        assert np.abs(scores - logprobs_of(group)).max() <= EXACT_NATS


def test_one_request_is_cancelled_and_the_others_go_on(side):
    prompts = prompts_of(2, seed=22)
    handles = side.engine.submit(
        prompts, [SamplingParams(max_tokens=200, seed=1), SamplingParams(max_tokens=20)]
    )
    time.sleep(0.5)
    handles[0].cancel()
    (cut,) = handles[0].result(DEADLINE_S)
    (whole,) = handles[1].result(DEADLINE_S)
    assert cut.finish_reason == "abort"
    assert len(ids_of(cut)) < 200
    assert len(ids_of(whole)) == 20
    assert len(draw(side, prompts_of(2))) == 2, "the engine goes on"


def test_requests_that_are_cancelled_at_once_all_end(side):
    """Some have no token by then, and an engine may have nothing to say of them, or not know them yet."""
    asked = [SamplingParams(max_tokens=100, seed=row, n=2) for row in range(12)]
    handles = side.engine.submit(prompts_of(12, seed=25), asked)
    for handle in handles:
        handle.cancel()
    assert side.engine.drain(DEADLINE_S) == 0
    found = [handle.result(0.0) for handle in handles]
    assert [[completion.sample_index for completion in cut] for cut in found] == [[0, 1]] * 12
    assert {completion.finish_reason for cut in found for completion in cut} == {"abort"}
    assert len(draw(side, prompts_of(2))) == 2, "the engine goes on"


def test_a_request_that_comes_during_a_load_waits_and_is_of_the_new_version(side):
    if not side.engine.ready.capabilities["load"].supported:
        pytest.skip(f"NOT_RUN: {side.engine.ready.capabilities['load'].how}")
    version = 900
    (before,) = side.engine.submit(prompts_of(1, seed=23), [SamplingParams(max_tokens=60, seed=2)])
    time.sleep(0.3)
    update = side.trainer.publish(version)
    load = threading.Thread(target=side.engine.load, args=(update, "wait"))
    load.start()
    time.sleep(0.05)
    (after,) = side.engine.submit(prompts_of(1, seed=24), [SamplingParams(max_tokens=4, seed=3)])
    (old,), (new,) = before.result(DEADLINE_S), after.result(DEADLINE_S)
    load.join(DEADLINE_S)
    side.trainer.settle()
    assert not load.is_alive()
    assert len({span.version for span in old.version_spans}) == 1, "mode wait: no completion spans the load"
    assert [span.version for span in new.version_spans] == [version]


def always_calls(text):
    """Every turn calls the calculator, whatever it says."""
    return [("calculate", {"expression": "12 * 7"})]


def test_a_conversation_of_two_turns_is_one_row_exact_to_the_token(side):
    model = resolve_model(MODEL)
    digits = [ids[0] for digit in "0123456789" for ids in [Renderer(model).tokenizer.encode(digit)]]
    recipe = load_recipe(
        CALCULATOR,
        [
            "task.tool_calls=tests.contract.test_streaming:always_calls",
            "task.max_turns=2",
            "sampling.max_tokens=8",
            f"sampling.stop_token_ids={digits}",  # so that first turns end
            "training.prompts_per_step=2",
            "training.group_size=4",
        ],
    )
    task = Task(recipe.task, 0)
    renderer = Renderer(model, task.tools)
    samples = collect.sample(side.engine, task, renderer, recipe, 0)
    two = [sample for sample in samples if not sample.loss_mask.all()]
    assert len(two) >= 2
    between = renderer.between([{"role": "tool", "content": "84"}])
    for sample in two:
        assert sample.token_ids[~sample.loss_mask].tolist() == between.tolist()
        assert sample.missing == 0
    scores = np.concatenate(side.scored(samples.groups))[samples.loss_mask]
    assert np.abs(scores - samples.engine_logprobs[samples.loss_mask]).max() <= EXACT_NATS
