"""What every vLLM process loads at its start (entry point group ``vllm.general_plugins``), core and workers alike.

vLLM's processes wait for each other by spinning on shared memory for a second before they sleep
(vllm/distributed/device_communicators/shm_broadcast.py, ``SpinCondition``). On a machine where trainer and engine take turns on
the same cores, an idle engine that spins takes a core from the trainer, and a waiting core process takes one from its own
worker. They are told to spin briefly only; after that a message costs a wake-up, some 50 µs.
"""

from typing import Any

SPIN_S = 0.02
"""Not 0: the notification that ends a sleep is dropped when the one before it is not sent yet, and the sleeper then waits out
its time-out of 5 s. Within this time the reader looks for itself."""

ENTRY_POINTS = "[vllm.general_plugins]\nlockstep = lockstep.engines.worker.vllm_plugin:register\n"
METADATA = "Metadata-Version: 2.1\nName: lockstep-engine\nVersion: 0\n"


def register() -> None:
    """Make every wait of this process sleep after ``SPIN_S`` instead of a second."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    original = SpinCondition.__init__
    if getattr(original, "lockstep", False):
        return

    def patient(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.busy_loop_s = SPIN_S

    patient.lockstep = True  # type: ignore[attr-defined]
    SpinCondition.__init__ = patient


def is_active() -> bool:
    """True when the waits of this process are patient; probed in the worker, shown in the manifest."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    return getattr(SpinCondition.__init__, "lockstep", False)
