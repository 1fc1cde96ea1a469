"""What every vLLM process, core or worker, loads at its start (entry point group ``vllm.general_plugins``).

*Waiting.* vLLM's processes wait for each other by spinning on shared memory for a second before they sleep
(vllm/distributed/device_communicators/shm_broadcast.py, ``SpinCondition``). On a machine where trainer and
engine take turns on the same cores, an idle engine that spins takes a core from the trainer, and a waiting
core process takes one from its own worker. They are told to spin briefly only; after that a message costs a
wake-up, some 50 µs.

*The head.* Before 0.28 vLLM computes the last matrix product in the model's dtype. Where
``LOCKSTEP_HEAD_DTYPE`` is set, it is computed in that dtype instead, as 0.28 does
(vllm/model_executor/layers/logits_processor.py, ``_apply_head``): both operands are cast at every step. No
copy of the weights is kept, so none can be stale.

*Packed weights.* On a CPU, V1 packs a layer's weight at its first load and throws the parameter away that the
loader fills (vllm/model_executor/layers/utils.py, ``dispatch_cpu_unquantized_gemm``). Later versions' reload
makes it anew; in those before, the parameter is kept, without its memory, so that a load can fill it again.

*Ports.* torch.distributed is set up for a single process too, through a TCP store that listens on every
interface (vllm/v1/executor/uniproc_executor.py). A world of one meets in a file instead.
"""

import importlib.util
import os
import tempfile
from typing import Any

SPIN_S = 0.02
"""Not 0: the notification that ends a sleep is dropped when the one before it is not sent yet, and the
sleeper then waits out its time-out of 5 s. Within this time the reader looks for itself."""

HEAD_DTYPE = "LOCKSTEP_HEAD_DTYPE"

ENTRY_POINTS = "[vllm.general_plugins]\nlockstep = lockstep.engines.worker.vllm_plugin:register\n"


def register() -> None:
    """Apply all of it to this process; once."""
    _wait_patiently()
    _meet_in_a_file()
    _keep_loadable()
    if HEAD_DTYPE in os.environ:
        _raise_head(os.environ[HEAD_DTYPE])


def is_active() -> bool:
    """True when everything that was asked of this process is in force.

    Probed in the worker, shown in the manifest.
    """
    import torch.distributed
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    condition = _spin_condition()
    waits = condition is None or getattr(condition.__init__, "lockstep", False)
    meets = hasattr(torch.distributed.init_process_group, "lockstep")
    return (
        waits and meets and (HEAD_DTYPE not in os.environ or hasattr(LogitsProcessor._get_logits, "lockstep"))
    )


def _spin_condition() -> Any:
    """The class, or None in a version without it."""
    from vllm.distributed.device_communicators import shm_broadcast

    return getattr(shm_broadcast, "SpinCondition", None)


def _wait_patiently() -> None:
    condition = _spin_condition()
    if condition is None or getattr(condition.__init__, "lockstep", False):
        return
    original = condition.__init__

    def patient(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.busy_loop_s = SPIN_S

    patient.lockstep = True  # type: ignore[attr-defined]
    condition.__init__ = patient


def _meet_in_a_file() -> None:
    import torch.distributed

    original = torch.distributed.init_process_group
    if hasattr(original, "lockstep"):
        return

    def private(*args: Any, **kwargs: Any) -> None:
        if kwargs.get("world_size") == 1 and str(kwargs.get("init_method", "")).startswith("tcp://"):
            directory = os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.mkdtemp(prefix="lockstep-meet-")
            kwargs["init_method"] = f"file://{directory}/meet-{os.getpid()}"
        original(*args, **kwargs)

    private.lockstep = True  # type: ignore[attr-defined]
    torch.distributed.init_process_group = private


LOADABLE = "lockstep_loadable"


def _keep_loadable() -> None:
    """Have each layer whose weight is packed and thrown away keep the parameter, and its shape."""
    from vllm.model_executor.layers import utils

    original = getattr(utils, "dispatch_cpu_unquantized_gemm", None)
    remakes = importlib.util.find_spec("vllm.model_executor.model_loader.reload") is not None
    if original is None or remakes or hasattr(original, "lockstep"):
        return

    def keeping(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight
        original(layer, remove_weight)
        if layer.weight is not weight:
            kept = weight.shape, weight.dtype
            weight.data = weight.data.new_empty(0)  # its packed copy is the engine's own
            setattr(layer, LOADABLE, (weight, kept))

    keeping.lockstep = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = keeping


def unpack(model: Any) -> list[Any]:
    """Give each layer whose weight was packed a parameter to load into; returns them, to be packed again."""
    import torch

    layers = [layer for layer in model.modules() if hasattr(layer, LOADABLE)]
    for layer in layers:
        weight, (shape, dtype) = getattr(layer, LOADABLE)
        weight.data = torch.empty(shape, dtype=dtype)
        layer.weight = weight
    return layers


def _raise_head(name: str) -> None:
    import torch
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    original = LogitsProcessor._get_logits
    dtype = getattr(torch, name)
    if hasattr(original, "lockstep"):
        return

    def raised(self: Any, hidden_states: Any, lm_head: Any, embedding_bias: Any) -> Any:
        if not lm_head.weight.is_floating_point():
            raise ValueError(
                f"LOCKSTEP_HEAD_DTYPE={name} needs an unquantised lm_head, "
                f"this one holds {lm_head.weight.dtype}"
            )
        bias = None if embedding_bias is None else embedding_bias.to(dtype)
        logits = self._gather_logits(
            torch.nn.functional.linear(hidden_states.to(dtype), lm_head.weight.to(dtype), bias)
        )
        return None if logits is None else logits[..., : self.org_vocab_size]

    raised.lockstep = name  # type: ignore[attr-defined]
    LogitsProcessor._get_logits = raised
