"""Publish weights over NCCL, for an engine on other GPUs than the trainer's, by the shared file's two calls.

vLLM receives through its own weight-transfer API (vllm/distributed/weight_transfer/nccl_engine.py, read at
0.18.1 and 0.32.0), one broadcast a tensor. The communicator's unique id travels to the worker as bytes in the
update; the trainer pickles nothing. After ``ncclCommInitRank`` vLLM's side issues a one-element all-reduce,
and this side must match it before anything else.

Read from the source, held to vLLM's signatures by the contract suite, and not run: Lockstep's own machines
have no GPU.
"""

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.cuda import nccl

from lockstep.errors import EngineError, UsageError
from lockstep.policy.parameters import checkpoint_weights
from lockstep.records.versions import NcclBroadcast, WeightUpdate

SETTLE_S = 1800.0


class NcclPublisher:
    """The trainer's side of a sync, rank 0 of ``world_size``.

    Args:
        directory: kept for the engine's start only; no file is written.
        n_receivers: the engine's model workers.
    """

    def __init__(self, model: nn.Module, directory: Path, n_receivers: int = 1) -> None:
        self.directory = directory
        self._model = model
        tensors = checkpoint_weights(model)
        elsewhere = next((name for name, tensor in tensors.items() if not tensor.is_cuda), None)
        if elsewhere is not None:
            raise UsageError(
                "recipe, key engine.weights",
                got=f"nccl, and {elsewhere} is not on a GPU",
                expected="a trainer on a GPU of its own",
                hint="--set engine.weights=shared_memory",
            )
        self._offer = NcclBroadcast(
            unique_id=nccl.unique_id(),
            world_size=n_receivers + 1,
            names=tuple(tensors),
            dtype_names=tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()),
            shapes=tuple(tuple(tensor.shape) for tensor in tensors.values()),
        )
        self._comm: Any = None
        self._sending: Future[None] | None = None

    def publish(self, version: int) -> WeightUpdate:
        """Start sending the present weights as ``version``; the engine's load receives them."""
        # One communicator carries one publish at a time, in the order in which the receivers' loads ask for
        # it.
        self.settle()
        self._sending = Future()
        # A daemon: one that a stuck receiver holds in NCCL must not hold the end of the process too.
        threading.Thread(target=self._carry, args=[self._sending], name="nccl-publisher", daemon=True).start()
        return WeightUpdate(version=version, nccl=self._offer)

    def settle(self) -> None:
        """Wait until everything that was published is sent; after that the weights may change.

        Raises:
            RuntimeError: NCCL's, when a receiver is gone.
            EngineError: when one neither takes what is sent nor goes.
        """
        sending = self._sending
        self._sending = None
        if sending is not None:
            try:
                sending.result(SETTLE_S)
            except TimeoutError:
                got = f"no end in {SETTLE_S:g} s"
                expected = "every receiver to take the weights"
                hint = "is the engine stuck in another collective? Its log says; NCCL_DEBUG=INFO says more"
                raise EngineError("weights, NCCL broadcast", got=got, expected=expected, hint=hint) from None

    def _carry(self, sent: "Future[None]") -> None:
        try:
            sent.set_result(self._send())
        except BaseException as error:
            sent.set_exception(error)

    def _send(self) -> None:
        tensors = checkpoint_weights(self._model)
        device = next(iter(tensors.values())).device
        with torch.cuda.device(device):
            if self._comm is None:
                self._comm = nccl.init_rank(self._offer.world_size, self._offer.unique_id, 0)
                # vLLM's side warms the communicator up with one; an unmatched collective would be paired with
                # the first tensor's.
                nccl.all_reduce([torch.zeros(1, device=device)], comms=[self._comm])
            for tensor in tensors.values():
                nccl.broadcast([tensor.detach().contiguous()], root=0, comms=[self._comm])
            # A broadcast is only queued when the call returns; the weights may change once this has.
            torch.cuda.synchronize(device)
