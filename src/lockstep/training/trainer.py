"""The owner of the trainer's parameters. Nothing else reads, writes or copies a tensor of the model.

    score · hidden · slopes      what the model says of tokens           parity asks
    holding(variant)             the same, as another side may compute    parity asks
    step · rehearse              gate ─► gradients ─► update              the loop, layer 5
    publish · settle             the weights to the engines               weights/sync.py
    save · restore               checkpoints                              the loop
    describe · digests           what it is, for manifest and certificate

Device, dtypes, head and memory layout hide behind these verbs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lockstep.cluster.ranks import ONE, Ranks
from lockstep.config.recipe import Recipe
from lockstep.objectives.registry import needs_of
from lockstep.policy import pulls, slopes
from lockstep.policy.fingerprint import config_digest, trainer_environment, weights_digest, weights_mark
from lockstep.policy.logprobs import TokenScores
from lockstep.policy.model import Policy, load_policy, recompute_layers
from lockstep.policy.parameters import Snapshot, checkpoint_weights, parameters_of, spread
from lockstep.policy.pretrained import resolve_model
from lockstep.policy.pulls import Asked, Pulls
from lockstep.policy.slopes import Slope
from lockstep.policy.values import ValueHead
from lockstep.policy.variant_settings import base_of, epsilon_of, rotary_of
from lockstep.policy.variants import Variant, name_of_head
from lockstep.records.alarms import Override
from lockstep.records.samples import Group, Samples
from lockstep.records.versions import WeightUpdate
from lockstep.runs.checkpoints import Checkpoint
from lockstep.training import checkpoint, rehearsal
from lockstep.training.beside import Beside
from lockstep.training.optimizer import MasterAdamW
from lockstep.training.rehearsal import Rehearsal
from lockstep.training.step import Admission, train
from lockstep.training.versions import Before, Versions
from lockstep.weights.publish import Publisher
from lockstep.weights.ring import Ring


class Trainer:
    """The trainer's model, its optimizer, and the way of its weights to the engines.

    Args:
        publisher: given the model, makes what carries its weights; None for a trainer that no engine follows.
        reference_path: a checkpoint, loaded and frozen when an objective first asks for a reference model.
        ranks: the processes over which the policy is spread.
    """

    def __init__(
        self,
        policy: Policy,
        recipe: Recipe,
        publisher: Callable[[nn.Module], Publisher] | None = None,
        reference_path: Path | None = None,
        ranks: Ranks = ONE,
    ) -> None:
        self._policy = policy
        self._ranks = ranks
        self._recipe = recipe
        self._reference_path = reference_path
        self._publisher = publisher(policy.model) if publisher is not None and ranks.first else None
        if not ranks.first:
            checkpoint_weights(policy.model)  # as the first rank's publisher does when it is made
        # Asked at each use: while a variant is held, another policy stands here.
        self.versions = Versions(lambda: self._policy, Ring(0))

    @classmethod
    def load(
        cls,
        path: Path,
        recipe: Recipe,
        publisher: Callable[[nn.Module], Publisher] | None = None,
        ranks: Ranks = ONE,
    ) -> "Trainer":
        """From a checkpoint, placed where the recipe says, and spread over the ranks where they are several.

        Raises:
            UsageError: for a device that this machine does not have.
            ModelError: when it is no causal language model that Lockstep can score.
        """
        model = recipe.model
        policy = load_policy(path, model.dtype, model.head_dtype, model.device)
        if recipe.training.gradient_checkpointing:
            recompute_layers(policy.model)
        if ranks.count > 1:
            policy.head = spread(policy.model)
        other = recipe.objective.kl.reference
        return cls(policy, recipe, publisher, resolve_model(other) if other else path, ranks)

    # ── what it is ──────────────────────────────────────────────────────────────────────────────────────────

    @property
    def dtype(self) -> str:
        """The body's dtype, as torch names it: ``torch.float32``."""
        return str(self._policy.dtype)

    @property
    def head_dtype(self) -> str:
        """The dtype of the last matrix product."""
        return str(self._policy.head_dtype)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._policy.device

    @property
    def vocabulary(self) -> int:
        """Rows of the head; a tokenizer may have fewer ids."""
        return self._policy.head.shape[0]

    @property
    def head_name(self) -> str:
        """The name of the last matrix product's parameter, the embedding's own where they are tied."""
        return name_of_head(self._policy)

    @property
    def nbytes(self) -> int:
        """The size of one copy of the parameters, bytes."""
        return sum(p.nbytes for p in parameters_of(self._policy.model).values())

    @property
    def shares_prompts(self) -> bool:
        """True where the completions of a prompt share one pass over it, in packed rows."""
        return self._policy.share_prompts

    @property
    def rotary_base(self) -> float:
        """The base of the rotary embedding; NaN where positions are not rotary, of the default kind."""
        module = rotary_of(self._policy.model)
        return float("nan") if module is None else base_of(module.inv_freq)

    @property
    def norm_epsilon(self) -> float:
        """The epsilon of the first norm that has one under a usual name; NaN where none has."""
        return epsilon_of(self._policy.model)

    @property
    def softcap(self) -> float | None:
        """The value at which logits are soft-capped; None where they are not."""
        return self._policy.softcap

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration."""
        return self._policy.model.config.to_dict()

    @property
    def text_config(self) -> Any:
        """The part of the configuration that is of the language model."""
        return self._policy.model.config.get_text_config()

    @property
    def generation_config(self) -> Any:
        """The checkpoint's generation_config.json; None where it has none."""
        return getattr(self._policy.model, "generation_config", None)

    def describe(self) -> dict[str, Any]:
        """What of the trainer a certificate is void without."""
        return {
            "model_class": type(self._policy.model).__name__,
            "dtype": self.dtype,
            "head_dtype": self.head_dtype,
            "share_prompts": self.shares_prompts,
            **trainer_environment(self.device),
        }

    def digests(self) -> dict[str, str]:
        """SHA-256 of weights and configuration as they are now."""
        model = self._policy.model
        return {"weights_sha256": weights_digest(model), "config_sha256": config_digest(model)}

    def weights_mark(self) -> int:
        """Another number when a bit of the weights is another; within this process."""
        return weights_mark(self._policy.model)

    def choices(self) -> dict[str, tuple[str, str]]:
        """What was resolved in loading it, each with its reason."""
        return {
            "trainer.share_prompts": (str(self.shares_prompts), self._policy.reason),
            "trainer.device": (str(self.device), self._policy.placed),
        }

    # ── what the model says ─────────────────────────────────────────────────────────────────────────────────

    def score(self, groups: Sequence[Group], temperature: float, max_tokens: int = 4096) -> list[np.ndarray]:
        """Log-probabilities of every completion (score C): float32 [T_i] each, nats, group after group."""
        return self._policy.score(groups, temperature, max_tokens)

    def hidden(self, groups: Sequence[Group], max_tokens: int = 4096) -> list[Float[Tensor, "T D"]]:
        """The hidden states that predict each completion's tokens, in order over all groups."""
        return self._policy.hidden_of(groups, max_tokens)

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        """Whole distributions, fp32, for the few tokens that a hypothesis needs them for."""
        return self._policy.logits(hidden)

    @torch.no_grad()
    def project(self, hidden: Float[Tensor, "T D"], targets: Tensor, temperature: float) -> TokenScores:
        """From hidden states that predict ``targets`` to their log-probabilities."""
        return self._policy.project(hidden, targets, temperature)

    def versions_of(self, weights: Mapping[int, Snapshot]) -> Versions:
        """Earlier weights beside those of now, to replay sequences that span both."""
        ring = Ring(len(weights))
        for version, snapshot in weights.items():
            ring.remember(version, snapshot)
        return Versions(lambda: self._policy, ring)

    # ── hypotheses ──────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def holding(self, variant: Variant) -> Iterator[None]:
        """Every verb above answers as the variant would, until the context ends; then all is as it was.

        Raises:
            ModelError: where this model cannot be so.
        """
        before = self._policy
        with variant.held(before) as self._policy:
            try:
                yield
            finally:
                self._policy = before

    def snapshot(self) -> Snapshot:
        """Copies of the parameters as they are now."""
        return Snapshot.of(self._policy.model)

    def parameter_names(self, *, trained: bool = False) -> list[str]:
        """In the model's order, tied ones once; those alone that are trained where asked."""
        return [name for name, p in self._policy.model.named_parameters() if p.requires_grad or not trained]

    def slopes(
        self,
        groups: Sequence[Group],
        tokens: Int[np.ndarray, "N"],
        temperature: float,
        names: Sequence[str],
        towards: Snapshot | None = None,
        before_each: Callable[[], None] = lambda: None,
    ) -> list[Slope]:
        """How the log-probabilities of some tokens move, to first order, when parameters do.

        Args:
            groups: one completion each.
            tokens: places in the flat order of all completions' tokens.
            towards: the direction of each parameter is from what it is to what it was there; None: the
                parameter itself, which is a change of its scale.
            before_each: called before each token's backward pass; what it raises ends them.
        """
        # Of spread tensors there are none to be had: nothing moves, and so nothing is named.
        if self._ranks.count > 1:
            return [Slope(int(token), np.zeros(len(names))) for token in tokens]
        return slopes.slopes(self._policy, groups, tokens, temperature, names, towards, before_each)

    def pulls(
        self,
        groups: Sequence[Group],
        asked: Sequence[Asked],
        temperature: float,
    ) -> list[Pulls]:
        """What would move each sequence's log-probabilities as they have moved (``policy/pulls.py``)."""
        return pulls.pulls(
            self._policy, groups, asked, temperature, self._recipe.training.tokens_per_microbatch
        )

    # ── training ────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _optimizer(self) -> MasterAdamW:
        """Made when first needed: a check trains nothing, and masters of a bf16 model are twice its size."""
        training = self._recipe.training
        head = self._recipe.value_head
        updates = training.steps * training.minibatches
        return MasterAdamW(
            self._policy.model, self._recipe.optimizer, updates, self._beside.value_head, head.lr
        )

    @cached_property
    def _beside(self) -> Beside:
        """What the objective needs beside the policy; made when first needed."""
        needs = needs_of(self._recipe.objective)
        reference = None
        head = None
        if needs.reference:
            assert self._reference_path is not None, "a trainer without a checkpoint has no reference"
            model = self._recipe.model
            reference = load_policy(self._reference_path, model.dtype, model.head_dtype, model.device)
            reference.model.requires_grad_(False)
            reference.share_prompts = self._policy.share_prompts  # it scores the policy's own rows
        if needs.values:
            head = ValueHead(self._policy.head.shape[1], self.device)
        return Beside(reference, head)

    def keep_versions(self, depth: int, directory: Path | None = None) -> None:
        """From now on the weights of the last ``depth`` versions are kept, in memory or in a directory."""
        self.versions = Versions(lambda: self._policy, Ring(depth, directory))

    def step(
        self, rollouts: Samples, number: int, gate: Admission, before: Before | None = None
    ) -> dict[str, float]:
        """Train on one step's rollouts, once the gate has admitted every token.

        Args:
            before: scores of what earlier versions drew (``versions.before``); None: they drew nothing.

        Returns figures by catalog name.

        Raises:
            DivergenceError: for a non-finite loss or gradient.
            Exception: the gate's, before any weight has changed.
        """
        return train(
            rollouts,
            self._policy,
            self._optimizer,
            self._recipe,
            number,
            gate,
            self._beside,
            before,
            self._ranks,
        )

    def rehearse(self, rollouts: Samples, recipe: Recipe) -> Rehearsal:
        """What the training code makes of rollouts before any update; the gradients are thrown away.

        Raises:
            DivergenceError: for a loss that is no number.
        """
        return rehearsal.rehearse(rollouts, self._policy, recipe)

    # ── weights ─────────────────────────────────────────────────────────────────────────────────────────────

    def publish(self, version: int) -> WeightUpdate:
        """Make the weights as they are now available as ``version``.

        They must not change until :meth:`settle` has returned.
        """
        if not self._ranks.first:
            checkpoint_weights(self._policy.model)  # whole tensors, which all ranks gather together
            return WeightUpdate(version=version)
        assert self._publisher is not None, "no engine follows this trainer"
        return self._publisher.publish(version)

    def settle(self) -> None:
        """Every engine has loaded what was published."""
        if self._ranks.first:
            assert self._publisher is not None, "no engine follows this trainer"
            self._publisher.settle()

    def weights(self) -> dict[str, Tensor]:
        """Copies of the weights as they are now, under the names of the checkpoint."""
        return {
            name: tensor.detach().clone() for name, tensor in checkpoint_weights(self._policy.model).items()
        }

    def save(
        self,
        directory: Path,
        step: int,
        model_path: Path,
        also: Callable[[Path], None] = lambda partial: None,
        override: Override | None = None,
    ) -> Path:
        """Write a checkpoint that ``step`` steps are in, and remove older ones. Returns its path.

        Args:
            also: writes what else belongs to it.
            override: of a run that trained although the ladder did not pass.

        Raises:
            RunError: when it cannot be written; those that were there before are still there.
        """
        own = self._policy, self._optimizer
        return checkpoint.save_checkpoint(directory, step, *own, model_path, also, override)

    def restore(self, stored: Checkpoint) -> int:
        """Put a checkpoint's weights and optimizer state in place. Returns how many steps are in it.

        Raises:
            RunError: when it is not this model's; all is then as it was.
        """
        return checkpoint.load_checkpoint(stored, self._policy, self._optimizer)
