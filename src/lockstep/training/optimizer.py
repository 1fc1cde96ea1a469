"""AdamW over fp32 weights, whatever the model's own dtype."""

import torch
from torch import Tensor, nn

from lockstep.config.recipe import Optimizer as OptimizerConfig
from lockstep.errors import DivergenceError
from lockstep.policy.parameters import laid_as, whole


class MasterAdamW:
    """AdamW with warm-up and gradient clipping.

    A bf16 parameter gets an fp32 master copy: with 8 bits of mantissa most updates of a small learning rate
    would round to nothing. An fp32 parameter is its own master. The optimizer changes parameters in place and
    never rebinds them, for they lie in the published memory (``weights/publish.py``).
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        self._adamw = torch.optim.AdamW(
            self.masters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def lr_at(self, update: int) -> float:
        """The learning rate of the ``update``-th optimizer step, counted from 0."""
        return self.config.lr * min(1.0, (update + 1) / (self.config.warmup_steps + 1))

    def step(self, update: int) -> float:
        """Clip, update, clear the gradients. Returns the gradient's norm before clipping.

        Raises:
            DivergenceError: for a non-finite norm; the weights are left as they were.
        """
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        norm = float(whole(nn.utils.clip_grad_norm_(self.masters, self.config.max_grad_norm)))
        if not norm < float("inf"):
            raise DivergenceError(
                "optimizer step",
                got=f"gradient norm {norm}",
                expected="a finite number",
                hint="lower optimizer.lr; look at rollouts/",
            )
        for group in self._adamw.param_groups:
            group["lr"] = self.lr_at(update)
        self._adamw.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        self.forget_gradients()
        return norm

    def forget_gradients(self) -> None:
        """Drop what has added up in the parameters and their masters."""
        for tensor in (*self.masters, *self.parameters):
            tensor.grad = None

    def state(self) -> dict[str, Tensor]:
        """Moments, step counts and masters by name, for a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True):
            for key, value in self._adamw.state[master].items():
                tensors[f"{key}.{name}"] = whole(value)
            if master is not parameter:
                tensors[f"master.{name}"] = whole(master)
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up the state that :meth:`state` gave."""
        with torch.no_grad():
            for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True):
                if f"exp_avg.{name}" in tensors:
                    moments = {
                        key: laid_as(master, tensors[f"{key}.{name}"]) for key in ("exp_avg", "exp_avg_sq")
                    }
                    self._adamw.state[master] = {"step": tensors[f"step.{name}"].to(master.device), **moments}
                if master is not parameter:
                    master.copy_(laid_as(master, tensors[f"master.{name}"]))
