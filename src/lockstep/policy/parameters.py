"""A model's tensors by name: the one place that knows how they lie.

    parameters_of · named_weights     as they lie: what an optimizer steps, and what is written back into
    spread · whole                    over processes, by FSDP2; one of them in one piece again
    checkpoint_weights                all of them, whole, as a checkpoint holds them
    laid_as · assign · Snapshot       the way back
    in_layer                          which of a stack of layers one is of, by its name

Digests, publishers, checkpoints, the optimizer's state and the variants read and write through these alone.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer

from lockstep.errors import ModelError

_IN_LAYER = re.compile(r"^(.*?\.)(\d+)\.(.*)$")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of one spread over processes all of it, which every process asks for together.

    Its gradient is the sum of what each process has of it.
    """
    if not _is_spread(tensor):
        return tensor
    # Here: it costs a second to import, and one process has no use for it.
    from torch.distributed.tensor import Partial

    lies: Any = tensor
    return lies.full_tensor(grad_placements=[Partial()])


def spread(model: PreTrainedModel) -> Tensor:
    """Lay each tensor out over the processes of the default group, by FSDP2. Returns the head that is spread.

    A layer is gathered when it computes and let go behind it. Gradients are summed over the processes: each
    backward pass is of rows of its own (``cluster/ranks.py``).

    Raises:
        ModelError: for a head with a bias, which is not gathered.
    """
    from torch.distributed import get_world_size, init_device_mesh
    from torch.distributed.fsdp import fully_shard

    head: Any = model.get_output_embeddings()
    if head.bias is not None:
        where = f"model {type(model).__name__}, spread over ranks"
        hint = "lockstep train RECIPE, in one process"
        raise ModelError(where, got="a head with a bias", expected="one without", hint=hint)
    tied = head.weight is model.get_input_embeddings().weight
    mesh = init_device_mesh(model.device.type, (get_world_size(),))
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    # Never the model itself: a head is multiplied in pieces (``logprobs.py``), outside of any forward pass.
    for module in (*layers, model.base_model, *([] if tied else [head])):
        # The last to compute, too, is let go: what is written into the gathered tensor is lost.
        laid: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        laid.set_gradient_divide_factor(1.0)
        laid.set_force_sum_reduction_for_comms(True)
    if tied:
        head.weight = model.get_input_embeddings().weight
    return head.weight


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, tied ones once, under their first name."""
    return dict(model.named_parameters())


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the model's name; a tied tensor once, under its first name."""
    seen: set[int] = set()
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor
    return weights


@torch.no_grad()
def checkpoint_weights(model: nn.Module) -> dict[str, Tensor]:
    """The present weights as a checkpoint holds them, which is what an engine reads; tied ones once.

    transformers keeps some in another form, a layer's experts as one tensor, say: of those, copies. Others
    are the model's own.

    Wide types come first: safetensors allows no gap between tensors, so that order alone keeps each one
    aligned.
    """
    weights = {name: whole(tensor) for name, tensor in named_weights(model).items()}
    stored = revert_weight_conversion(model, weights) if isinstance(model, PreTrainedModel) else weights
    return dict(sorted(stored.items(), key=lambda item: -item[1].element_size()))


def laid_as(place: Any, value: Tensor) -> Tensor:
    """A whole value on the device of ``place``; where that one is spread, the part of it that lies here."""
    value = value.to(place.device)
    if not _is_spread(place):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, place.device_mesh, place.placements)


@torch.no_grad()
def assign(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy each whole value into the tensor of its name, in place."""
    for name, value in values.items():
        places[name].copy_(laid_as(places[name], value))


def _is_spread(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Copies of a model's parameters by name, as taken; tied ones once, under their first name."""

    values: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> "Snapshot":
        """The parameters as they are now."""
        return cls({name: whole(p.detach()).clone() for name, p in parameters_of(model).items()})

    @contextmanager
    @torch.no_grad()
    def standing_in(self, model: nn.Module) -> Iterator[None]:
        """These values in the model's parameters, to score with; afterwards they are what they were.

        Not to publish with, or to write into: a publisher sends the parameters' own memory, and what is
        written here changes the snapshot.
        """
        # A parameter points at the value: to copy a model in and out costs more than a short score under it.
        # The part of a spread one that lies here belongs to FSDP2, and is copied.
        parameters = parameters_of(model)
        spread = {name for name in self.values if _is_spread(parameters[name])}
        copied = {name: whole(parameters[name].detach()).clone() for name in spread}
        pointed = {name: parameters[name].data for name in self.values if name not in spread}
        try:
            for name, own in pointed.items():
                parameters[name].data = self.values[name].to(own)
            assign(parameters, {name: self.values[name] for name in spread})
            yield
        finally:
            for name, own in pointed.items():
                parameters[name].data = own
            assign(parameters, copied)


@dataclass(frozen=True)
class InLayer:
    """Where in a stack of layers a tensor lies: ``model.layers.`` ``3`` ``mlp.up_proj.weight``."""

    stack: str
    layer: int
    kind: str
    """The rest of its name, which its counterpart in every other layer has too."""


def in_layer(name: str) -> InLayer | None:
    """By the first number in the name: each family has its own word for the stack. None outside of one."""
    parts = _IN_LAYER.match(name)
    return None if parts is None else InLayer(parts[1], int(parts[2]), parts[3])
