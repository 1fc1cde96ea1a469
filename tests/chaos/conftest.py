"""One process that forks for all tests of whole runs, and one undisturbed run that they are held to."""

import pytest

from tests.chaos.whole_run import RECIPE, REWARD, Zygote, undisturbed


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    (root / "varied.py").write_text(REWARD)
    served = Zygote(root)
    yield served
    served.close()


@pytest.fixture(scope="session")
def here(zygote, tiny_checkpoint):
    """The recipe on the transformers engine, and what an undisturbed run of it comes to."""
    recipe = zygote.root / "here.toml"
    recipe.write_text(RECIPE % {"model": tiny_checkpoint, "engine": "transformers"})
    return undisturbed(zygote, recipe)
