"""A second device without the hardware.

Tensors that were sent to ``cuda`` are computed on the CPU, and may not meet others.

A build of torch without CUDA cannot hold fake CUDA tensors through a backward pass (its autograd asks the
missing backend for a stream), so ``FakeTensorMode`` ends at the loss. Here values are real, and the whole
step runs: what asks for ``cuda`` gets a CPU tensor with a mark; what is computed from marked tensors is
marked; an operator that is given both kinds raises as CUDA would. Zero-dimensional CPU tensors and CPU
indices are welcome anywhere, as they are on a GPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
aten = torch.ops.aten
CROSSING = {aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
"""Their first argument decides; indices may lie on the CPU."""


class _Marks:
    """Which storages are on the device; each is kept alive, so that no address is used twice."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._held

    def add(self, tensor: Tensor) -> None:
        self._held[tensor.untyped_storage()._cdata] = tensor


class _Operators(TorchDispatchMode):
    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self._marks = marks

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [
            x
            for x in tree_flatten((args[:1] if func in INDEXED else args, kwargs))[0]
            if isinstance(x, Tensor)
        ]
        there = [x for x in tensors if x in self._marks]
        here = [x for x in tensors if x not in self._marks and x.dim() > 0]
        if there and here and func not in CROSSING:
            raise RuntimeError(f"{func}: {len(there)} arguments on cuda, {len(here)} on the CPU")
        out = func(*args, **kwargs)
        if there and func not in CROSSING:
            for x in tree_flatten(out)[0]:
                if isinstance(x, Tensor):
                    self._marks.add(x)
        return out


class PretendCuda(TorchFunctionMode):
    """Inside, ``cuda`` is a device."""

    def __init__(self) -> None:
        super().__init__()
        self._marks = _Marks()
        self._operators = _Operators(self._marks)

    def __enter__(self):
        self._operators.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self._operators.__exit__(*error)

    def send(self, tensor: Tensor) -> None:
        """From now on it is there."""
        self._marks.add(tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs: dict[str, Any] = dict(kwargs or {})
        if func == Tensor.device.__get__:  # a new wrapper at each access
            return CUDA if args[0] in self._marks else CPU
        if func is Tensor.numpy and args[0] in self._marks and not kwargs.get("force"):
            raise TypeError("can't convert a cuda tensor to numpy")
        return self._moved(func, args, kwargs)

    def _moved(self, func, args, kwargs):
        """The call without the device that it asks for, and the mark in its place."""
        positional = func is Tensor.to and len(args) > 1 and isinstance(args[1], torch.device | str)
        wanted = args[1] if positional else kwargs.get("device")
        kind = None if wanted is None else torch.device(wanted).type
        home = func is Tensor.cpu or (kind == "cpu" and func is Tensor.to)
        if home and args[0] in self._marks:
            return torch.from_numpy(args[0].numpy(force=True).copy())
        if kind != "cuda":
            return func(*args, **kwargs)
        out = (
            func(args[0], CPU, *args[2:], **kwargs) if positional else func(*args, **kwargs | {"device": CPU})
        )
        if out not in self._marks and func in (Tensor.to, torch.as_tensor):
            out = out.clone()
        self._marks.add(out)
        return out
