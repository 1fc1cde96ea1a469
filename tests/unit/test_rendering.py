"""From messages to token ids: what a checkpoint's own files bring about is one error that names them."""

import shutil

import pytest

from lockstep.errors import ModelError
from lockstep.rendering import Renderer


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def test_a_template_that_refuses_the_conversation_is_told(checkpoint):
    """As Gemma's does of a system message."""
    (checkpoint / "chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    with pytest.raises(ModelError, match=r"on messages of system, user, .*System role not supported") as told:
        Renderer(checkpoint).prompt([{"role": "system", "content": ""}, {"role": "user", "content": "1"}])
    assert "task.system_prompt" in told.value.hint


def test_text_that_is_no_unicode_is_told(checkpoint):
    with pytest.raises(ModelError, match="chat template"):
        Renderer(checkpoint).prompt([{"role": "user", "content": "1 + \ud800"}])


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_file_that_is_cut_is_told(checkpoint, name):
    (checkpoint / name).write_text('{"')
    with pytest.raises(ModelError, match=rf"tokenizer of {checkpoint}"):
        Renderer(checkpoint)
