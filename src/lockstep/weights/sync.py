"""One sync: push → receipt → settle.

    trainer thread   publish(v) ──► the body: scores, under its share of the cores ──► receipt ──► settle
    load thread           └────────► engine.load(v) ───────────────────────────────────┘

The weights must not change between publish and settle, unless the publisher keeps a second buffer.
Whatever stops the process while the engine loads closes the engine, for its load would be waited for.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from lockstep.engines.base import Engine
from lockstep.errors import Stopped
from lockstep.records.versions import LoadMode, LoadReceipt, WeightUpdate


class Source(Protocol):
    """Whose weights are pushed: a trainer."""

    def publish(self, version: int) -> WeightUpdate:
        """Make the weights as they are now available as ``version``."""
        ...

    def settle(self) -> None:
        """Every engine has loaded what was published."""
        ...


@dataclass(eq=False)
class Push:
    """A sync under way."""

    receipt: LoadReceipt | None = None
    """What the engine did; None until it is done."""


@contextmanager
def push(
    source: Source,
    engine: Engine,
    version: int,
    mode: LoadMode = "wait",
    *,
    shares_cores: bool = False,
) -> Iterator[Push]:
    """Publish, and have the engine load while the body runs; it may read weights and must not change them.

    Args:
        shares_cores: engine and trainer compute on the same cores; the body then has only its share of
            threads.

    Raises:
        EngineError: when the engine does not load, once the body has ended.
    """
    pushed = Push()
    update = source.publish(version)
    with ThreadPoolExecutor(1, "weight-load") as thread:
        load = thread.submit(engine.load, update, mode)
        try:
            with beside_a_load(shares_cores):
                yield pushed
            pushed.receipt = load.result()
        except (Stopped, KeyboardInterrupt):
            engine.close()  # or leaving the thread would wait for the load
            raise
    # Not where the load failed: what the engine has read by then nobody knows, and the error ends the sync.
    source.settle()


def beside_a_load(shares_cores: bool) -> AbstractContextManager[None]:
    """The threads that a body has while an engine loads."""
    return threads(_share if shares_cores else _all)


def _all(threads: int) -> int:
    return threads


def _share(threads: int) -> int:
    """Half.

    OpenMP threads that outnumber the cores wait by spinning: a load of .4 s took 1.3 s on 2 cores.
    """
    return max(1, threads // 2)


@contextmanager
def threads(policy: Callable[[int], int]) -> Iterator[None]:
    """This process's threads as ``policy`` has them of what they were."""
    # Of the whole process, not of a thread: torch has no narrower setting.
    before = torch.get_num_threads()
    torch.set_num_threads(policy(before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
