"""Runs ``lockstep`` commands one after another, each in a forked child that kills itself where it is told to.

torch is imported once, and no operation of it runs before a fork. Reads one JSON order a line: ``args``;
``kills`` (see :class:`Kill`); ``log``, a file for the command's output. Answers each with the exit
status, negative for a signal.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

LOOPS: dict[str, Callable[[Any], int]] = {
    "lockstep.loop.sync": lambda number: number,
    "lockstep.loop.in_flight": lambda flights: flights.schedule.state.step,
}
"""Each loop's module, and the step's number from the second argument of its ``_step``."""


class Kill:
    """SIGKILL, or SIGKILL of the engine alone, at one call of one function in one step.

    Args:
        target: ``module:function`` or ``module:Class.method``, as the caller looks it up.
        when: ``enter`` or ``exit``.
        call: which call in that step, from 0.
        step: in which step; −1: before the first that is not replayed.
        whom: ``trainer``, ``engine`` or ``both``.
        told: a file that gets a line for each strike.
    """

    def __init__(
        self, target: str, when: str, call: int, step: int, whom: str = "trainer", told: str = ""
    ) -> None:
        self.target = target
        self.when = when
        self.call = call
        self.step = step
        self.whom = whom
        self.told = told
        self.now, self.calls = -1, 0

    def install(self) -> None:
        """Put itself around the function, and around the loop's step."""
        for loop, number_of in LOOPS.items():
            self._watch(importlib.import_module(loop), number_of)
        module, _, path = self.target.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            due = self.now == self.step and self.calls == self.call
            self.calls += self.now == self.step
            if due and self.when == "enter":
                self.strike()
            found = function(*args, **kwargs)
            if due and self.when == "exit":
                self.strike()
            return found

        setattr(owner, name, watched)

    def _watch(self, loop: Any, number_of: Callable[[Any], int]) -> None:
        step = loop._step

        def stepped(run, of):
            self.now = number_of(of)
            self.calls = 0
            self.run = run
            return step(run, of)

        loop._step = stepped

    def strike(self) -> None:
        """End whom it is to end."""
        if self.told:
            with open(self.told, "a") as told:
                told.write(f"{self.whom} at {self.target} {self.when}, step {self.now}\n")
        if self.whom != "trainer":
            end_engine(self.run.pair.engine)
        if self.whom != "engine":
            os.kill(os.getpid(), signal.SIGKILL)


def end_engine(engine: Any) -> None:
    """Its process group's end; of one in this process, whatever is asked of it from now on ends like that."""
    if hasattr(engine, "_process"):
        os.killpg(engine._process.popen.pid, signal.SIGKILL)
        return
    from lockstep.errors import EngineDied

    def dead(*args, **kwargs):
        raise EngineDied("engine", got="its end", expected="a running engine", hint="none")

    engine._in_turn = engine._score = engine.load = dead


def child(order: dict[str, Any]) -> None:
    """The command, as a process of its own would run it."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for kill in order["kills"]:
        Kill(**kill).install()
    from lockstep.cli.main import main

    sys.argv = ["lockstep", *order["args"]]
    main()


def serve() -> None:
    """Until the end of standard input."""
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    for name in (
        "cli.main",
        "loop.sync",
        "loop.in_flight",
        "loop.open",
        "engines.transformers",
        "parity.pair",
        "policy.model",
        "rendering",
    ):
        importlib.import_module(f"lockstep.{name}")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                child(json.loads(line))
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else bool(end.code))
            finally:
                sys.stdout.flush()
                os._exit(99)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
