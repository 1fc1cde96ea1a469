"""``lockstep upgrade`` without engines: flags one by one, what differs, and the recipe that is written."""

import math

import pytest

from lockstep.config.recipe import Recipe, load_recipe, parse_recipe, with_sets
from lockstep.config.written import toml_of
from lockstep.diagnose import upgrade as module
from lockstep.diagnose.changes import TOPICS
from lockstep.diagnose.sides import FirstRun, Left, Side, telling_temperature
from lockstep.diagnose.upgrade import RECIPE, Step, settings, upgrade
from lockstep.engines.audit import KnobRow
from lockstep.records.verdicts import LAYERS, Finding, Verdict

TABLE = {
    "model": {"path": "m"},
    "engine": {"name": "vllm", "version": "0.32.0", "options": {"enforce_eager": True}},
    "task": {"name": "t", "options": {"operators": ["+"], 'a "key"': 1}},
    "sampling": {"max_tokens": 4, "temperature": 0.7},
    "training": {"steps": 1},
    "objective": {"clip_high": math.inf},
}
PROCESSED = 'engine.options.logprobs_mode = "processed_logprobs"'
NO_CACHE = "engine.options.enable_prefix_caching = false"


def side(engine, mode, gap, *, tempered, cache):
    can = {"rescore": True, "rescore_at_temperature": tempered, "pause_keep": not tempered, "load": True}
    rows = (
        KnobRow(
            "log-probability mode", "-", mode, "-", "change" if "raw" in mode else "ok", "why", PROCESSED
        ),
        KnobRow(
            "prefix cache",
            "-",
            cache,
            "off",
            "watch" if cache == "True" else "ok",
            "no update clears it",
            NO_CACHE,
        ),
        KnobRow("head precision", "-", "torch.float32", "-", "ok", "why", 'engine.head_dtype = "float32"'),
        KnobRow("KV cache dtype", "-", "auto", "-", "ok", "why", "x"),
    )
    return Side(
        engine=engine,
        generation="V0" if tempered else "V1",
        temperature=0.7,
        n_tokens=512,
        gap_mean_nats=gap,
        gap_mean_error_nats=0.005,
        gap_abs_nats={"p50": 1e-5, "p999": 5e-5, "max": 6e-5},
        decode_to_prefill_nats=2e-5,
        prompt_temperature_nats=1e-7 if tempered else float("nan"),
        tokens_per_s=100.0,
        load_s=0.3,
        can=can,
        how=dict.fromkeys(can, "so"),
        resolved={"a": engine, "same": "1"},
        rows=rows,
    )


OLD = side("vllm 0.8.5 (V0)", "None", 1e-7, tempered=True, cache="False")
NEW = side("vllm 0.18.1 (V1)", "raw_logprobs", -0.146, tempered=False, cache="True")


def ladder(cause="", fix="", layer="semantics"):
    if not cause:
        return [Verdict(layer=layer, status="PASS", summary="holds", n_tokens=9) for layer in LAYERS]
    found = Finding(cause=cause, effect_nats=0.35, ci95=(0.3, 0.4), n_tokens=9, fix=fix, evidence="x")
    return [Verdict.failed(layer, "fails", found)]


class Engines:
    """A bench that has the figures, and notes what it was asked to run."""

    def __init__(self, first, climbs, final="PASS"):
        self.first = first
        self.climbs = list(climbs)
        self.final = final
        self.ran = []

    def run(self, recipe, what, work, *, breakable=False):
        self.ran.append((what, recipe, breakable))
        if "own weight update" in what:
            return self.first
        if "the check of the recipe" in what:
            return Step(
                flags=(), status=self.final, layer="", cause="", effect_nats=math.nan, ci95=(0, 0), fix=""
            )
        return self.climbs.pop(0) if "as it comes" not in what and "head in bf16" not in what else OLD


@pytest.fixture(autouse=True)
def no_environments(monkeypatch):
    monkeypatch.setattr(
        module, "as_it_comes", lambda recipe, version: with_sets(recipe, [f"engine.version={version}"])
    )


def first(verdicts):
    head = Left(fault="stale_head", what="no re-pack", reason="no packed copy is kept here")
    cache = Left(
        fault="stale_prefix_cache",
        what="no reset",
        how="planted, and scored",
        effect_nats=0.09,
        ci95=(0.05, 0.12),
        fix=NO_CACHE,
    )
    pause = Left(fault="in_flight_update", what="no pause", how="6 spanned one", effect_nats=0.03, fix="wait")
    return FirstRun(NEW, [head, cache, pause], 0.41, verdicts)


def gone(tmp_path, engines):
    recipe = parse_recipe(TABLE, "test")
    return upgrade(recipe, "0.8.5", "0.18.1", tmp_path, lambda text: None, engines)


def test_flags_are_set_one_by_one_as_the_failing_layers_name_them(tmp_path):
    engines = Engines(
        first(ladder("raw_logprobs", PROCESSED)),
        [ladder("stale_prefix_cache", NO_CACHE, "weights"), ladder()],
    )
    found = gone(tmp_path, engines)
    assert [step.flags for step in found.steps[:-1]] == [
        (),
        ("engine.options.logprobs_mode=processed_logprobs",),
        ("engine.options.logprobs_mode=processed_logprobs", "engine.options.enable_prefix_caching=false"),
    ]
    assert [step.cause for step in found.steps[:-1]] == ["raw_logprobs", "stale_prefix_cache", ""]
    assert found.summary.startswith(
        "same with these flags: --set engine.options.logprobs_mode=processed_logprobs"
    )
    assert [breakable for _, _, breakable in engines.ran] == [False, True, False, False, False, False]


def test_the_written_recipe_is_the_one_that_was_checked(tmp_path):
    engines = Engines(first(ladder("raw_logprobs", PROCESSED)), [ladder()])
    found = gone(tmp_path, engines)
    checked = next(recipe for what, recipe, _ in engines.ran if "the check of the recipe" in what)
    assert found.recipe == str(tmp_path / RECIPE)
    assert load_recipe(tmp_path / RECIPE) == checked
    assert checked.engine.version == "0.18.1"
    pinned = {"logprobs_mode": "processed_logprobs", "enable_prefix_caching": False}
    assert checked.engine.options == pinned, "options of another version are not taken over"
    assert "set by lockstep upgrade" in (tmp_path / RECIPE).read_text()


def test_what_no_flag_mends_is_not_the_same_and_leaves_no_recipe(tmp_path):
    engines = Engines(first(ladder("draws_differ", "look at the sampler")), [], final="FAIL")
    found = gone(tmp_path, engines)
    assert found.verdict == "FAIL"
    assert found.summary.startswith("not the same")
    assert found.recipe == ""
    assert not (tmp_path / RECIPE).exists()


def test_each_difference_has_effect_cause_and_flag_and_topics_are_in_order(tmp_path):
    found = gone(tmp_path, Engines(first(ladder("raw_logprobs", PROCESSED)), [ladder()])).differences
    assert [TOPICS.index(one.topic) for one in found] == sorted(TOPICS.index(one.topic) for one in found)
    by = {one.what: one for one in found}
    mode = by["log-probabilities of sampled tokens, at T = 0.7"]
    assert (mode.effect_nats, mode.cause, mode.flag) == (-0.146, "raw_logprobs", PROCESSED)
    assert mode.ci95 == pytest.approx((-0.1558, -0.1362), abs=1e-4)
    prompts = by["prompt log-probabilities"]
    assert (prompts.effect_nats, prompts.before) == (0.41, "tempered by the request's T")
    assert (by["no reset"].effect_nats, by["no reset"].before) == (
        0.09,
        "a V0 engine has nothing of the kind",
    )
    assert (by["no pause"].effect_nats, by["no pause"].before, by["no pause"].flag) == (0.03, "so", "wait")
    assert (by["no re-pack"].note, math.isnan(by["no re-pack"].effect_nats)) == ("not measured here", True)
    assert by["prefix cache"].flag == NO_CACHE
    assert "KV cache dtype" not in by, "what is as before and as it should be is left out"
    assert by["a load can hold requests in flight and go on with them"].after == "yes: so"


@pytest.mark.parametrize(
    ("fix", "flags"),
    [
        (PROCESSED, ["engine.options.logprobs_mode=processed_logprobs"]),
        (
            'engine.head_dtype = "float32" with model.head_dtype = "float32"',
            ["engine.head_dtype=float32", "model.head_dtype=float32"],
        ),
        ("sampling.top_p = 1.0, sampling.top_k = 0", ["sampling.top_p=1.0", "sampling.top_k=0"]),
        ("engine.dtype = model.dtype", []),
        ("VLLM_USE_FLASHINFER_SAMPLER=0", []),
    ],
)
def test_a_fix_that_people_read_is_carried_out_where_it_is_an_assignment(fix, flags):
    assert settings(fix) == flags


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["engine.options={a=true, b=[1, 2], c={d=1.5}}", "sampling.stop_token_ids=[3]"],
        [
            'task.system_prompt="quo\\"te\\n\\u0007 \\u00fc"',
            "optimizer.lr=1e-7",
            "sampling.logit_bias={7=-1.5}",
        ],
    ],
)
def test_a_recipe_that_is_written_is_the_recipe_that_is_read(sets, tmp_path):
    recipe = with_sets(parse_recipe(TABLE, "test"), sets)
    (tmp_path / "r.toml").write_text(toml_of(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "r.toml") == recipe


def test_raw_and_tempered_are_told_apart_where_the_recipes_own_temperature_tells_nothing():
    recipe: Recipe = parse_recipe(TABLE, "test")
    assert telling_temperature(recipe) == 0.7
    assert telling_temperature(with_sets(recipe, ["sampling.temperature=1.0"])) == 0.7
    assert telling_temperature(with_sets(recipe, ["sampling.temperature=1.3"])) == 1.3


def test_its_report_says_the_verdict_and_each_difference(tmp_path):
    from lockstep.report.of_documents import of_document
    from lockstep.runs.strict import plain

    found = gone(tmp_path, Engines(first(ladder("raw_logprobs", PROCESSED)), [ladder()]))
    report = of_document({"schema": "lockstep.upgrade/1", **plain({"upgrade": found})}, "upgrade.json")
    assert (report.kind, report.status) == ("upgrade", "PASS")
    assert report.words[0].startswith("vllm 0.8.5 (V0) → vllm 0.18.1 (V1): same with these flags")
    assert any("-0.1460 nats (mean of trainer − engine)" in sentence for sentence in report.words)
    rows = [row for table in report.sections[0].tables for row in table.rows]
    assert len(rows) == len(found.differences)
    assert [row[0] for row in report.sections[1].tables[0].rows] == ["FAIL", "PASS", "PASS"]
