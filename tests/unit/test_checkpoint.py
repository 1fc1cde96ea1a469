"""Checkpoints: a Hugging Face directory, whole or absent, and never another model's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lockstep.config.recipe import Optimizer
from lockstep.errors import RunError
from lockstep.policy.model import load_policy
from lockstep.runs import checkpoints
from lockstep.runs.checkpoints import checked, newest_checkpoint, read_state, seal
from lockstep.training import checkpoint
from lockstep.training.checkpoint import load_checkpoint, save_checkpoint
from lockstep.training.optimizer import MasterAdamW

CONFIG = Optimizer(lr=1e-2)


@pytest.fixture
def source(tiny_model_dir, tmp_path):
    """The tiny model with everything that a model's directory may hold beside its weights.

    Some of it must not be taken along.
    """
    path = tmp_path / "source"
    shutil.copytree(tiny_model_dir, path)
    for name in (
        "tokenizer.model",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "LICENSE",
        "modeling_own.py",
    ):
        (path / name).write_text(name)
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("tools")
    for name in (
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors",
        "model.gguf",
        "optimizer.pt",
        ".hidden",
    ):
        (path / name).write_text(name)
    (path / "model.safetensors.index.json").write_text("{}")
    return path


def trained(path, steps=1, dtype="float32", seed=0):
    """A policy and its optimizer after a few steps on made-up gradients."""
    policy = load_policy(path, dtype, "float32")
    optimizer = MasterAdamW(policy.model, CONFIG)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for parameter in optimizer.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step(step)
    return policy, optimizer


def tensors(policy):
    return {name: tensor.detach().clone() for name, tensor in policy.model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_tool_can_load_it(source, tmp_path, dtype):
    policy, optimizer = trained(source, dtype=dtype)
    path = save_checkpoint(tmp_path / "checkpoints", 1, policy, optimizer, source)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert_equal(dict(model.state_dict()), tensors(policy))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [file.name for file in path.glob("*.safetensors")] == ["model.safetensors"], (
        "engines load all of the top level"
    )
    assert sorted(file.name for file in (path / "trainer").iterdir()) == [
        "optimizer.safetensors",
        "state.json",
    ]
    assert json.loads((path / "config.json").read_text())["dtype"] == dtype


def test_a_mixture_of_experts_is_kept_as_other_tools_read_it_and_goes_on_bit_for_bit(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    )
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    policy, optimizer = trained(source)
    path = save_checkpoint(tmp_path / "checkpoints", 1, policy, optimizer, source)
    stored = load_file(path / checkpoints.MODEL)
    assert "model.layers.1.mlp.experts.2.up_proj.weight" in stored
    assert stored.keys() == load_file(source / checkpoints.MODEL).keys() != policy.model.state_dict().keys()
    assert_equal(dict(AutoModelForCausalLM.from_pretrained(path).state_dict()), tensors(policy))
    other, its = trained(source, seed=9)
    assert load_checkpoint(checked(path), other, its) == 1
    assert_equal(tensors(other), tensors(policy))
    assert_equal(its.state(), optimizer.state())


def test_what_belongs_to_the_model_goes_along_and_other_weights_do_not(source, tmp_path):
    path = save_checkpoint(tmp_path / "checkpoints", 1, *trained(source), source)
    names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    own = {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "trainer/optimizer.safetensors",
        "trainer/state.json",
    }
    companions = {
        "tokenizer.model",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "LICENSE",
        "modeling_own.py",
    }
    assert names == own | companions | {"additional_chat_templates/tools.jinja"}
    assert (path / "merges.txt").read_text() == "merges.txt"
    again = save_checkpoint(tmp_path / "others", 2, *trained(path), path)
    assert {str(file.relative_to(again)) for file in again.rglob("*") if file.is_file()} == names, (
        "a checkpoint is a source too"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_trainer_goes_on_bit_for_bit(source, tmp_path, dtype):
    policy, optimizer = trained(source, steps=2, dtype=dtype)
    path = save_checkpoint(tmp_path, 2, policy, optimizer, source)
    other, its = trained(source, steps=1, dtype=dtype, seed=9)
    assert load_checkpoint(checked(path), other, its) == 2
    assert read_state(path).step == 2
    for side in ((policy, optimizer), (other, its)):
        for parameter in side[1].parameters:
            parameter.grad = torch.full_like(parameter, 0.5)
        side[1].step(2)
    assert_equal(tensors(other), tensors(policy))
    assert_equal(its.state(), optimizer.state())


def test_the_newest_whole_checkpoint_counts(source, tmp_path):
    policy, optimizer = trained(source)
    whole = save_checkpoint(tmp_path, 1, policy, optimizer, source)
    assert newest_checkpoint(tmp_path / "nowhere") is None
    for number, part in enumerate(checkpoints.PARTS, 2):
        later = tmp_path / f"step-{number:06d}"
        shutil.copytree(whole, later)
        assert newest_checkpoint(tmp_path) == later
        content = (later / part).read_bytes()
        if part != "config.json":
            for cut in (0, 5, len(content) // 2, len(content) - 1):
                (later / part).write_bytes(content[:cut])
                assert newest_checkpoint(tmp_path) == whole, f"{part} cut at {cut}"
        (later / part).unlink()
        assert newest_checkpoint(tmp_path) == whole
        assert later in checkpoints.damaged_checkpoints(tmp_path)
    assert whole not in checkpoints.damaged_checkpoints(tmp_path)


def test_older_ones_go_only_when_the_new_one_is_there(source, tmp_path):
    policy, optimizer = trained(source)
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, policy, optimizer, source)
        assert [entry.name for entry in tmp_path.iterdir() if entry.name != "source"] == [path.name]


def test_a_checkpoint_that_is_saved_again_is_never_missing(source, tmp_path, monkeypatch):
    directory = tmp_path / "checkpoints"
    first, optimizer = trained(source)
    save_checkpoint(directory, 3, first, optimizer, source)
    second, its = trained(source, seed=1)
    real = checkpoint.rename
    moves = []

    def watched(old, new):
        moves.append(new.name)
        if len(moves) == 2:
            raise KeyboardInterrupt
        real(old, new)

    monkeypatch.setattr(checkpoint, "rename", watched)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(directory, 3, second, its, source)
    assert moves == ["step-000003.older", "step-000003"]
    left = newest_checkpoint(directory)
    assert left is not None
    assert load_checkpoint(checked(left), second, its) == 3
    assert_equal(tensors(second), tensors(first))
    monkeypatch.undo()
    last, its = trained(source, seed=2)
    assert save_checkpoint(directory, 3, last, its, source).name == "step-000003"
    assert [entry.name for entry in directory.iterdir()] == ["step-000003"]


@pytest.mark.parametrize("part", [checkpoints.MODEL, checkpoints.OPTIMIZER, checkpoints.STATE])
@pytest.mark.parametrize("left", [0.0, 0.5, 1.0])
def test_a_cut_file_is_an_error_and_nothing_is_loaded(source, tmp_path, part, left):
    path = save_checkpoint(tmp_path, 1, *trained(source), source)
    content = (path / part).read_bytes()
    (path / part).write_bytes(content[: min(int(left * len(content)), len(content) - 1)])
    policy, optimizer = trained(source, seed=4)
    before = tensors(policy)
    its = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    with pytest.raises(RunError, match=Path(part).name) as raised:
        load_checkpoint(checked(path), policy, optimizer)
    assert str(path) in raised.value.hint
    assert_equal(tensors(policy), before)
    assert_equal(optimizer.state(), its)


def test_another_models_checkpoint_is_refused(source, tmp_path):
    path = save_checkpoint(tmp_path, 1, *trained(source), source)
    policy, optimizer = trained(source, seed=4)
    before = tensors(policy)
    stored = load_file(path / checkpoints.MODEL)
    name = next(iter(stored))
    for changed in (
        {key: value for key, value in stored.items() if key != name},
        stored | {"model.more": torch.zeros(1)},
        stored | {name: torch.zeros(1)},  # which would broadcast
        stored | {name: stored[name].to(torch.float64)},
    ):
        save_file(changed, path / checkpoints.MODEL)
        seal(path, 1)
        with pytest.raises(RunError, match=r"(?s)model\.safetensors.*same model\.path"):
            load_checkpoint(checked(path), policy, optimizer)
    save_file(stored, path / checkpoints.MODEL)
    state = load_file(path / checkpoints.OPTIMIZER)
    save_file({f"{key}x": value for key, value in state.items()}, path / checkpoints.OPTIMIZER)
    seal(path, 1)
    with pytest.raises(RunError, match=r"optimizer\.safetensors"):
        load_checkpoint(checked(path), policy, optimizer)
    assert_equal(tensors(policy), before)


@pytest.mark.parametrize("part", ["model.safetensors", "trainer/optimizer.safetensors", "tokenizer.model"])
def test_a_byte_that_changed_is_found_before_anything_is_loaded(source, tmp_path, part):
    path = save_checkpoint(tmp_path / "checkpoints", 1, *trained(source), source)
    assert checked(path).step == 1
    content = bytearray((path / part).read_bytes())
    content[-1] ^= 1
    (path / part).write_bytes(content)
    with pytest.raises(RunError, match=f"{part}: got other bytes than were written"):
        checked(path)
    (path / part).unlink()
    with pytest.raises(RunError, match=f"{part}: got (?i:no such file)"):
        checked(path)


def test_a_checkpoint_under_another_steps_name_is_refused(source, tmp_path):
    path = save_checkpoint(tmp_path / "checkpoints", 1, *trained(source), source)
    with pytest.raises(RunError, match="got step 1"):
        checked(path.rename(path.with_name("step-000002")))


def test_one_from_before_digests_were_kept_is_taken(source, tmp_path):
    path = save_checkpoint(tmp_path / "checkpoints", 1, *trained(source), source)
    (path / checkpoints.STATE).write_text('{"step": 1}')
    assert checked(path).step == 1


def test_of_several_the_newest_that_is_as_written_counts_and_no_other_is_removed(source, tmp_path):
    first = save_checkpoint(tmp_path / "checkpoints", 1, *trained(source), source)
    for step in (2, 3, 4):
        shutil.copytree(first, later := first.with_name(f"step-{step:06d}"))
        seal(later, step)
    for step in (3, 4):
        with (first.with_name(f"step-{step:06d}") / checkpoints.MODEL).open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x55")
    said = []
    newest = checkpoints.newest_checked(first.parent, said.append)
    assert newest is not None
    assert newest.step == 2
    assert said == [
        f"step-00000{step} is damaged (model.safetensors: other bytes than were written) and is passed over; "
        f"it is kept as step-00000{step}.damaged"
        for step in (4, 3)
    ]
    checkpoints.keep_newest(first.parent)
    assert sorted(path.name for path in first.parent.iterdir()) == [
        "step-000002",
        "step-000003.damaged",
        "step-000004.damaged",
    ]
