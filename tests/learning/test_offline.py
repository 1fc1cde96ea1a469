"""Pairs of a file: what they are made of, and that DPO learns them with no engine."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lockstep import api
from lockstep.config.recipe import load_recipe, parse_recipe
from lockstep.engines.none import NoEngine
from lockstep.errors import CapabilityError, RecipeError, RetokenisedError
from lockstep.loop.offline import refuse_offline
from lockstep.rendering import Renderer
from lockstep.rollout.preferences import Preferences
from lockstep.rollout.tasks import Task
from lockstep.runs.read import open_run

CHAT = "{% for m in messages %}<s>{{ m.content }}</s>={% endfor %}{{ '<s>' if add_generation_prompt }}"
RECIPE = """\
model.path = "{model}"
engine.max_model_len = 40
task.name = "jsonl:{pairs}"
sampling.max_tokens = 8
objective = {{ name = "dpo", options = {{ beta = 0.5 }} }}
optimizer.lr = 0.01
loop.kind = "offline"
training = {{ steps = 8, prompts_per_step = 4, group_size = 2, minibatches = 2, checkpoint_every = 4 }}
"""


@pytest.fixture
def recipe(tiny_checkpoint, tmp_path):
    """Every answer that is preferred is of 7s."""
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHAT)
    rows = [{"question": f"{n}+{n}=", "chosen": "777", "rejected": "12"} for n in range(6)]
    rows[1]["chosen"] = [{"role": "assistant", "content": "77"}]
    rows.append({"question": "1" * 60, "chosen": "7", "rejected": "1"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = RECIPE.format(model=model, pairs=tmp_path / "pairs.jsonl")
    (tmp_path / "recipe.toml").write_text(text)
    return load_recipe(tmp_path / "recipe.toml")


def test_an_answer_is_what_the_template_makes_of_it_and_the_prompt_is_the_rows(recipe):
    renderer = Renderer(Path(recipe.model.path))
    samples = Preferences(Task(recipe.task, 0), renderer, recipe).step(1)
    assert [(s.group, s.sample, s.item, s.reward) for s in samples][:3] == [
        (0, 0, 4, 1.0),
        (0, 1, 4, 0.0),
        (1, 0, 5, 1.0),
    ]
    whole = [renderer.tokenizer.decode(row).replace(" ", "") for row in samples.sequences]
    assert whole[0] == "<s>4+4=</s>=<s>777</s>"
    assert whole[1] == "<s>4+4=</s>=<s>12</s>"
    assert [s.text for s in samples][6] == "77", "the 8th is the 2nd again: the 7th is passed over"
    assert samples.figures == {"prompts_too_long": 1.0}
    assert np.isnan(samples.engine_logprobs).all(), "no engine has a number for them"


def test_dpo_learns_pairs_and_goes_on_after_a_kill_to_the_same_weights(recipe, tmp_path):
    said = []
    api.train(recipe, out=tmp_path / "whole", say=said.append)
    steps = open_run(tmp_path / "whole").steps
    assert steps.column("loss")[0] == pytest.approx(np.log(2.0), abs=0.05)
    assert steps.column("loss")[-1] < 0.3
    assert steps.column("pair_accuracy")[-1] == 1.0
    assert steps.column("pair_margin_mean_nats")[-1] > 2.0
    assert not steps.measured("gap_abs_max_nats").any(), "there is no engine to have a gap to"
    assert not (tmp_path / "whole" / "certificate.json").exists()

    class KilledError(Exception):
        pass

    def kill(text):
        if text.startswith("step   6"):
            raise KilledError

    with pytest.raises(KilledError):
        api.train(recipe, out=tmp_path / "cut", say=kill)
    api.train(resume=tmp_path / "cut")
    ends = [tmp_path / run / "checkpoints" / "step-000008" / "model.safetensors" for run in ("whole", "cut")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    assert [record.step for record in open_run(tmp_path / "cut").steps] == list(range(8))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": {"name": "grpo"}}, r"key objective\.name"),
        ({"training": {"steps": 1, "group_size": 4}}, r"key training\.group_size"),
        ({"objective": {"name": "dpo", "correction": "tis"}}, r"key objective\.correction.*no ladder passes"),
        ({"evaluation": {"every": 1}}, r"key evaluation\.every"),
    ],
)
def test_what_cannot_be_trained_offline_is_told(changes, told):
    table = {
        "model": {"path": "m"},
        "task": {"name": "a:b"},
        "sampling": {"max_tokens": 1},
        "objective": {"name": "dpo"},
        "training": {"steps": 1, "group_size": 2},
        "loop": {"kind": "offline"},
    }
    with pytest.raises(RecipeError, match=told):
        refuse_offline(parse_recipe(table | changes, "tests"))


LAST_IS_THE_USERS = {"chosen": "1", "rejected": [{"role": "user", "content": "1"}]}


@pytest.mark.parametrize("item", [{"chosen": "1"}, LAST_IS_THE_USERS])
def test_an_item_that_is_no_pair_is_told(recipe, tmp_path, item):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"question": "1"} | item) + "\n")
    pairs = Preferences(Task(recipe.task, 0), Renderer(Path(recipe.model.path)), recipe)
    with pytest.raises(RecipeError, match="expected chosen and rejected"):
        pairs.step(0)


def test_a_template_that_writes_an_answered_question_otherwise_is_refused(recipe):
    path = Path(recipe.model.path)
    (path / "chat_template.jinja").write_text("{{ messages | length }}{{ messages[-1].content }}")
    with pytest.raises(RetokenisedError, match="before an answer"):
        Renderer(path).answer([{"role": "user", "content": "1"}], "2")


def test_no_engine_says_so():
    with pytest.raises(CapabilityError, match="no engine runs"):
        NoEngine().sample([], [])
    with pytest.raises(CapabilityError, match="no engine runs"):
        NoEngine().need("load")
