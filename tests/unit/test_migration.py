"""The migration's experiment: what its arms differ in, how it goes on, and what its page says of files."""

import dataclasses
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from lockstep.config.recipe import load_recipe
from lockstep.errors import UsageError
from lockstep.objectives.corrections.registry import refuse_correction
from lockstep.objectives.registry import refuse_objective
from lockstep.records.messages import Ready
from lockstep.records.verdicts import BeforeStep, Finding, Verdict
from lockstep.report.arms import read_arms
from lockstep.report.compare import compare
from lockstep.runs.layout import RunLayout, new_run
from lockstep.runs.manifest import build_manifest, write_manifest
from lockstep.runs.record import open_recorder

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart.toml"
READY = Ready(
    engine="vllm",
    version="0.18.1",
    generation="V1",
    distribution="sampler",
    resolved={},
    capabilities={},
    start_s=1.0,
)
RAW = {"engine.options.logprobs_mode"}
RUNTIME = {"engine.options.enable_prefix_caching", "engine.options.generation_config"}
UPDATES = {"rollout.update"}
HEAD = {"engine.head_dtype"}
BROKEN = RAW | RUNTIME | UPDATES | {"parity.override"}
CORRECTED = BROKEN | {"objective.correction", "objective.old_logprobs"}


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import migration
        import migration_arms
        import migration_claims
        import migration_page
        import migration_results

        modules = {"arms": migration_arms, "claims": migration_claims, "page": migration_page}
        yield SimpleNamespace(run=migration, results=migration_results, **modules)


def recipe_of(benchmarks, name):
    form = benchmarks.arms.FULL
    run = next(run for run in benchmarks.arms.planned(form) if run.name == f"{name}-0")
    return load_recipe(RECIPE, list(run.sets))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    parts = [flat(part, f"{prefix}.{key}" if prefix else key) for key, part in value.items()]
    return {key: item for part in parts for key, item in part.items()}


def differing(a, b) -> set[str]:
    one, other = (flat(msgspec.to_builtins(recipe)) for recipe in (a, b))
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


@pytest.mark.parametrize(
    ("name", "green", "keys", "planted"),
    [
        ("v1-defaults", "v1-all", BROKEN, ("keep_cache",)),
        ("v1-logprobs", "v1-all", BROKEN - RAW, ("keep_cache",)),
        ("v1-runtime", "v1-all", BROKEN - RUNTIME, ("keep_cache",)),
        ("v1-updates", "v1-all", BROKEN - UPDATES, ()),
        ("tis", "v1-all", CORRECTED, ("keep_cache",)),
        ("masked-is", "v1-all", CORRECTED, ("keep_cache",)),
        ("geometric", "v1-all", CORRECTED, ("keep_cache",)),
        ("bf16-no-head", "bf16-all", HEAD | {"parity.override"}, ()),
        ("bf16-head", "bf16-all", BROKEN, ("keep_cache",)),
        ("bf16-defaults", "bf16-all", BROKEN | HEAD, ("keep_cache",)),
    ],
)
def test_an_arm_is_the_fixed_one_less_what_its_name_says(benchmarks, name, green, keys, planted):
    assert differing(recipe_of(benchmarks, name), recipe_of(benchmarks, green)) == keys
    assert benchmarks.arms.ARMS[name].plants == planted


def test_the_reference_differs_in_engine_options_and_update_alone(benchmarks):
    keys = differing(recipe_of(benchmarks, "v0"), recipe_of(benchmarks, "v1-all"))
    assert {key for key in keys if not key.startswith("engine.options.")} == {
        "engine.version",
        "rollout.update",
    }


@pytest.mark.parametrize("name", ["v0", "v1-all", "bf16-all"])
def test_reference_and_fixed_arms_must_pass_the_ladder(benchmarks, name):
    assert not recipe_of(benchmarks, name).parity.override
    assert not benchmarks.arms.ARMS[name].plants


def test_every_run_of_either_form_is_one_that_train_takes(benchmarks):
    for form in (benchmarks.arms.FULL, benchmarks.arms.SHORT):
        for run in benchmarks.arms.planned(form):
            recipe = load_recipe(RECIPE, list(run.sets))
            refuse_objective(recipe.objective)
            refuse_correction(recipe.objective)
            assert recipe.training.seed == run.seed
            told = recipe.sampling.temperature, recipe.loop.kind, recipe.objective.name
            assert told == (0.7, "in_flight", "gspo")


def test_the_full_form_has_three_seeds_and_the_short_one_fits_into_a_quarter_of_an_hour(benchmarks):
    full = benchmarks.arms.planned(benchmarks.arms.FULL)
    short = benchmarks.arms.planned(benchmarks.arms.SHORT)
    assert {run.arm.name for run in full} == set(benchmarks.arms.ARMS)
    assert len(full) == 3 * len(benchmarks.arms.ARMS)
    assert benchmarks.run.left_s(short, {}) <= 15 * 60


def test_a_later_set_of_the_users_wins(benchmarks):
    run = benchmarks.arms.planned(benchmarks.arms.SHORT, ["training.steps=3"])[0]
    assert load_recipe(RECIPE, list(run.sets)).training.steps == 3


class Trainer:
    """Stands in for ``lockstep train``: makes the run's files, and ends as it is told."""

    def __init__(self, out: Path, codes: dict[str, list[int]] | None = None, figures=None) -> None:
        self.out = out
        self.codes = codes or {}
        self.figures = figures or (lambda name, step: {})
        self.commands: list[list[str]] = []

    def __call__(self, arguments: list[str], log: Path, say) -> int:
        self.commands.append(arguments)
        root = Path(arguments[2] if arguments[1] == "--resume" else arguments[3])
        if arguments[1] != "--resume":
            sets = [text for flag, text in pairwise(arguments) if flag == "--set"]
            self._begin(root, load_recipe(RECIPE, sets), arguments)
        code = self.codes.get(root.name, []).pop(0) if self.codes.get(root.name) else 0
        log.parent.mkdir(exist_ok=True)
        error = {"type": "ParityError", "boundary": f"rollouts in {root}", "got": "a gap of 3 nats"}
        Path(f"{log}.json").write_text(json.dumps({"error": error}) if code == 1 else "")
        return code

    def _begin(self, root: Path, recipe, arguments: list[str]) -> None:
        layout = new_run(root)
        plants = tuple(text for flag, text in pairwise(arguments) if flag == "--plant")
        told = {"resolved": ("vllm", "0.18.1"), "model": {}, "planted": plants}
        write_manifest(layout.manifest, build_manifest(recipe, READY, {}, Path("model"), **told))
        recorder = open_recorder(layout)
        for verdict in ladder(broken=bool(recipe.parity.override)):
            recorder.verdict(BeforeStep(0), verdict)
        for step in range(recipe.training.steps):
            recorder.step(step, step + 1, self.figures(root.name, step))
        layout.checkpoint(recipe.training.steps).mkdir(parents=True)


def ladder(*, broken: bool) -> list[Verdict]:
    if not broken:
        return [Verdict(layer="semantics", status="PASS", summary="agrees", n_tokens=9)]
    cause = Finding(
        cause="raw_logprobs", effect_nats=0.321, ci95=(0.3, 0.4), n_tokens=9, fix="a = 1", evidence="seen"
    )
    return [Verdict.failed("semantics", "raw", cause)]


def test_what_has_ended_is_kept_and_a_half_run_goes_on(benchmarks, tmp_path):
    plan = benchmarks.arms.planned(benchmarks.arms.SHORT)
    trainer = Trainer(tmp_path, {"v1-defaults-0": [3], "v1-all-0": [1]})
    first = benchmarks.run.run_all(plan, tmp_path, [].append, trainer)
    assert {name: outcome.status for name, outcome in first.items()} == {
        "v0-0": "finished",
        "v1-defaults-0": "failed",
        "v1-all-0": "refused",
        "tis-0": "finished",
    }
    assert first["v1-all-0"].reason == "ParityError, rollouts in DIR/v1-all-0: a gap of 3 nats"
    assert not RunLayout(tmp_path / "v0-0").checkpoints.exists(), "gigabytes a run"
    assert RunLayout(tmp_path / "v1-defaults-0").checkpoints.exists(), "what goes on needs its own"

    again = Trainer(tmp_path)
    second = benchmarks.run.run_all(plan, tmp_path, [].append, again)
    (command,) = again.commands
    assert command == [
        "train",
        "--resume",
        str(tmp_path / "v1-defaults-0"),
        "--plant",
        "keep_cache",
        "--json",
    ]
    assert second["v1-defaults-0"].status == "finished"
    assert second["v1-defaults-0"].starts == 2
    assert second["v1-all-0"] == first["v1-all-0"]


def test_a_run_that_was_killed_before_its_outcome_was_written_goes_on(benchmarks, tmp_path):
    plan = benchmarks.arms.planned(benchmarks.arms.SHORT)[:1]
    benchmarks.run.run_all(plan, tmp_path, [].append, Trainer(tmp_path))
    (tmp_path / "v0-0.json").unlink()
    again = Trainer(tmp_path)
    benchmarks.run.run_all(plan, tmp_path, [].append, again)
    assert [command[:2] for command in again.commands] == [["train", "--resume"]]


def test_a_seeds_arms_are_together(benchmarks):
    names = [run.name for run in benchmarks.arms.planned(benchmarks.arms.FULL)]
    assert [int(name[-1]) for name in names] == sorted(int(name[-1]) for name in names)


def test_runs_of_another_recipe_are_no_seeds_of_this_one(benchmarks, tmp_path):
    benchmarks.run.run_all(
        benchmarks.arms.planned(benchmarks.arms.SHORT)[:1], tmp_path, [].append, Trainer(tmp_path)
    )
    other = benchmarks.arms.planned(benchmarks.arms.SHORT, ["optimizer.lr=1e-4"])
    with pytest.raises(UsageError, match="another recipe"):
        benchmarks.run.run_all(other, tmp_path, [].append, Trainer(tmp_path))


def test_what_is_left_is_told_by_what_is_done(benchmarks):
    plan = benchmarks.arms.planned(benchmarks.arms.SHORT)
    assert benchmarks.run.told_left(plan, {}).endswith("a guess")
    done = benchmarks.run.RunOutcome(
        arm="v0", seed=0, status="finished", exit_code=0, reason="", seconds=100.0, starts=1
    )
    assert benchmarks.run.left_s(plan, {"v0-0": done}) == pytest.approx(300.0)
    refused = msgspec.structs.replace(done, status="refused", seconds=5.0)
    assert benchmarks.run.left_s(plan, {"v0-0": done, "tis-0": refused}) == pytest.approx(200.0)


def test_an_error_of_the_command_itself_is_the_reason(benchmarks, tmp_path, monkeypatch):
    log = tmp_path / "logs" / "v0-0"
    monkeypatch.setattr(benchmarks.run, "TOLD", ("no manifest.json",))
    told: list[str] = []
    code = benchmarks.run.started(["train", "--resume", str(tmp_path / "none"), "--json"], log, told.append)
    assert len(told) == 1, "its talk is passed on, a line once"
    reason = benchmarks.run.reason_of(log, code, tmp_path)
    assert code == 2
    assert reason.startswith("UsageError, run directory DIR/none")


LEVELS = {"v0": 0.05, "v1-defaults": 0.5, "v1-all": 0.05, "tis": 0.06}


def made_up(name: str, step: int) -> dict[str, float]:
    """Clip rate and KL of the broken arm lie far from the reference's; the rest scatters about one level."""
    arm, _, seed = name.rpartition("-")
    scatter = (int(seed) - 1) * 0.01 + step * 0.001
    return {
        "clip_fraction": LEVELS[arm] + scatter,
        "policy_kl_k3_nats": LEVELS[arm] / 10.0 + scatter / 10.0,
        "entropy_mean_nats": 1.0 + scatter + (0.005 if arm == "tis" else 0.0),
        "reward_mean": 0.4 + scatter,
        "policy_ratio_mean": 1.0 + (0.2 if arm == "v1-defaults" else 0.0) + scatter / 10.0,
        "mismatch_ratio_mean": 1.0 + scatter / 10.0,
        "gap_abs_mean_nats": LEVELS[arm],
        "gap_abs_max_nats": 7e-5,
        "mismatch_kl_k3_nats": LEVELS[arm] ** 2 + scatter / 10.0,
    }


def results(benchmarks, out: Path, seeds, codes=None) -> dict[str, Any]:
    form = dataclasses.replace(benchmarks.arms.SHORT, seeds=seeds)
    plan = benchmarks.arms.planned(form)
    outcomes = benchmarks.run.run_all(plan, out, [].append, Trainer(out, codes, made_up))
    return benchmarks.results.document(form, plan, outcomes, out)


def test_the_verdicts_are_those_of_compare_on_the_same_files(benchmarks, tmp_path):
    found = results(benchmarks, tmp_path, (0, 1, 2))
    words = [
        f"{arm}={','.join(str(tmp_path / f'{arm}-{seed}') for seed in (0, 1, 2))}"
        for arm in ("v0", "v1-defaults", "v1-all")
    ]
    own = compare(read_arms(words, {}), benchmarks.results.STORY)
    for against in own.against:
        said = benchmarks.claims.against_of(found, against.name, "story")
        for figure in against.figures:
            row = next(row for row in said["figures"] if row["name"] == figure.name)
            assert (row["verdict"], row["difference"]) == (figure.verdict, figure.difference)
    outcomes = {claim.arm: claim.outcome for claim in benchmarks.claims.found(found)}
    assert outcomes["v1-defaults"] == "reproduced"
    assert outcomes["v1-all"] == "reproduced", "all values are the reference's own"


def test_the_page_has_the_files_numbers(benchmarks, tmp_path):
    found = results(benchmarks, tmp_path / "runs", (0, 1, 2))
    places = benchmarks.page.Places(tmp_path / "d.json", tmp_path / "page.md", tmp_path / "page.svg")
    benchmarks.page.write(found, places)
    text = places.page.read_text()

    def mean(name: str) -> str:
        seeds = [[made_up(f"v1-defaults-{seed}", step)[name] for step in range(8)] for seed in (0, 1, 2)]
        return f"{fmean(map(fmean, seeds)):.3g} ["

    own = next(line for line in text.splitlines() if line.startswith("| `v1-defaults` | 3 |"))
    cells = own.split(" | ")
    assert cells[2].startswith(mean("clip_fraction"))
    assert cells[3].startswith(mean("policy_kl_k3_nats"))
    assert cells[8].startswith(mean("gap_abs_mean_nats"))
    assert "| `v1-defaults` | semantics | FAIL raw logprobs | 0.321 (0.3 to 0.4) | `a = 1` |" in text
    assert "agree to 7e-05 nats" in text, "the largest gap of the fixed runs"
    picture = places.picture.read_text()
    assert ElementTree.fromstring(picture).tag.endswith("}svg")
    assert all(f">{name}</text>" in picture for name in ("v0", "v1-defaults", "v1-all", "tis"))
    assert json.loads(places.document.read_text()) == found


def test_the_page_is_made_again_of_its_document_alone(benchmarks, tmp_path):
    found = results(benchmarks, tmp_path / "runs", (0, 1))
    places = benchmarks.page.Places(tmp_path / "d.json", tmp_path / "page.md", tmp_path / "page.svg")
    benchmarks.page.write(found, places)
    again = json.loads(places.document.read_text())
    assert benchmarks.page.page(again, places) == places.page.read_text()


def test_nothing_says_where_it_was_made(benchmarks, tmp_path):
    found = results(benchmarks, tmp_path, (0,), {"v1-all-0": [1]})
    places = benchmarks.page.Places(tmp_path / "d.json", tmp_path / "page.md", tmp_path / "page.svg")
    benchmarks.page.write(found, places)
    for path in dataclasses.astuple(places):
        text = path.read_text()
        assert str(tmp_path) not in text
        assert str(Path.home()) not in text
        assert not re.search(r"(?<![\w.:/])/(home|root|tmp|work|usr)/", text)


def test_one_seed_calls_nothing_different(benchmarks, tmp_path):
    found = results(benchmarks, tmp_path, (0,))
    claims = {claim.arm: claim for claim in benchmarks.claims.found(found)}
    assert claims["v1-defaults"].outcome == "not separable"
    assert "at least 2 seeds each would tell" in claims["v1-defaults"].numbers
    assert "One seed says nothing of another" in benchmarks.page.page(found, benchmarks.page.in_tree("short"))


def test_a_refused_run_is_told_with_its_reason_and_in_no_comparison(benchmarks, tmp_path):
    found = results(benchmarks, tmp_path, (0,), {"v1-all-0": [1]})
    claims = {claim.arm: claim.outcome for claim in benchmarks.claims.found(found)}
    assert claims["v1-all"] == "not run"
    assert claims["tis"] == "not run", "its reference did not finish"
    text = benchmarks.page.page(found, benchmarks.page.in_tree("short"))
    assert "| refused | 8 | 0.0 | ParityError, rollouts in DIR/v1-all-0: a gap of 3 nats |" in text


def test_a_page_of_nothing_says_that_nothing_was_run(benchmarks, tmp_path):
    form = benchmarks.arms.SHORT
    found = benchmarks.results.document(form, benchmarks.arms.planned(form), {}, tmp_path)
    text = benchmarks.page.page(found, benchmarks.page.in_tree("short"))
    assert "0 of 4 runs finished" in text
    assert {claim.outcome for claim in benchmarks.claims.found(found)} == {"not run"}
    benchmarks.page.picture(found)


@pytest.mark.parametrize(
    ("verdicts", "every", "needs", "outcome"),
    [
        (["different", "different"], True, "different", "reproduced"),
        (["different", "not separable"], True, "different", "not separable"),
        (["different", "equivalent"], True, "different", "not reproduced"),
        (["different", "equivalent"], False, "different", "reproduced"),
        (["equivalent", "not separable"], False, "different", "not separable"),
        (["equivalent", "equivalent"], False, "different", "not reproduced"),
        (["equivalent", "equivalent"], True, "equivalent", "reproduced"),
        (["equivalent", "different"], True, "equivalent", "not reproduced"),
        (["equivalent", "not separable"], True, "equivalent", "not separable"),
    ],
)
def test_a_claim_is_borne_out_refuted_or_open(benchmarks, verdicts, every, needs, outcome):
    claim = benchmarks.claims.StoryClaim("…", "v1-all", needs, ("a", "b"), every)
    assert benchmarks.claims.judge(verdicts, claim) == outcome


def test_a_committed_page_is_its_documents(benchmarks):
    page = benchmarks.page.in_tree("full").page
    documents = list(benchmarks.page.in_tree("full").document.parent.glob("*.json"))
    assert page.is_file() == bool(documents)
    if documents:
        text = page.read_text()
        named = re.search(r"evidence/migration/(\w+)\.json", text)
        places = benchmarks.page.in_tree(named[1])
        document = json.loads(places.document.read_text())
        assert benchmarks.page.page(document, places) == text
        assert benchmarks.page.picture(document) + "\n" == places.picture.read_text()
