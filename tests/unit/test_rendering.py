"""From messages to token ids: what a checkpoint's own files bring about is one error that names them."""

import shutil

import pytest

from lockstep.errors import ModelError, RetokenisedError
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


CHAT = "{% for m in messages %}<s>+{{ m.content }}</s>={% endfor %}{{ '<s>+' if add_generation_prompt }}"
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two\nnumbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}},
    },
}


def with_template(checkpoint, template, tools=()):
    (checkpoint / "chat_template.jinja").write_text(template)
    return Renderer(checkpoint, tools)


def test_what_stands_between_two_answers_begins_behind_the_stop_token(checkpoint):
    """The model draws the stop token itself; the template's own text behind it was not sampled."""
    renderer = with_template(checkpoint, CHAT)
    between = renderer.tokenizer.decode(renderer.between([{"role": "tool", "content": "12"}]))
    assert between.replace(" ", "") == "=<s>+12</s>=<s>+"
    first = renderer.prompt([{"role": "user", "content": "1"}])
    answer = renderer.tokenizer.encode("7</s>", add_special_tokens=False)
    said = [("user", "1"), ("assistant", "7"), ("tool", "12")]
    whole = renderer.prompt([{"role": role, "content": text} for role, text in said])
    assert [*first, *answer, *renderer.between([{"role": "t", "content": "12"}])] == whole.tolist()


def test_a_template_without_an_end_of_turn_is_gone_on_with_as_it_is(checkpoint):
    renderer = Renderer(checkpoint)
    between = renderer.tokenizer.decode(renderer.between([{"role": "tool", "content": "12"}]))
    assert between.replace(" ", "").replace("<unk>", "") == "12"


def test_a_template_that_rewrites_the_last_answer_alone_is_gone_on_with(checkpoint):
    """As Qwen3's, which puts empty reasoning before it: what was sampled stays, what follows is the same."""
    reasoned = "{{ '-' if loop.last and m.role == 'assistant' }}{{ m.content }}</s>="
    template = f"{{% for m in messages %}}<s>{reasoned}{{% endfor %}}{{{{ '<s>' if add_generation_prompt }}}}"
    renderer = with_template(checkpoint, template)
    between = renderer.tokenizer.decode(renderer.between([{"role": "tool", "content": "12"}]))
    assert between.replace(" ", "") == "=<s>12</s>=<s>"


def test_a_template_that_drops_an_answer_is_refused(checkpoint):
    kept = "{% if loop.last or m.role != 'assistant' %}{{ m.content }}</s>{% endif %}"
    kept = "{% if loop.last or m.role != 'assistant' %}{{ m.content }}</s>{% endif %}"
    dropping = f"{{% for m in messages %}}{kept}{{% endfor %}}"
    with pytest.raises(RetokenisedError, match="where it was when the model gave it"):
        with_template(checkpoint, dropping).between([{"role": "tool", "content": "12"}])


def test_tools_are_told_by_the_template_or_in_the_system_prompt(checkpoint):
    renderer = with_template(checkpoint, "{{ tools[0]['function']['name'] }}{{ messages|length }}", [TOOL])
    asked = []
    render = renderer.tokenizer.apply_chat_template

    def watched(messages, **options):
        asked.append((messages, options.get("tools")))
        return render(messages, **options)

    renderer.tokenizer.apply_chat_template = watched
    renderer.prompt([{"role": "user", "content": "1"}])
    assert asked[-1] == ([{"role": "user", "content": "1"}], [TOOL])
    renderer.tokenizer.chat_template = CHAT
    renderer.prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1"}])
    told = "Tools that you can call:\nadd(a: integer, b: any): Add two numbers."
    assert asked[-1][0][0] == {"role": "system", "content": f"Be brief.\n{told}"}
    renderer.prompt([{"role": "user", "content": "1"}])
    assert asked[-1][0] == [{"role": "system", "content": told}, {"role": "user", "content": "1"}]


def test_an_answer_that_nobody_sampled_is_the_templates(checkpoint):
    asked = [{"role": "user", "content": "1"}]
    for renderer in (with_template(checkpoint, CHAT), with_template(checkpoint, CHAT, [TOOL])):
        assert renderer.tokenizer.decode(renderer.answer(asked, "77")).replace(" ", "") == "77</s>"
