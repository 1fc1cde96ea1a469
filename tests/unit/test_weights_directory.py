"""Published weights are the checkpoint's, and no second copy.

What a killed trainer left is given back, what is held stays.
"""

import os

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen3MoeConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lockstep.weights.directory import PREFIX, SETTLED_S, weights_directory
from lockstep.weights.publish import DoublePublisher, WeightPublisher

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def published_after_a_step(config, tmp_path):
    """What an engine reads after the trainer changed its weights in place.

    And what a checkpoint of that trainer holds.
    """
    model = AutoModelForCausalLM.from_config(config)
    (tmp_path / "published").mkdir()
    publisher = WeightPublisher(model, tmp_path / "published")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    publisher.publish(1)
    model.save_pretrained(tmp_path / "checkpoint")
    return (
        model,
        publisher,
        load_file(publisher.path),
        load_file(tmp_path / "checkpoint" / "model.safetensors"),
    )


def test_a_dense_models_parameters_are_the_published_file(tmp_path):
    _, publisher, published, checkpoint = published_after_a_step(LlamaConfig(**SIZES), tmp_path)
    assert published.keys() == checkpoint.keys()
    assert all(torch.equal(published[name], checkpoint[name]) for name in checkpoint)
    assert publisher.copied == {}


def test_a_mixture_of_experts_is_published_as_its_checkpoint_holds_it(tmp_path):
    config = Qwen3MoeConfig(**SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
    model, publisher, published, checkpoint = published_after_a_step(config, tmp_path)
    assert published.keys() == checkpoint.keys() != model.state_dict().keys()
    assert all(torch.equal(published[name], checkpoint[name]) for name in checkpoint)
    assert publisher.copied
    assert all(".experts." in name for name in publisher.copied)


def test_of_two_buffers_one_keeps_the_version_that_is_read_while_the_trainer_steps(tmp_path):
    config = Qwen3MoeConfig(**SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
    model = AutoModelForCausalLM.from_config(config)
    publisher = DoublePublisher(model, tmp_path)
    own = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    held = {}
    for version in range(1, 5):
        update = publisher.publish(version)
        (tmp_path / f"checkpoint-{version}").mkdir()
        model.save_pretrained(tmp_path / f"checkpoint-{version}")
        held[version] = load_file(tmp_path / f"checkpoint-{version}" / "model.safetensors"), update.path
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)  # a step, before any engine has read
        for wanted, path in [held[at] for at in (version - 1, version) if at in held]:
            published = load_file(path)
            assert all(torch.equal(published[name], wanted[name]) for name in wanted)
            assert published.keys() == wanted.keys()
    assert {path for _, path in held.values()} == {
        str(path) for path in tmp_path.glob("*weights.safetensors")
    }
    assert own == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}, (
        "its memory stays its own"
    )


def test_what_killed_trainers_left_is_removed_and_what_is_held_stays():
    mine = weights_directory()
    assert mine.stat().st_mode & 0o777 == 0o700
    abandoned, new = mine.with_name(f"{PREFIX}abandoned"), mine.with_name(f"{PREFIX}new")
    try:
        for directory in (abandoned, new):
            directory.mkdir()
        (abandoned / "weights.safetensors").write_bytes(b"x")
        for directory in (mine, abandoned):
            os.utime(directory, (0, new.stat().st_mtime - SETTLED_S - 1))
        other = weights_directory()
        assert (mine.exists(), new.exists(), abandoned.exists()) == (True, True, False)
        other.rmdir()
        abandoned.mkdir()  # and before the clock was set back
        os.utime(abandoned, (0, new.stat().st_mtime + SETTLED_S + 60))
        weights_directory().rmdir()
        assert not abandoned.exists()
    finally:
        mine.rmdir()
        new.rmdir()
