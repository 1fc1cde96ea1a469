"""Shared by all tests: a tiny random model, made here, so that unit tests need no download."""

import gc
import importlib
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiny_checkpoint import write_checkpoint, write_model

# What torch and transformers make in being imported lives to the end: a fifth of the time of the unit tests
# went into looking through it for garbage. Off until it is all there; then left out (gc.freeze).
gc.disable()

# An example that waits for a core that others hold is no slow one. The profile is a child of the one in
# force, which in CI draws the same examples each time.
settings.register_profile("patient", settings.default, deadline=None)
settings.load_profile("patient")

REAL_MODELS = {"contract", "e2e"}
"""Folders whose tests compute on models for which a second thread pays."""


def pytest_configure(config):
    """Each of pytest-xdist's workers is a machine of its own: its engines see its share of the cores."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % len(cores) :: workers])


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the mark
def pytest_collection_modifyitems(items):
    """Tests that share an engine stay on one worker: a module of ``e2e``, an engine of ``contract``.

    These come first: what is short fills the end. A module of ``unit`` makes what it shares once, too, and
    whole runs (``chaos``) their process that forks; the long form is shared out.
    """
    items.sort(key=lambda item: {"e2e": 0, "contract": 1}.get(item.path.parent.name, 2))
    for item in items:
        if "zygote" in item.fixturenames and not item.get_closest_marker("chaos"):
            item.add_marker(pytest.mark.xdist_group("zygote"))
        folder = item.path.parent.name
        params = getattr(item, "callspec", None)
        if folder in ("e2e", "unit", "processes"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        elif folder == "contract":
            engines = (
                [str(value) for value in params.params.values() if "vllm" in str(value)] if params else []
            )
            shared = "side" if "side" in item.fixturenames else item.path.stem
            item.add_marker(pytest.mark.xdist_group(f"{shared} {''.join(engines[:1])}"))


def pytest_collection_finish():
    """From here on garbage is collected as ever: of what the tests themselves make."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    """Refuse to go on where every worker would start every engine: pytest-xdist groups by node id."""
    if node.config.option.dist == "loadgroup":
        alone = [name for name in ids if Path(name).parent.name in REAL_MODELS and "@" not in name]
        assert not alone, f"this pytest-xdist does not fit this pytest: {len(alone)} tests are not grouped"


def need(function, *args):
    """What ``function`` finds; a skip with its reason where it is not installed, which under CI is an error.

    What the machine cannot run is skipped there too.
    """
    from lockstep.errors import LockstepError, MachineError

    try:
        return function(*args)
    except LockstepError as error:
        if os.environ.get("CI") and not isinstance(error, MachineError):
            raise
        pytest.skip(f"NOT_RUN: {error.boundary}, {error.got}; {error.hint}")


EXTRAS = ("tensorboard", "wandb", "mlflow", "trackio", "datasets", "math_verify", "pandas")
"""What pyproject.toml's extras bring beside the trainer's packages: nothing imports them unasked."""


def need_extra(module, extra=""):
    """The package of an extra; a skip with its reason where it is not installed.

    Under ``make extras``, whose environment has all of them, that is an error.
    """
    if os.environ.get("LOCKSTEP_EXTRAS"):
        return importlib.import_module(module)
    line = f'pip install "lockstep-rl[{extra or module}]"'
    return pytest.importorskip(module, reason=f"NOT_RUN: {module} is not installed ({line}, or make extras)")


@pytest.fixture(autouse=True, scope="module")
def threads_that_pay(request, monkeypatch_module):
    """One thread for tiny models, here and in the processes that a test starts.

    More of them wait for one another by spinning.
    """
    n = len(os.sched_getaffinity(0)) if request.path.parent.name in REAL_MODELS else 1
    if n == 1:
        monkeypatch_module.setenv("OMP_NUM_THREADS", "1")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(n)


@pytest.fixture(scope="module")
def monkeypatch_module():
    """``monkeypatch`` for a whole module."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A 2-layer Llama with tied embeddings and 97 tokens, as safetensors; no tokenizer."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model_dir, tmp_path_factory):
    """The tiny model with a tokenizer and a chat template beside it."""
    return write_checkpoint(tiny_model_dir, tmp_path_factory.mktemp("models") / "tiny")
