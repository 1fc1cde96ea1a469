"""What a vLLM is asked about itself, on stand-ins for releases of it."""

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import pytest

from lockstep.engines.worker import vllm_asked as asked
from lockstep.engines.worker.server import BadRequestError


@dataclasses.dataclass
class AsyncEngineArgs:
    """What one release knows."""

    logprobs_mode: str = ""
    distributed_executor_backend: str = ""


class SamplingParams:
    """What one release's requests have."""

    __struct_fields__ = ("temperature", "logprobs")


@pytest.fixture(autouse=True)
def release(monkeypatch):
    """A release, and nothing of the real one."""
    vllm, engine, arg_utils = (ModuleType(name) for name in ("vllm", "vllm.engine", "vllm.engine.arg_utils"))
    arg_utils.AsyncEngineArgs = AsyncEngineArgs
    vllm.SamplingParams = SamplingParams
    for module in (vllm, engine, arg_utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_default_of_ours_that_a_version_does_not_know_is_left_out_and_no_option_of_a_recipe_is():
    args = {"logprobs_mode": "processed_logprobs", "async_scheduling": False}
    assert asked.options(args, ["async_scheduling"]) == {"logprobs_mode": "processed_logprobs"}
    with pytest.raises(BadRequestError) as error:
        asked.options({"logprob_mode": "raw_logprobs"}, [])
    assert error.value.args[:2] == (
        "engine.options.logprob_mode, which is no engine argument",
        "'logprobs_mode' perhaps",
    )


@pytest.mark.parametrize(
    ("path", "ours", "taken"),
    [
        ("json.decoder.JSONDecoder", True, True),
        ("vllm.v1.executor.gone.UniProcExecutor", True, False),
        ("no_such_package.executor.Executor", True, False),
        ("vllm.v1.executor.gone.UniProcExecutor", False, True),
    ],
)
def test_our_executor_is_left_out_where_it_lies_elsewhere_and_a_recipes_never(path, ours, taken):
    ours = [asked.EXECUTOR] if ours else []
    assert (asked.EXECUTOR in asked.options({asked.EXECUTOR: path}, ours)) == taken


def test_a_requests_field_is_left_out_only_where_it_changes_no_number():
    fields = {"temperature": 0.7, "flat_logprobs": True, "new_field": 1}
    assert asked.request_fields(fields, ["flat_logprobs"]) == {"temperature": 0.7, "new_field": 1}


class Nothing:
    """0.10: no pause."""


class Flag:
    """0.14: requests end first, or are ended."""

    def pause_generation(self, *, wait_for_inflight_requests=False, clear_cache=True): ...


class Mode:
    """0.18: abort, wait or keep."""

    def pause_generation(self, *, mode="abort", clear_cache=True): ...


@pytest.mark.parametrize(("llm", "how"), [(Nothing, "none"), (Flag, "flag"), (Mode, "mode")])
def test_how_generation_is_paused_is_seen_on_the_engine(llm, how):
    assert asked.pause_of(llm()) == how


def test_only_the_keyword_arguments_that_a_function_has_are_given_to_it():
    assert asked.taking(lambda a, b: None, a=1, c=2) == {"a": 1}


def test_an_engine_from_before_the_choice_of_a_mode_reports_raw_numbers():
    config = SimpleNamespace(model_config=SimpleNamespace())
    assert asked.logprobs_mode(config) == "raw_logprobs"
    config.model_config.logprobs_mode = SimpleNamespace(value="processed_logprobs")
    assert asked.logprobs_mode(config) == "processed_logprobs"


def test_a_reload_takes_tensors_only_where_its_signature_says_so():
    takes = SimpleNamespace(reload_weights=lambda weights_iterator=None: None)
    reads = SimpleNamespace(reload_weights=lambda: None)
    assert [asked.takes_an_iterator(one) for one in (takes, reads, SimpleNamespace())] == [True, False, False]
