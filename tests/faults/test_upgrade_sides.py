"""What ``lockstep upgrade`` measures of an engine, on a real pair whose figures are known."""

import math

import numpy as np
from msgspec.structs import replace

from lockstep.diagnose.sides import at_update, observed, telling_temperature, untempered_nats
from lockstep.faults import proxies


class Raw(proxies.Proxy):
    """An engine that reports its numbers at T = 1, whatever it drew at."""

    def sample(self, prompts, params):
        done = self.inner.sample(prompts, params)
        drawn = [np.frombuffer(one.token_ids, np.int32) for one in done]
        scores = self.inner.score(
            [np.r_[p, ids].astype(np.int32) for p, ids in zip(prompts, drawn, strict=True)]
        )
        return [
            replace(one, logprobs=score[len(p) - 1 :].astype(np.float32).tobytes())
            for one, p, score in zip(done, prompts, scores, strict=True)
        ]


def test_an_honest_engine_is_seen_as_it_is(pair):
    side = observed(pair)
    assert side.engine.startswith("transformers")
    assert side.temperature == telling_temperature(pair.recipe) == 0.7
    assert side.n_tokens == 8 * 16
    assert abs(side.gap_mean_nats) < 1e-5
    assert side.gap_abs_nats["max"] < 1e-4
    assert side.decode_to_prefill_nats < 1e-4
    assert side.can["rescore_at_temperature"] == math.isfinite(side.prompt_temperature_nats)
    assert side.tokens_per_s > 0.0
    assert side.load_s >= 0.0


def test_raw_numbers_show_in_the_mean_at_a_telling_temperature_alone(pair):
    honest = pair.engine
    try:
        pair.engine = Raw(pair)
        side = observed(pair)
    finally:
        pair.engine = honest
    # Tokens drawn at T < 1 are likelier at T than the model's own number says.
    assert side.gap_mean_nats > 5.0 * side.gap_mean_error_nats > 0.0
    assert side.gap_abs_nats["max"] < 1e-4, "at T = 1 nothing shows"


def test_what_another_generation_leaves_out_is_not_measured_and_says_so(pair):
    *absent, in_flight = at_update(pair)
    assert [one.fault for one in absent] == ["stale_head", "stale_prefix_cache"]
    assert all(one.reason for one in absent)
    assert all(math.isnan(one.effect_nats) for one in absent)
    assert in_flight.fault == "in_flight_update"
    assert in_flight.effect_nats > 1e-2, "this engine, too, is updated while it draws"


def test_prompt_numbers_at_one_are_off_where_the_samplers_temperature_is_meant(pair):
    assert untempered_nats(pair) > 1e-3


def test_the_whole_way_on_a_real_pair_ends_in_a_recipe_and_its_certificate(recipe, tmp_path, monkeypatch):
    from lockstep.config.recipe import load_recipe, with_sets
    from lockstep.diagnose import upgrade as module
    from lockstep.runs.certificate import read_certificate

    # Two configurations of the embedded engine stand in for two versions: only the names are other.
    small = with_sets(recipe, ["parity.probe_prompts=4", "parity.probe_tokens=8", "parity.draw_tokens=128"])
    monkeypatch.setattr(module, "as_it_comes", lambda recipe, version: recipe)
    monkeypatch.setattr(module, "_final", lambda recipe, after, flags: with_sets(recipe, flags))
    said = []
    found = module.upgrade(small, "one", "other", tmp_path / "out", said.append)
    assert found.verdict == "PASS", found.steps
    assert found.steps[0].status == "PASS", "as it comes it is the same policy already"
    assert load_recipe(tmp_path / "out" / "recipe.toml").parity == small.parity
    assert len(read_certificate(tmp_path / "out" / "certificate.json").layers) == 5
    assert any("head in bf16" in line for line in said)
    head = next(one for one in found.differences if one.cause == "head_precision")
    assert head.effect_nats > 1e-5 or head.note == "not measured"
