"""What would move log-probabilities as they have moved: every direction of every tensor, from one pass.

For a parameter W that may be W + θ·D, and weights a_i of the tokens, the pull of a group s towards D is

    N_s = Σ_{i ∈ s} a_i · ∂ log p_i / ∂θ = ⟨G_s, D⟩            G_s = ∂ (Σ_{i ∈ s} a_i · log p_i) / ∂W

With a_i the gap of token i it is the score of θ in s, up to the noise's scale (Rao 1948). One forward and one
backward pass over all groups give what a module took, x, what it put out, y, and δ = ∂ Σ a_i log p_i / ∂y;
each group, a prompt and its completions, lies in a block of its own in the packed row. For a matrix,
y = W x + b:

    D = W, a scale         N_s = Σ_{t ∈ s} δ_t · (y_t − b)            costs nothing more
    another D              N_s = Σ_{t ∈ s} δ_t · D x_t                one product more
    several of them        G_s = Σ_{t ∈ s} δ_t x_tᵀ, made once, for every D that is asked for, and dropped

No gradient of all parameters ever exists. The head lies behind the last δ: its directions, and those of the
distribution, are had token by token. Several weightings share the forward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lockstep.policy.model import Policy
from lockstep.policy.packing import Packed, pack
from lockstep.policy.parameters import whole
from lockstep.policy.truncation import CHUNK
from lockstep.records.samples import Group

HEAD = "head"
"""The last matrix product, whose tensor may be the input embedding's too."""
Towards = Callable[[str, Tensor], Tensor | None]
"""Name and whole value of a parameter → D, of its shape; None where it is not thought to have moved. ``HEAD``
is asked too."""


def scale(_: str, parameter: Tensor) -> Tensor:
    """The parameter itself: θ is how much it is scaled by, less 1."""
    return parameter


@dataclass(frozen=True, eq=False)
class Asked:
    """One weighting of the tokens, and the directions that are asked for under it."""

    weights: np.ndarray
    """a_i, float [T] over all completions' tokens in order."""
    families: Mapping[str, Towards]
    """Name → direction; ``scale`` costs nothing beside the backward pass."""


@dataclass(frozen=True, eq=False)
class Pulls:
    """The pull of each group towards each direction (family, parameter), under one weighting."""

    names: tuple[tuple[str, str], ...]
    sums: np.ndarray
    """N_s: float64 [K, G]."""
    temperature: np.ndarray
    """∂ log p_i / ∂ log T: float32 [T]."""
    uncovered: tuple[str, ...]
    """Parameters in modules that are not known to be linear in them."""


def pulls(
    policy: Policy,
    groups: Sequence[Group],
    asked: Sequence[Asked],
    temperature: float,
    max_row: int,
) -> list[Pulls]:
    """The pull of each group towards each direction of each parameter, under each weighting.

    Args:
        groups: each adds up to one pull; a completion whose pull is wanted alone is a group of its own.
        max_row: tokens of a row: what a backward pass keeps grows with it, and the directions are made anew
            for each.
    """
    taken = _Taken(policy, asked, groups)
    lengths = [len(completion) for group in groups for completion in group.completions]
    starts = np.r_[0, np.cumsum(lengths)]
    temperatures = np.empty(int(starts[-1]), np.float32)
    # Groups share no block, however alike their prompts are: what a block's prompt pulls is its group's.
    together = policy.share_prompts
    for row in pack(groups, max_row if together else 0, share_prompts=False, whole_groups=together):
        here = row.to(policy.device)
        order = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in row.completions])
        at = [torch.from_numpy(one.weights[order]).float().to(policy.device) for one in asked]
        with torch.enable_grad(), taken.tapping(row):
            hidden = policy.hidden(here)
            end = hidden.detach().requires_grad_()
            for asking, weights in enumerate(at):
                taken.asking = asking
                total = (policy.project(end, here.targets, temperature).logprobs * weights).sum()
                (slope,) = torch.autograd.grad(total, end)
                # Every tap is told its δ on the way.
                torch.autograd.grad(hidden, taken.start, slope, retain_graph=asking + 1 < len(at))
        temperatures[order] = taken.head(end.detach(), here, at, temperature).numpy(force=True)
    return [taken.pulls(number, temperatures) for number in range(len(asked))]


class _Taken:
    """What the taps of one pass after another have added up to."""

    def __init__(self, policy: Policy, asked: Sequence[Asked], groups: Sequence[Group]) -> None:
        self.policy = policy
        self.families = [one.families for one in asked]
        self.n = len(groups)
        self.group_of = np.repeat(np.arange(self.n), [len(group.completions) for group in groups])
        """The group of each completion, int [completions]."""
        self.asking = 0
        """The weighting whose backward pass runs."""
        self.sums: list[dict[tuple[str, str], np.ndarray]] = [{} for _ in asked]
        self.uncovered: set[str] = set()
        self.start: Tensor
        """The embedding's output: where the backward pass ends."""
        self._owners: Tensor
        """The group that each position of the row is of."""
        self._blocks: list[tuple[int, slice]]
        """The group and the positions of each block in the row."""

    def pulls(self, asking: int, temperatures: np.ndarray) -> Pulls:
        """The pulls under one weighting."""
        found = self.sums[asking]
        sums = np.stack(list(found.values())) if found else np.empty((0, self.n))
        return Pulls(tuple(found), sums, temperatures, tuple(sorted(self.uncovered)))

    @contextmanager
    def tapping(self, row: Packed) -> Iterator[None]:
        """While the model computes ``row``: every module with parameters of its own is tapped."""
        starts = [block.start for block in row.blocks]
        firsts = row.predictors[[span.start for span in row.spans]].numpy(force=True)
        # A block's completions are all of one group, and follow each other.
        _, at = np.unique(np.searchsorted(starts, firsts, side="right"), return_index=True)
        groups = self.group_of[np.array(row.completions)[at]].tolist()
        self._blocks = [(g, slice(b.start, b.stop)) for g, b in zip(groups, row.blocks, strict=True)]
        lengths = [block.stop - block.start for block in row.blocks]
        self._owners = torch.repeat_interleave(torch.tensor(groups), torch.tensor(lengths))
        embedding = self.policy.model.get_input_embeddings()
        handles = []
        for name, module in self.policy.model.base_model.named_modules(prefix=_prefix(self.policy)):
            own = dict(module.named_parameters(name, recurse=False))
            if own and not _linear(module):
                self.uncovered |= own.keys()
            elif own:
                handles.append(module.register_forward_hook(self._tap(own, module is embedding)))
        try:
            yield
            del self.start
        finally:
            for handle in handles:
                handle.remove()

    def _tap(self, own: Mapping[str, Tensor], first: bool) -> Callable[..., Tensor | None]:
        def tap(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None  # asked by _moved
            if first:
                output = output.detach().requires_grad_() + 0.0 if not output.requires_grad else output
                self.start = output
            # Detached here: a hook that held the output would hold its own graph, a circle that the garbage
            # collector cannot see into, and a row's activations would stay for ever; so would ``start``.
            x = args[0].detach()
            y = output.detach()
            output.register_hook(lambda slope: self._take(module, own, x, y, slope))
            return output if first else None

        return tap

    @torch.no_grad()
    def _take(
        self, module: nn.Module, own: Mapping[str, Tensor], x: Tensor, y: Tensor, slope: Tensor
    ) -> None:
        for name, parameter in own.items():
            value = whole(parameter.detach())
            ways = self.families[self.asking]
            towards = {f: d for f, way in ways.items() if (d := way(name, value)) is not None}
            others = {f: d for f, d in towards.items() if d is not value}
            if isinstance(module, nn.Linear) and not name.endswith("bias") and len(others) > 1:
                self._matrix(name, others, x.flatten(0, -2), slope.flatten(0, -2))
                towards = {f: d for f, d in towards.items() if d is value}
            for family, direction in towards.items():
                moved = _moved(module, name.rpartition(".")[2], value, direction, x, y)
                pulled = (slope.float() * moved.float()).sum(-1).reshape(-1)
                self._add(family, name, pulled, self._owners)

    def _matrix(self, name: str, towards: Mapping[str, Tensor], x: Tensor, slope: Tensor) -> None:
        directions = torch.stack([direction.float().flatten() for direction in towards.values()])
        for group, block in self._blocks:
            gradient = slope[block].float().T @ x[block].float()
            along = (directions @ gradient.flatten()).double().cpu().numpy()
            for family, value in zip(towards, along, strict=True):
                known = self.sums[self.asking].setdefault((family, name), np.zeros(self.n))
                known[group] += value

    def _add(self, family: str, name: str, values: Tensor, owners: Tensor) -> None:
        by_group = torch.zeros(self.n, dtype=torch.float64)
        by_group.index_add_(0, owners, values.double().cpu())
        so_far = self.sums[self.asking].setdefault((family, name), np.zeros(self.n))
        so_far += by_group.numpy()

    @torch.no_grad()
    def head(self, hidden: Tensor, row: Packed, at: Sequence[Tensor], temperature: float) -> Tensor:
        """The head's pulls under each weighting; returns the slopes of the temperature, float32 [T]."""
        head = whole(self.policy.head.detach())
        owners = torch.empty(len(row.targets), dtype=torch.int64)
        for number, span in zip(row.completions, row.spans, strict=True):
            owners[span] = int(self.group_of[number])
        ways = {family: way for families in self.families for family, way in families.items()}
        towards = {family: moved for family, way in ways.items() if (moved := way(HEAD, head)) is not None}
        slopes: dict[str, list[Tensor]] = {"": [], **{family: [] for family in towards}}
        for first in range(0, len(hidden), CHUNK):
            rows = slice(first, first + CHUNK)
            logits = self.policy.logits(hidden[rows]) / temperature
            p = logits.softmax(-1)
            targets = row.targets[rows, None]

            def slope_of(moved: Tensor, p: Tensor = p, targets: Tensor = targets) -> Tensor:
                return moved.gather(1, targets)[:, 0] - (p * moved).sum(-1)

            slopes[""].append(-slope_of(logits))
            for family, direction in towards.items():
                moved = hidden[rows].float() @ direction.float().T / temperature
                if self.policy.softcap is not None:
                    moved *= 1.0 - (logits * temperature / self.policy.softcap).square()
                slopes[family].append(slope_of(moved))
        joined = {family: torch.cat(parts) for family, parts in slopes.items()}
        for asking, weights in enumerate(at):
            self.asking = asking
            for family in towards.keys() & self.families[self.asking].keys():
                self._add(family, HEAD, joined[family] * weights, owners)
        return joined[""]


def _prefix(policy: Policy) -> str:
    """How the names of the base model's modules begin within the whole model."""
    (name,) = [name for name, module in policy.model.named_modules() if module is policy.model.base_model]
    return name


def _linear(module: nn.Module) -> bool:
    """True for a module that is linear in its parameters: a matrix, a table, or one scale for each
    feature."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return True
    own = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and all(parameter.dim() == 1 for parameter in own)


def _moved(module: nn.Module, name: str, value: Tensor, towards: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """f(x; W + D) − f(x; W) of what is not a matrix's own direction."""
    if isinstance(module, nn.Linear):
        if name == "bias":
            return towards.expand_as(y)
        if towards is not value:
            return functional.linear(x, towards.to(x.dtype))
        return y if module.bias is None else y - module.bias
    if isinstance(module, nn.Embedding):
        return y if towards is value else functional.embedding(x, towards)
    return functional_call(module, {name: value + towards}, x) - y
