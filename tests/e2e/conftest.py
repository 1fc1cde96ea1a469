"""End to end on the real vLLM and the real model. One engine serves every test that can share it."""

import shutil
from pathlib import Path

import pytest

from lockstep.config.recipe import load_recipe
from tests.conftest import need

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
SMALL = [
    "parity.probe_prompts=4",
    "parity.probe_tokens=10",
    "parity.draw_tokens=256",
    "parity.draws_see=1",
    "training.prompts_per_step=4",
    "training.group_size=4",
    "engine.max_model_len=256",
]
"""A smaller ladder and batch than the quick start's, and shorter prompts: the same code on fewer tokens."""


def tiny_checkpoint(config, tokenizer, path):
    """Random weights for a small ``config``, with the tokenizer and chat template of a real checkpoint."""
    import torch
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, path)
    return path


@pytest.fixture(scope="session")
def installed():
    """The engine environment and the model; ``make test`` installs both."""
    from lockstep.engines.environments.locate import find
    from lockstep.policy.pretrained import resolve_model

    return need(find, "vllm", "0.32.0"), need(resolve_model, "smollm2-135m-instruct")


@pytest.fixture(scope="session")
def session(installed, tmp_path_factory):
    """A running vLLM and a trainer, with the quick start's recipe made smaller."""
    from lockstep.faults.at_load import plants
    from lockstep.loop.open import open_session

    log = tmp_path_factory.mktemp("run") / "engine.log"
    with open_session(load_recipe(QUICKSTART, SMALL), log, print, plants()) as opened:
        yield opened


@pytest.fixture
def pair(session):
    """The session's pair; the recipe and the engine are put back after the test."""
    recipe = session.pair.recipe
    engine = session.pair.engine
    version = session.pair.version
    yield session.pair
    session.pair.recipe = recipe
    session.pair.engine = engine
    session.pair.version = version
    session.pair.sync(version)
