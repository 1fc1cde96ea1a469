"""AdamW over fp32 weights, whatever the model's own dtype."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lockstep.config.recipe import Optimizer as OptimizerConfig
from lockstep.errors import DivergenceError, RecipeError
from lockstep.policy.parameters import laid_as, whole

BESIDE = "beside."
"""Begins the names of what is trained and is no part of the model."""
WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
"""Schedules that transformers passes no options to: they would be ignored."""
ASKED = 1000
"""Optimizer steps, evenly over the run, at which a schedule must give a number before the run begins."""


def _schedule(config: OptimizerConfig, updates: int) -> Callable[[int], float]:
    """The share of the learning rate at each optimizer step, counted from 0.

    Raises:
        RecipeError: where transformers has no such schedule with these options, or it is none.
    """
    if config.schedule in WITHOUT_OPTIONS and config.schedule_options:
        raise _refused(config, "options of a schedule that has none")
    if config.schedule == "constant":  # warmed up from 1 / (n + 1): at 0 the first update would be none
        return lambda update: min(1.0, (update + 1) / (config.warmup_steps + 1))
    from transformers import get_scheduler

    # transformers has a schedule as a function of the step, within an optimizer's: of one that holds nothing,
    # at the same rate, which lowest rates are a share of.
    nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    asked_for = config.schedule, nothing, config.warmup_steps, updates
    try:
        made = get_scheduler(*asked_for, scheduler_specific_kwargs=dict(config.schedule_options))
        share = made.lr_lambdas[0]
        # Some options are read only when their part of the schedule comes.
        asked = [share(update) for update in range(0, updates, max(1, updates // ASKED))]
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise _refused(config, str(error)) from error
    if not all(0.0 <= value < float("inf") for value in asked):
        raise _refused(config, "a learning rate that is negative or no number")
    return share


def refuse_schedule(config: OptimizerConfig, updates: int) -> None:
    """Refuse a schedule that cannot be, before anything is started.

    Args:
        updates: optimizer steps of the whole run.

    Raises:
        RecipeError: says why.
    """
    _schedule(config, updates)


def _refused(config: OptimizerConfig, why: str) -> RecipeError:
    return RecipeError(
        "recipe, key optimizer.schedule_options",
        got=f"{config.schedule_options or 'none'} for {config.schedule!r} ({why})",
        expected="the keyword arguments that transformers' schedule of that name takes",
        hint="transformers.get_scheduler has them; --set optimizer.schedule=constant needs none",
    )


class MasterAdamW:
    """AdamW with warm-up and gradient clipping.

    A bf16 parameter gets an fp32 master copy: with 8 bits of mantissa most updates of a small learning rate
    would round to nothing. An fp32 parameter is its own master. The optimizer changes parameters in place and
    never rebinds them, for they lie in the published memory (``weights/publish.py``).

    Args:
        updates: optimizer steps of the whole run, for schedules that end with it.
        beside: what else is trained, in a group of its own at ``beside_lr``; it follows the schedule.

    Raises:
        RecipeError: for a schedule that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        updates: int = 1,
        beside: nn.Module | None = None,
        beside_lr: float = 0.0,
    ) -> None:
        self.config = config
        self._share = _schedule(config, updates)
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        groups = [{"params": self.masters, "lr": config.lr}]
        n_own = len(self.masters)
        if beside is not None:
            for name, parameter in beside.named_parameters():
                self.names.append(f"{BESIDE}{name}")
                self.parameters.append(parameter)
                self.masters.append(parameter)
            groups = [
                {"params": self.masters[:n_own], "lr": config.lr},
                {"params": self.masters[n_own:], "lr": beside_lr},
            ]
        self._bases = [config.lr, beside_lr][: len(groups)]
        self._n_own = n_own
        self._adamw = torch.optim.AdamW(
            groups,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def lr_at(self, update: int) -> float:
        """The learning rate of the ``update``-th optimizer step, counted from 0."""
        return self.config.lr * self._share(update)

    def step(self, update: int) -> float:
        """Clip, update, clear the gradients. Returns the norm of the model's gradient before clipping.

        Raises:
            DivergenceError: for a non-finite norm; the weights are left as they were.
        """
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        # Each group by its own norm: a value head's is no measure of the model's.
        parts = {"model": self.masters[: self._n_own], "value head": self.masters[self._n_own :]}
        norms = {
            name: float(whole(nn.utils.clip_grad_norm_(part, self.config.max_grad_norm)))
            for name, part in parts.items()
            if part
        }
        for name, norm in norms.items():
            if not norm < float("inf"):  # a NaN is not less
                raise DivergenceError(
                    f"optimizer step, {name}",
                    got=f"gradient norm {norm}",
                    expected="a finite number",
                    hint="lower optimizer.lr; look at rollouts/",
                )
        for group, base in zip(self._adamw.param_groups, self._bases, strict=True):
            group["lr"] = base * self._share(update)
        self._adamw.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        self.forget_gradients()
        return norms["model"]

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
            if self.keeps(name, master, parameter):
                tensors[f"master.{name}"] = whole(master)
        return tensors

    @staticmethod
    def keeps(name: str, master: Tensor, parameter: Tensor) -> bool:
        """True for a parameter that a checkpoint's weights do not hold as it is here."""
        return master is not parameter or name.startswith(BESIDE)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up the state that :meth:`state` gave."""
        with torch.no_grad():
            for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True):
                if f"exp_avg.{name}" in tensors:
                    moments = {
                        key: laid_as(master, tensors[f"{key}.{name}"]) for key in ("exp_avg", "exp_avg_sq")
                    }
                    # On the device, where the fused kernel counts its steps.
                    self._adamw.state[master] = {"step": tensors[f"step.{name}"].to(master.device), **moments}
                if self.keeps(name, master, parameter):
                    master.copy_(laid_as(master, tensors[f"master.{name}"]))
