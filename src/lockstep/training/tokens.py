"""Per-token values of a step, gathered as its microbatches go by, and the figures that they come to."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lockstep.config.recipe import Objective
from lockstep.metrics.reduce import kl_k3, policy_figures
from lockstep.objectives.base import LossInputs, LossOutputs
from lockstep.objectives.corrections.base import Correction


@dataclass
class StepTokens:
    """A step's numbers for each token that the model sampled; ratios before anything bounds them."""

    log_ratio: list[np.ndarray] = field(default_factory=list)
    clipped: list[np.ndarray] = field(default_factory=list)
    entropy: list[np.ndarray] = field(default_factory=list)
    other: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """What not every objective has, by the name of its field."""
    value_loss: list[float] = field(default_factory=list)
    margins: list[np.ndarray] = field(default_factory=list)
    """The margin of each pair, nats."""

    def add(self, inputs: LossInputs, outputs: LossOutputs, correction: Correction | None) -> None:
        """Add a microbatch's tokens."""
        self.log_ratio.append(_of(inputs, inputs.logprobs.detach() - inputs.old_logprobs))
        self.clipped.append(_of(inputs, outputs.clipped))
        assert inputs.entropy is not None
        self.entropy.append(_of(inputs, inputs.entropy))
        others = {
            "reference": None
            if inputs.reference_logprobs is None
            else inputs.reference_logprobs - inputs.logprobs.detach(),
            "weight": None if correction is None else correction.weights,
            "uncut": None if correction is None else correction.uncut,
            "old_values": inputs.old_values,
            "returns": inputs.returns,
        }
        for name, values in others.items():
            if values is not None:
                self.other.setdefault(name, []).append(_of(inputs, values))
        if outputs.value_loss is not None:
            self.value_loss.append(float(outputs.value_loss))
        if outputs.margins is not None:
            self.margins.append(outputs.margins.numpy(force=True))

    def figures(self, objective: Objective) -> dict[str, float]:
        """Figures by catalog name; what the objective does not have is absent."""
        other = {name: np.concatenate(parts).astype(np.float64) for name, parts in self.other.items()}
        figures = {
            **policy_figures(np.concatenate(self.log_ratio), objective.clip_low, objective.clip_high),
            "clip_fraction": float(np.concatenate(self.clipped).mean()),
            "entropy_mean_nats": float(np.concatenate(self.entropy).mean()),
        }
        if "reference" in other:
            figures["reference_kl_k3_nats"] = kl_k3(other["reference"])
        if "weight" in other:
            figures["correction_mass_removed"] = 1.0 - float(other["weight"].sum() / other["uncut"].sum())
            figures["correction_masked_fraction"] = float((other["weight"] == 0.0).mean())
        margins = np.concatenate([np.empty(0), *self.margins])
        if margins.size:
            figures["pair_margin_mean_nats"] = float(margins.mean())
            figures["pair_accuracy"] = float((margins > 0.0).mean())
        if self.value_loss:
            figures["value_loss"] = float(sum(self.value_loss))
            figures["value_explained_variance"] = explained_variance(other["old_values"], other["returns"])
        return figures


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """``1 − Var(returns − values) / Var(returns)``; NaN where all returns are alike."""
    spread = float(returns.var())
    return 1.0 - float((returns - values).var()) / spread if spread else float("nan")


@torch.no_grad()
def _of(inputs: LossInputs, values: Tensor) -> np.ndarray:
    return values[inputs.loss_mask].numpy(force=True)
