"""The end of an engine, told at once. Collected after all that needs the engine that it ends."""

import threading
import time

import psutil
import pytest
from tests.contract.conftest import MAX_MODEL_LEN
from tests.contract.test_contract import draw, prompts_of

from lockstep.errors import EngineDied, EngineError


def test_the_death_of_the_engine_is_told_at_once(side):
    """A load is under way, where there is one: vLLM leaves it waiting for a dead core."""
    family = side.family()
    loads = side.engine.ready.capabilities["load"].supported
    raised = []

    def ask():
        try:
            if loads:
                side.engine.load(side.trainer.publish(901))
            else:
                draw(side, prompts_of(2), max_tokens=MAX_MODEL_LEN - 40)
        except EngineError as error:
            raised.append(error)

    if loads:
        family[-1].suspend()
    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(1.0)
    family[-1].kill()
    began = time.monotonic()
    thread.join(20)
    assert not thread.is_alive()
    assert time.monotonic() - began < 10
    assert isinstance(raised[0], EngineDied)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    with pytest.raises(EngineDied):
        draw(side, prompts_of(1))
