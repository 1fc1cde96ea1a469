"""A dry run shows what a run would be, and starts and writes nothing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.config.recipe import parse_recipe, with_sets
from lockstep.errors import ModelError, UsageError
from lockstep.loop.dry_run import dry_run, told
from lockstep.rendering import Renderer


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
    shown = told(found)
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
