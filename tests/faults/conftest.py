"""A whole pair without a download: the tiny model behind the transformers engine, with a tokenizer of 97 words."""

import pytest
from msgspec.structs import replace


@pytest.fixture(scope="session")
def recipe(tiny_checkpoint):
    from lockstep.config.recipe import parse_recipe

    return parse_recipe(
        {
            "model": {"path": str(tiny_checkpoint)},
            "engine": {"name": "transformers", "max_model_len": 128},
            "task": {
                "name": "reasoning_gym:basic_arithmetic",
                "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            },
            "sampling": {"max_tokens": 5},
            "training": {"steps": 1},
            "parity": {"probe_prompts": 8, "probe_tokens": 16},
        },
        "tests/faults",
    )


@pytest.fixture(autouse=True)
def one_thread():
    """The model is so small that threads wait for each other longer than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def session(recipe, tmp_path_factory):
    from lockstep.loop.session import open_session

    with open_session(recipe, tmp_path_factory.mktemp("run") / "engine.log", print) as opened:
        yield opened


@pytest.fixture
def pair(session, recipe):
    """The session's pair with the plain recipe, and with it again afterwards."""
    session.pair.recipe = replace(recipe)
    yield session.pair
    session.pair.recipe = recipe
