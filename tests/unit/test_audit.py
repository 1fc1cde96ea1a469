"""The audit's verdicts, from resolved configurations as engines give them."""

from types import SimpleNamespace

import pytest

from lockstep.config.recipe import Model, Recipe, TaskConfig, Training
from lockstep.engines.audit import audit
from lockstep.engines.base import EngineFacts
from lockstep.engines.registry import checklist
from lockstep.records.capabilities import Capability
from lockstep.records.tokens import SamplingParams

GOOD = {
    "worker.logprobs_mode": "processed_logprobs",
    "cache_config.enable_prefix_caching": False,
    "scheduler_config.async_scheduling": False,
    "scheduler_config.enable_chunked_prefill": False,
    "scheduler_config.max_num_batched_tokens": 2048,
    "scheduler_config.max_num_seqs": 128,
    "model_config.disable_cascade_attn": True,
    "model_config.generation_config": "vllm",
    "worker.parameter_dtype": "torch.float32",
    "model_config.seed": 0,
    "worker.flashinfer_sampler": False,
    "worker.model_runner": "vllm.v1.worker.cpu_model_runner",
    "worker.head_dtype": "torch.float32",
    "cache_config.cache_dtype": "auto",
    "cache_config.mamba_ssm_cache_dtype": "auto",
}


FACTS = EngineFacts(since={"async scheduling": "0.18.1", "prefix cache": ""})


def rows_of(resolved, *, tells=True, version="0.18.1", **sampling):
    recipe = Recipe(
        model=Model(path="m"),
        task=TaskConfig(name="t"),
        training=Training(steps=1),
        sampling=SamplingParams(max_tokens=4, **sampling),
    )
    can = {"resolved_config": Capability(tells, "because")}
    ready = SimpleNamespace(resolved=resolved, capabilities=can, version=version)
    engine = SimpleNamespace(ready=ready, asked={"seed": 0}, facts=FACTS)
    return {row.knob: row for row in audit(engine, recipe, checklist(), "0.8.5")}


def test_every_knob_knows_every_versions_default():
    known = checklist()
    assert all(set(knob.defaults) == set(known.versions) for knob in known.knobs)
    assert len(known.knobs) >= 15


def test_an_adapter_speaks_of_knobs_that_there_are():
    from lockstep.engines import transformers
    from lockstep.engines.vllm.v1 import VllmV1

    named = {knob.name for knob in checklist().knobs}
    assert set(VllmV1.facts.since) < named
    assert set(transformers.FACTS.since) < named


def test_a_good_configuration_needs_nothing():
    rows = rows_of(GOOD, temperature=0.7)
    assert {row.verdict for row in rows.values()} == {"ok"}
    assert rows["seed"].asked == "0"
    assert rows["log-probability mode"].before.startswith("processed")


@pytest.mark.parametrize(
    ("knob", "key", "value", "verdict"),
    [
        ("log-probability mode", "worker.logprobs_mode", "raw_logprobs", "change"),
        ("prefix cache", "cache_config.enable_prefix_caching", True, "watch"),
        ("async scheduling", "scheduler_config.async_scheduling", True, "watch"),
        ("chunked prefill", "scheduler_config.enable_chunked_prefill", True, "watch"),
        ("cascade attention", "model_config.disable_cascade_attn", False, "change"),
        ("generation_config", "model_config.generation_config", "auto", "change"),
        ("dtype", "worker.parameter_dtype", "torch.float16", "change"),
        ("seed", "model_config.seed", None, "watch"),
        ("sampler kernel", "worker.flashinfer_sampler", True, "change"),
        ("model runner", "worker.model_runner", "vllm.v1.worker.gpu.model_runner", "watch"),
        ("head precision", "worker.head_dtype", "torch.bfloat16", "change"),
        ("KV cache dtype", "cache_config.cache_dtype", "fp8_e4m3", "change"),
        ("recurrent-state dtype", "cache_config.mamba_ssm_cache_dtype", "bfloat16", "watch"),
    ],
)
def test_each_knob_is_seen_when_it_alone_is_off(knob, key, value, verdict):
    rows = rows_of(GOOD | {key: value}, temperature=0.7)
    assert rows.pop(knob).verdict == verdict
    assert {row.verdict for row in rows.values()} == {"ok"}


def test_raw_is_what_it_should_be_at_temperature_1_only():
    raw = GOOD | {"worker.logprobs_mode": "raw_logprobs"}
    assert rows_of(raw)["log-probability mode"].verdict == "watch"
    assert rows_of(raw, top_p=0.9)["log-probability mode"].verdict == "change"


def test_what_an_engine_does_not_tell_is_unknown_and_not_ok():
    rows = rows_of({"measured.logprobs_mode": "processed_logprobs"}, tells=False)
    assert rows["log-probability mode"].verdict == "ok"
    assert rows["generation_config"].verdict == "unknown"


@pytest.mark.parametrize(
    ("key", "version", "verdict"),
    [
        ("scheduler_config.async_scheduling", "0.8.5.post2", "ok"),
        ("scheduler_config.async_scheduling", "0.18.1", "unknown"),
        ("scheduler_config.async_scheduling", "0.33.0", "unknown"),
        ("cache_config.enable_prefix_caching", "0.18.1", "ok"),
        ("cache_config.cache_dtype", "0.8.5", "unknown"),
    ],
)
def test_a_setting_that_is_absent_is_none_only_where_the_adapter_says_so(key, version, verdict):
    """One that a version has renamed would else be ok, unseen."""
    rows = rows_of({name: value for name, value in GOOD.items() if name != key}, version=version)
    (absent,) = (row for row in rows.values() if row.resolved == "-")
    assert absent.verdict == verdict
