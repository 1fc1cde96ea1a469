"""What every adapter passes through: completions other than those asked for are refused, from any engine."""

import json

import numpy as np
import pytest
from msgspec.structs import replace

from lockstep.engines.base import Engine, vocabulary_of
from lockstep.engines.logged import LoggedEngine
from lockstep.engines.registry import ADAPTERS, EMBEDDED, _named
from lockstep.errors import CapabilityError, EngineError
from lockstep.faults.relay import Relay
from lockstep.records.capabilities import Capability
from lockstep.records.tokens import SamplingParams, pack_ids, pack_logprobs
from lockstep.records.versions import VersionSpan
from tests.worker_that_lies import READY, completion

PROMPTS = [np.array([1, 2], np.int32), np.array([3], np.int32)]
ASKED = SamplingParams(max_tokens=3, n=2)
RIGHT = [completion(p, s, [5, 6, 96]) for p in range(2) for s in range(2)]


class Canned(Engine):
    """An adapter in this process that gives what it is told to."""

    def __init__(self, completions, vocabulary=97):
        self.ready = READY
        self.asked = {}
        self.vocabulary = vocabulary
        self.given = completions

    def _sample(self, prompts, params):
        return self.given

    def _score(self, sequences, temperature):
        raise NotImplementedError

    def load(self, update, mode="wait"):
        raise NotImplementedError

    def abort(self):
        return 0

    def close(self):
        pass


def test_what_was_asked_for_is_given_on_as_it_came():
    assert Canned(RIGHT).sample(PROMPTS, [ASKED] * 2) is RIGHT
    empty = [replace(c, token_ids=b"", logprobs=b"", finish_reason="abort", version_spans=()) for c in RIGHT]
    assert Canned(empty).sample(PROMPTS, [ASKED] * 2) is empty, "aborted at once"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (RIGHT[:3], "got 3 completions, expected 4"),
        (RIGHT[::-1], "completion 1 of prompt 1, expected completion 0 of prompt 0 in its place"),
        ([completion(0, 0, [5, 6, 97]), *RIGHT[1:]], "got token id 97, expected ids below 97"),
        ([completion(0, 0, [5, -1]), *RIGHT[1:]], "got token id -1, expected none below 0"),
        ([completion(0, 0, [5, 6, 7, 8]), *RIGHT[1:]], "4 tokens, expected at most 3"),
        (
            [replace(RIGHT[0], logprobs=pack_logprobs([-1.0])), *RIGHT[1:]],
            "12 bytes of ids, 4 of log-probabilities",
        ),
        (
            [replace(RIGHT[0], logprobs=pack_logprobs([-1.0, float("-inf"), -1.0])), *RIGHT[1:]],
            "an infinite log-probability",
        ),
        (
            [replace(RIGHT[0], logprobs=pack_logprobs([-1.0, None, -1.0])), *RIGHT[1:]],
            "row 0: 0 missing numbers, expected 1",
        ),
        ([replace(RIGHT[0], version_spans=(VersionSpan(0, 2, 0),)), *RIGHT[1:]], "versions of 2 tokens"),
        ([replace(RIGHT[0], token_ids=pack_ids([5, 6, 7])[:-1]), *RIGHT[1:]], "11 bytes of ids"),
    ],
)
def test_anything_else_is_refused_and_named(wrong, told):
    with pytest.raises(EngineError, match="engine fake 0, sample: ") as raised:
        Canned(wrong).sample(PROMPTS, [ASKED] * 2)
    assert told in str(raised.value)
    assert "the engine was ended" not in str(raised.value), "it is not a worker's reply"


EDITED = (
    {"seed": 7}, {"logit_bias": {3: 1.0}}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1},
    {"frequency_penalty": 0.1}, {"top_k": 5}, {"min_p": 0.1},
)  # fmt: skip
"""Settings that some engine has not; temperature, top-p and stop tokens have all."""


@pytest.mark.parametrize("setting", EDITED, ids=str)
@pytest.mark.parametrize("ask", [Engine.sample, Engine.submit])
def test_a_setting_that_the_engine_has_not_is_refused_before_it_is_sent(setting, ask):
    asked = replace(ASKED, **setting)
    (needed,) = asked.needs
    engine = Canned(RIGHT)
    assert engine.sample(PROMPTS, [asked] * 2) is RIGHT
    lacking = READY.capabilities | {needed: Capability(False, "it is none of its fields")}
    engine.ready = replace(READY, capabilities=lacking)
    assert engine.sample(PROMPTS, [ASKED] * 2) is RIGHT
    engine._sample = None  # not even called
    with pytest.raises(CapabilityError, match=f"fake 0, {needed}: got it is none of its fields"):
        ask(engine, PROMPTS, [ASKED, asked])


def test_an_id_is_not_bounded_where_no_vocabulary_is_known():
    far = [completion(0, 0, [5, 6, 150_000]), *RIGHT[1:]]
    assert Canned(far, vocabulary=None).sample(PROMPTS, [ASKED] * 2) is far


def test_no_adapter_goes_past_the_check():
    adapters = [*EMBEDDED.values(), *ADAPTERS.values()]
    classes = [LoggedEngine, *(_named(name) for name in adapters if not name.endswith(":connect"))]
    from lockstep.engines.openai_http import OpenAIHttpEngine

    for adapter in (*classes, OpenAIHttpEngine):
        assert adapter.sample is Engine.sample, adapter


def test_what_breaks_an_engine_on_purpose_is_not_checked_and_what_stands_behind_it_is():
    class Backwards(Relay):
        def sample(self, prompts, params):
            return self.inner.sample(prompts, params)[::-1]

    assert Backwards(Canned(RIGHT), "x").sample(PROMPTS, [ASKED] * 2) == RIGHT[::-1]
    with pytest.raises(EngineError):
        Backwards(Canned(RIGHT[::-1]), "x").sample(PROMPTS, [ASKED] * 2)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"vocab_size": 97}, 97),
        ({"text_config": {"vocab_size": 151_936}}, 151_936),
        ({"vocab_size": 32_000, "text_config": {"vocab_size": 32_064}}, 32_064),
        ({"hidden_size": 8}, None),
        ({"vocab_size": "many"}, None),
        (None, None),
    ],
)
def test_the_vocabulary_is_what_the_checkpoint_says(tmp_path, config, found):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert vocabulary_of(tmp_path) == found
