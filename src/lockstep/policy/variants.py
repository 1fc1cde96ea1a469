"""The trainer's model as another side may hold it: one hypothesis each, held while something is scored.

    with trainer.holding(Scaled(("model.norm.weight",), 1.05)):
        scores = trainer.score(groups, 1.0)

A variant in place changes tensors or settings of the policy's own model and puts them back exactly. A variant
by copy is another policy of the same weights. Nothing here knows what is being looked for. Variants that are
one number each: ``variant_settings.py``.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lockstep.errors import ModelError
from lockstep.policy.model import Policy
from lockstep.policy.parameters import Snapshot, assign, parameters_of, whole

INT8_LEVELS = 127.0
INT4_LEVELS = 7.0
INT4_GROUP = 128
"""Weights of a row that share one scale: what GPTQ, AWQ and their kin take where it divides the row."""


class Variant(Protocol):
    """One hypothesis about how a side computes."""

    def held(self, policy: Policy) -> AbstractContextManager[Policy]:
        """The policy to score with while the hypothesis is held.

        Raises:
            ModelError: where this model cannot be so.
        """
        ...


@dataclass(frozen=True)
class Steady:
    """Dropout off, and one sequence a row."""

    @contextmanager
    def held(self, policy: Policy) -> Iterator[Policy]:
        """See :class:`Variant`."""
        training = policy.model.training
        if training:
            policy.model.eval()
        try:
            with holding_attributes([(policy, "alone")], True):
                yield policy
        finally:
            if training:
                policy.model.train()


@dataclass(frozen=True, eq=False)
class Perturbed:
    """Noise on every parameter, of ``scale`` times its root mean square."""

    before: Snapshot
    """The weights as they are, which are put back."""
    scale: float
    seed: int

    @contextmanager
    def held(self, policy: Policy) -> Iterator[Policy]:
        """See :class:`Variant`."""
        parameters = parameters_of(policy.model)
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU: the same noise on every device
        try:
            for name, value in self.before.values.items():
                size = self.scale * value.float().square().mean().sqrt()
                noise = torch.randn(value.shape, generator=generator).to(value.device) * size
                assign(parameters, {name: value + noise.to(value.dtype)})
            yield policy
        finally:
            assign(parameters, self.before.values)


@dataclass(frozen=True, eq=False)
class Earlier:
    """Parameters as they were at a snapshot: those named, or all."""

    snapshot: Snapshot
    names: tuple[str, ...] | None = None

    def held(self, policy: Policy) -> AbstractContextManager[Policy]:
        """See :class:`Variant`."""
        chosen = (
            self.snapshot.values
            if self.names is None
            else {name: self.snapshot.values[name] for name in self.names}
        )
        return _with_values(policy, lambda name, _: chosen.get(name), chosen)


def name_of_head(policy: Policy) -> str:
    """The name of the head's parameter; tied to the embedding, the embedding's."""
    (name,) = [name for name, parameter in policy.model.named_parameters() if parameter is policy.head]
    return name


@dataclass(frozen=True, eq=False)
class EarlierHead:
    """The body as it is under the head of a snapshot."""

    snapshot: Snapshot

    @contextmanager
    def held(self, policy: Policy) -> Iterator[Policy]:
        """See :class:`Variant`."""
        yield replace(policy, head=self.snapshot.values[name_of_head(policy)])


@dataclass(frozen=True)
class Scaled:
    """Parameters multiplied by a constant."""

    names: tuple[str, ...]
    factor: float

    def held(self, policy: Policy) -> AbstractContextManager[Policy]:
        """See :class:`Variant`."""
        return _with_values(policy, lambda _, tensor: tensor * self.factor, self.names)


@dataclass(frozen=True)
class RoundedThrough:
    """Every fp32 parameter after a way through a coarser dtype and back."""

    dtype: str

    def held(self, policy: Policy) -> AbstractContextManager[Policy]:
        """See :class:`Variant`."""
        names = [
            name for name, parameter in policy.model.named_parameters() if parameter.dtype == torch.float32
        ]
        return _with_values(policy, lambda _, tensor: tensor.to(dtype_of(self.dtype)).float(), names)


@dataclass(frozen=True)
class InDtype:
    """Body and head in other precisions; None leaves one as it is.

    Buffers stay: rotary frequencies are fp32 on every side.
    """

    body: str | None = None
    head: str | None = None

    @contextmanager
    def held(self, policy: Policy) -> Iterator[Policy]:
        """See :class:`Variant`."""
        head_dtype = dtype_of(self.head) if self.head else policy.head_dtype
        if self.body is None:
            yield replace(policy, head_dtype=head_dtype)
            return
        dtype = dtype_of(self.body)
        yield replace(_copied(policy, lambda _, weight: weight.to(dtype)), head_dtype=head_dtype)


@dataclass(frozen=True)
class Quantised:
    """The matrices of the layers rounded, a scale for each row.

    Embeddings and head are left, as quantisers leave them.
    """

    form: str
    """A name in :data:`QUANTISED`."""

    @contextmanager
    def held(self, policy: Policy) -> Iterator[Policy]:
        """See :class:`Variant`."""
        form = QUANTISED[self.form]
        with torch.no_grad():
            quantised = _copied(
                policy, lambda is_end, weight: form(weight) if weight.dim() == 2 and not is_end else weight
            )
        yield quantised


@dataclass(frozen=True)
class Along:
    """Parameters moved along a direction: their own, which scales them, or towards their quantised values."""

    family: str
    """``scaled``, or a name in :data:`QUANTISED`."""
    names: tuple[str, ...]
    theta: float

    def held(self, policy: Policy) -> AbstractContextManager[Policy]:
        """See :class:`Variant`."""
        towards = QUANTISED.get(self.family)

        def moved(_: str, tensor: Tensor) -> Tensor:
            wide = tensor.float()
            direction = wide if towards is None else towards(tensor).float() - wide
            return (wide + self.theta * direction).to(tensor.dtype)

        return _with_values(policy, moved, self.names)


@dataclass(frozen=True)
class Configured:
    """The same weights in a model built with other settings, each by its path in the configuration."""

    settings: Mapping[tuple[str, ...], Any]

    @contextmanager
    def held(self, policy: Policy) -> Iterator[Policy]:
        """See :class:`Variant`."""
        yield self._built(policy)

    def _built(self, policy: Policy) -> Policy:
        config = copy.deepcopy(policy.model.config)
        for path, value in self.settings.items():
            *parents, last = path
            holder: Any = config
            for name in parents:
                holder = holder[name] if isinstance(holder, dict) else getattr(holder, name)
            holder.update({last: value}) if isinstance(holder, dict) else setattr(holder, last, value)
        with contextlib.suppress(
            ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError
        ):
            model: Any = type(policy.model)(config).eval()
            # Assigned: over the very tensors, of which a copy would be a second model in memory.
            model.load_state_dict(policy.model.state_dict(), strict=False, assign=True)
            return _over(policy, model)
        names = ", ".join(".".join(path) for path in self.settings)
        raise ModelError(
            f"model configuration, {names}",
            got=", ".join(map(repr, self.settings.values())),
            expected="settings with which these weights make a model",
            hint="compare the engine's configuration with the checkpoint's config.json",
        )


def dtype_of(name: str) -> torch.dtype:
    """``bfloat16`` or ``torch.bfloat16`` as torch has it."""
    return getattr(torch, name.removeprefix("torch."))


@contextmanager
def holding_attributes(places: Sequence[tuple[Any, str]], value: Any) -> Iterator[None]:
    """Attributes with another value, all with the same."""
    before = [getattr(holder, name) for holder, name in places]
    for holder, name in places:
        setattr(holder, name, value)
    try:
        yield
    finally:
        for (holder, name), old in zip(places, before, strict=True):
            setattr(holder, name, old)


@contextmanager
def _with_values(
    policy: Policy, value_of: Callable[[str, Tensor], Tensor | None], names: Sequence[str] | Mapping[str, Any]
) -> Iterator[Policy]:
    """The policy's own model with other values in the parameters ``names``."""
    parameters = parameters_of(policy.model)
    # Cloned: this is what is put back, and a view would change with the parameter.
    now = {name: whole(parameters[name].detach()).clone() for name in names}
    assign(
        parameters, {name: value for name, old in now.items() if (value := value_of(name, old)) is not None}
    )
    try:
        yield policy
    finally:
        assign(parameters, now)


def _copied(policy: Policy, change: Callable[[bool, Tensor], Tensor]) -> Policy:
    """A copy of the policy with each parameter through ``change(is an embedding or the head, parameter)``."""
    model: Any = copy.deepcopy(policy.model)
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for parameter in model.parameters():
        parameter.data = change(id(parameter) in ends, parameter.data)
    return _over(policy, model)


def _over(policy: Policy, model: Any) -> Policy:
    """The policy over another model of its kind."""
    head = model.get_output_embeddings()
    return replace(policy, model=model, head=head.weight, head_bias=getattr(head, "bias", None))


def _by_largest(weight: Tensor, levels: float) -> Tensor:
    """Rounded to whole steps, of which ``levels`` reach the largest number of a row."""
    step = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / levels  # of a row of zeros: not 0 / 0
    return (weight / step).round() * step


def _int8(weight: Tensor) -> Tensor:
    return _by_largest(weight, INT8_LEVELS)


def _int4(weight: Tensor) -> Tensor:
    size = INT4_GROUP if weight.shape[-1] % INT4_GROUP == 0 else weight.shape[-1]
    return _by_largest(weight.unflatten(-1, (-1, size)), INT4_LEVELS).flatten(-2)


def _fp8(weight: Tensor) -> Tensor:
    return _to_fp8(weight, weight.abs().amax(-1, keepdim=True))


def _fp8_tensor(weight: Tensor) -> Tensor:
    return _to_fp8(weight, weight.abs().amax())


def _to_fp8(weight: Tensor, largest: Tensor) -> Tensor:
    scale = largest.clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn).to(weight.dtype) * scale


def _bf16_cut(weight: Tensor) -> Tensor:
    """The lower half of each fp32 number left out: what a conversion does that does not round."""
    return (weight.float().contiguous().view(torch.int32) & -65536).view(torch.float32).to(weight.dtype)


QUANTISED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "int8": _int8,
    "int4": _int4,
    "fp8_e4m3": _fp8,
    "fp8_e4m3_tensor": _fp8_tensor,
    "bf16_cut": _bf16_cut,
}
"""Form → what it makes of a matrix. A scale for each row, for int4 of each group of a row, for ``_tensor`` of
all."""
