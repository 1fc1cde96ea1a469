"""Requests under way: each handle ends, in its own completions, in an abort's or in the engine's error."""

import threading
import time

import numpy as np
import pytest
from msgspec.structs import replace

from lockstep.engines.streaming import Handle
from lockstep.errors import EngineDied, EngineError
from lockstep.faults.relay import Relay
from lockstep.records.tokens import SamplingParams
from tests.unit.test_engine import Canned
from tests.worker_that_lies import completion

PROMPTS = [np.array([n], np.int32) for n in (1, 2, 3)]
TWO = SamplingParams(max_tokens=3, n=2)
SOON_S = 10.0


class Held(Canned):
    """Draws ``n`` samples of its prompt's first id, each prompt once it is let go."""

    at_once = 3

    def __init__(self):
        super().__init__([])
        self.gates = {int(prompt[0]): threading.Event() for prompt in PROMPTS}
        self.begun = []
        self.wrong = False

    def _sample(self, prompts, params):
        (prompt,) = prompts
        (asked,) = params
        self.begun.append(int(prompt[0]))
        assert self.gates[int(prompt[0])].wait(SOON_S)
        if prompt[0] == 3:
            raise EngineDied("engine", got="its end", expected="life", hint="none")
        return [completion(0, s, [int(prompt[0])] * (2 + self.wrong * 5)) for s in range(asked.n)]

    def close(self):
        self.streams.close()


@pytest.fixture
def engine():
    held = Held()
    yield held
    for gate in held.gates.values():
        gate.set()
    held.close()


def test_completions_come_as_they_end_and_each_to_its_own_handle(engine):
    ended = []
    told = threading.Event()

    def note(handle):
        ended.append(int(handle.prompt[0]))
        told.set()

    first, second = engine.submit(PROMPTS[:2], [TWO, replace(TWO, n=1)], note)
    assert not first.done
    with pytest.raises(TimeoutError):
        first.result(0.01)
    engine.gates[2].set()
    assert told.wait(SOON_S)
    assert ended == [2]
    assert [np.frombuffer(c.token_ids, "<i4").tolist() for c in second.result(0)] == [[2, 2]]
    assert engine.drain(0.01) == 1
    engine.gates[1].set()
    assert len(first.result(SOON_S)) == 2
    assert engine.drain(SOON_S) == 0


def test_what_an_engine_gives_is_checked_and_its_death_is_the_handles(engine):
    engine.wrong = True
    wrong, dies = engine.submit([PROMPTS[0], PROMPTS[2]], [TWO] * 2)
    for gate in engine.gates.values():
        gate.set()
    with pytest.raises(EngineError, match="7 tokens, expected at most 3"):
        wrong.result(SOON_S)
    with pytest.raises(EngineDied):
        dies.result(SOON_S)
    assert engine.drain(SOON_S) == 0


def test_what_is_cancelled_before_it_began_ends_empty(engine):
    engine.at_once = 1
    running, waiting = engine.submit(PROMPTS[:2], [TWO] * 2)
    waiting.cancel()
    assert [(c.finish_reason, c.token_ids) for c in waiting.result(SOON_S)] == [("abort", b"")] * 2
    assert not running.done
    engine.gates[1].set()
    running.result(SOON_S)
    assert engine.begun == [1]


def test_what_breaks_an_engine_breaks_what_is_submitted_too(engine):
    class Late(Relay):
        def sample(self, prompts, params):
            return [replace(c, finish_reason="stop") for c in self.inner.sample(prompts, params)]

    engine.gates[1].set()
    (handle,) = Late(engine, "late").submit(PROMPTS[:1], [TWO])
    assert {c.finish_reason for c in handle.result(SOON_S)} == {"stop"}


@pytest.fixture(scope="module")
def transformers_engine(tiny_checkpoint, tmp_path_factory):
    from lockstep.engines.base import EngineSpec
    from lockstep.engines.transformers import TransformersEngine

    scratch = tmp_path_factory.mktemp("streaming")
    spec = EngineSpec(
        model_path=tiny_checkpoint, dtype="float32", head_dtype="float32", max_model_len=256, options={},
        weights_dir=scratch, log_path=scratch / "log",
    )  # fmt: skip
    engine = TransformersEngine(spec)
    yield engine
    engine.close()


def _wait_until_it_draws(engine):
    until = time.monotonic() + SOON_S
    while not engine.turns.busy:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_what_is_submitted_is_what_is_sampled(transformers_engine):
    params = [SamplingParams(max_tokens=6, n=2, seed=7 + row) for row in range(3)]
    sampled = transformers_engine.sample(PROMPTS, params)
    streamed = [h.result(SOON_S) for h in transformers_engine.submit(PROMPTS, params)]
    assert [c.token_ids for group in streamed for c in group] == [c.token_ids for c in sampled]
    assert [c.logprobs for group in streamed for c in group] == [c.logprobs for c in sampled]


def test_a_load_goes_before_requests_that_wait(transformers_engine):
    from safetensors.torch import save_file

    from lockstep.records.versions import WeightUpdate

    path = transformers_engine.weights_dir / "weights.safetensors"
    weights = transformers_engine.model.state_dict()
    save_file({"model.norm.weight": weights["model.norm.weight"].clone()}, path)
    long = SamplingParams(max_tokens=60, n=2, seed=1)
    handles = transformers_engine.submit([PROMPTS[0]] * 6, [long] * 6)
    _wait_until_it_draws(transformers_engine)
    transformers_engine.load(WeightUpdate(version=5, path=str(path)))
    spans = [c.version_spans[0].version for handle in handles for c in handle.result(60)]
    assert spans[0] == 0, "what was being drawn ends under the weights that it began with"
    assert spans[-1] == 5
    assert sorted(spans) == spans


def test_what_is_being_drawn_is_cancelled_with_what_there_is(transformers_engine):
    (handle,) = transformers_engine.submit(PROMPTS[:1], [SamplingParams(max_tokens=200, seed=1)])
    _wait_until_it_draws(transformers_engine)
    handle.cancel()
    (found,) = handle.result(SOON_S)
    assert found.finish_reason == "abort"
    assert len(found.token_ids) // 4 < 200
    assert isinstance(handle, Handle)


def _other_norm(engine, version, scale):
    from safetensors.torch import save_file

    from lockstep.records.versions import WeightUpdate

    path = engine.weights_dir / f"weights-{version}.safetensors"
    save_file({"model.norm.weight": engine.model.state_dict()["model.norm.weight"] * scale}, path)
    return WeightUpdate(version=version, path=str(path))


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_a_load_in_flight_comes_between_two_tokens_and_the_spans_say_where(transformers_engine, mode):
    engine = transformers_engine
    asked = SamplingParams(max_tokens=120, n=2, seed=3)
    version = engine.version
    (handle,) = engine.submit(PROMPTS[:1], [asked])
    _wait_until_it_draws(engine)
    receipt = engine.load(_other_norm(engine, version + 1, 1.5), mode)
    try:
        drawn = handle.result(SOON_S)
        assert receipt.cache_cleared == (mode == "recompute")
        for c in drawn:
            first, second = c.version_spans
            assert (first.version, second.version) == (version, version + 1)
            assert (first.start, first.stop, second.stop) == (0, second.start, 120)
            ids = np.frombuffer(c.token_ids, "<i4")
            numbers = np.frombuffer(c.logprobs, "<f4")
            assert len(ids) == len(numbers) == 120
            now = engine.score([np.r_[PROMPTS[0], ids]])[0]
            # A norm before the head moves no cache: either rule gives the new weights' numbers.
            assert (
                np.abs(now - numbers)[second.start :].max() < 1e-4 < np.abs(now - numbers)[: first.stop].max()
            )
    finally:
        engine.load(_other_norm(engine, version, 1 / 1.5))


def test_weights_change_where_nothing_is_drawn_too(transformers_engine):
    engine = transformers_engine
    version = transformers_engine.version
    engine.load(_other_norm(engine, version + 1, 1.0), "keep")
    (c,) = engine.sample(PROMPTS[:1], [SamplingParams(max_tokens=3)])
    assert [span.version for span in c.version_spans] == [version + 1]
