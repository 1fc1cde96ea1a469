"""A dry run shows what a run would be, and starts and writes nothing."""

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.config.recipe import parse_recipe, with_sets
from lockstep.errors import ModelError, RecipeError, UsageError
from lockstep.loop.dry_run import dry_run, told
from lockstep.rendering import Renderer
from lockstep.runs.layout import RunLayout

HERE = "tests.unit.test_dry_run"


class Shop:
    """Says something of each question before the model does."""

    def reset(self, **item):
        self.item = item
        return "=?"

    def get_reward(self):
        return 1.0


@pytest.fixture
def recipe(tiny_checkpoint):
    return parse_recipe(
        {
            "model": {"path": str(tiny_checkpoint)},
            "engine": {"name": "transformers", "max_model_len": 64},
            "task": {"name": "reasoning_gym:basic_arithmetic", "options": {"min_terms": 2, "max_terms": 2}},
            "sampling": {"max_tokens": 5},
            "training": {"steps": 3, "prompts_per_step": 2, "group_size": 2, "minibatches": 2},
        },
        "test",
    )


def test_prompts_are_those_that_the_engine_would_get_and_nothing_is_started(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = dry_run(recipe, None)
    assert list(tmp_path.iterdir()) == []
    assert (found.optimizer_steps, found.samples, len(found.prompts)) == (6, 12, 3)
    ids = np.array(found.prompts[0].token_ids)
    renderer = Renderer(Path(found.model_path))
    assert renderer.tokenizer.decode(ids) == found.prompts[0].text
    shown = told(found, recipe)
    assert all(" ".join(map(str, prompt.token_ids)) in shown for prompt in found.prompts)
    assert "nothing was started" in shown


def test_memory_is_that_of_the_trainers_own_tensors(recipe, tiny_model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    n = sum(p.numel() for p in model.parameters())
    found = dry_run(recipe, None)
    assert found.n_parameters == n
    assert found.memory_gib["adam moments"] == pytest.approx(8 * n / 2**30)
    assert found.memory_gib["reference model"] == 0.0
    bf16 = dry_run(with_sets(recipe, ["model.dtype=bfloat16", "objective.kl.coef=0.1"]), None)
    assert bf16.memory_gib["fp32 masters"] == pytest.approx(4 * n / 2**30)
    assert bf16.memory_gib["reference model"] == pytest.approx(2 * n / 2**30)


def test_a_model_file_that_is_cut_short_is_named(recipe, tiny_checkpoint, tmp_path):
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[:100])
    with pytest.raises(ModelError, match=r"model\.safetensors: got no header of a safetensors file"):
        dry_run(with_sets(recipe, [f"model.path={broken}"]), None)


def test_what_a_run_would_refuse_a_dry_run_refuses(recipe):
    with pytest.raises(UsageError, match=r"objective\.options"):
        dry_run(with_sets(recipe, ["objective.options.x=1"]), None)


def test_the_recipe_that_is_shown_is_the_one_that_was_resolved(recipe):
    asked = with_sets(recipe, ["objective.kl.coef=0.1", 'recording.sinks=["csv"]'])
    _, _, after = told(dry_run(asked, None), asked).partition("every other key is at its default:\n")
    assert parse_recipe(tomllib.loads(after.removesuffix("nothing was started")), "shown") == asked


def test_every_file_that_a_run_may_write_is_said(recipe, tmp_path):
    in_flight = with_sets(recipe, ["loop.kind=in_flight", 'recording.sinks=["csv"]'])
    run = RunLayout(tmp_path)
    own = [run.manifest, run.certificate, run.verdicts, run.metrics, run.alarms, run.ledger, run.engine_log]
    written = dry_run(in_flight, tmp_path).writes
    assert {*map(str, own), f"{tmp_path}/rollouts/", f"{tmp_path}/checkpoints/", f"{tmp_path}/(csv)"} == {
        *written
    }
    assert str(run.ledger) not in dry_run(recipe, tmp_path).writes


def test_memory_has_the_masters_gradients_and_the_versions_that_are_kept(recipe):
    plain = dry_run(recipe, None)
    assert plain.memory_gib["fp32 master gradients"] == plain.memory_gib["ring of versions"] == 0.0
    ahead = ["model.dtype=bfloat16", "loop.kind=in_flight", "rollout.max_lag=3"]
    found = dry_run(with_sets(recipe, ahead), None)
    gib = found.n_parameters / 2**30
    assert found.memory_gib["fp32 master gradients"] == pytest.approx(4 * gib)
    assert found.memory_gib["ring of versions"] == pytest.approx(3 * 2 * gib)
    on_disk = dry_run(with_sets(recipe, [*ahead, "rollout.ring=disk"]), None)
    assert on_disk.memory_gib["ring of versions"] == 0.0


def test_what_an_environment_says_first_is_in_the_prompts(recipe):
    plain = dry_run(recipe, None).prompts
    asked = dry_run(with_sets(recipe, [f"task.environment={HERE}:Shop", "engine.max_model_len=512"]), None)
    for one, alone in zip(asked.prompts, plain, strict=True):
        assert "=?" in "".join(one.text.split())
        assert "=?" not in "".join(alone.text.split())


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["engine.max_model_len=8"], r"engine\.max_model_len: got '?8"),
        (["loop.kind=offline"], r"objective\.name: got 'grpo' with loop\.kind = 'offline'"),
        (["evaluation.every=1", "evaluation.name=jsonl:no_such"], "No such file"),
    ],
)
def test_what_a_run_refuses_of_its_questions_a_dry_run_refuses(recipe, sets, said):
    with pytest.raises(UsageError, match=said):
        dry_run(with_sets(recipe, sets), None)


def test_an_offline_dry_run_reads_the_pairs_that_it_would_train_on(recipe, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"question": "1 + 1", "chosen": "2", "rejected": "3"}))
    table = {
        "model": {"path": recipe.model.path},
        "task": {"name": f"jsonl:{pairs}"},
        "sampling": {"max_tokens": 5},
        "training": {"steps": 1, "group_size": 2},
        "objective": {"name": "dpo"},
        "loop": {"kind": "offline"},
    }
    offline = parse_recipe(table, "test")
    found = dry_run(offline, tmp_path / "run")
    assert found.prompts[0].answer == "2"
    assert {Path(name).name for name in found.writes} == {"manifest.json", "metrics.jsonl", "checkpoints"}
    pairs.write_text(json.dumps({"question": "1 + 1", "chosen": "2"}))
    with pytest.raises(UsageError, match="rejected"):
        dry_run(offline, None)


def test_a_schedule_that_cannot_be_is_refused_before_anything_starts(recipe):
    sets = ["optimizer.schedule=cosine_with_min_lr", "optimizer.schedule_options={least = 1e-7}"]
    with pytest.raises(RecipeError, match=r"optimizer\.schedule_options"):
        dry_run(with_sets(recipe, sets), None)
    sets[1] = "optimizer.schedule_options={min_lr = 1e-7}"
    assert dry_run(with_sets(recipe, sets), None).optimizer_steps == 6
