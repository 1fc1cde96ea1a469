"""The files of a run, by the functions that write them and in the loop's order, around a tiny torch model."""

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch

from lockstep.config.recipe import Optimizer
from lockstep.policy.model import Policy, load_policy
from lockstep.records.samples import Sample, Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import AfterSync, BeforeStep, Verdict
from lockstep.records.versions import VersionSpan
from lockstep.rollout import store
from lockstep.runs.checkpoints import checked, keep_newest, newest_checked, newest_checkpoint
from lockstep.runs.durable import write_atomically
from lockstep.runs.layout import RunLayout, forget_partials, new_run
from lockstep.runs.read import read_steps
from lockstep.runs.record import open_recorder
from lockstep.runs.strict import drop_partial_line, read_lines
from lockstep.training.checkpoint import load_checkpoint, save_checkpoint
from lockstep.training.optimizer import MasterAdamW

STEPS, CHECKPOINT_EVERY, GROUP_SIZE = 3, 2, 2
SAMPLING = SamplingParams(max_tokens=5)
HOLDS = Verdict(layer="weights", status="PASS", summary="", n_tokens=1)


@dataclass
class Trainer:
    """A tiny model that can be put back to its first weights."""

    model_path: Path
    policy: Policy
    initial: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model_path: Path) -> "Trainer":
        """Loaded once; :meth:`restart` is cheap."""
        policy = load_policy(model_path, "float32", "float32")
        return cls(
            model_path, policy, {name: t.detach().clone() for name, t in policy.model.state_dict().items()}
        )

    def restart(self) -> None:
        """As a new process finds it."""
        self.policy.model.load_state_dict(self.initial)
        self.optimizer = MasterAdamW(self.policy.model, Optimizer(lr=1e-2))

    def weights(self) -> dict[str, bytes]:
        """Bytes of all tensors, the optimizer's too."""
        tensors = {**self.policy.model.state_dict(), **self.optimizer.state()}
        return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}

    def draw(self, step: int) -> Samples:
        """What these weights would draw: its numbers depend on them."""
        weight = float(self.policy.head.detach().double().sum())
        samples = [
            Sample(
                group=0,
                sample=s,
                item=step,
                prompt_ids=np.arange(3, dtype=np.int32),
                token_ids=np.arange(step + s, step + s + 5, dtype=np.int32),
                loss_mask=np.ones(5, bool),
                engine_logprobs=np.full(5, weight + s, np.float32),
                version_spans=(VersionSpan(0, 5, step),),
                finish_reason="stop",
                text="text",
            )
            for s in range(GROUP_SIZE)
        ]
        return Samples(samples, SAMPLING, step=step)

    def train(self, rollouts: Samples) -> None:
        """One optimizer step that is a function of the weights and the rollouts alone."""
        assert rollouts.step is not None
        value = float(rollouts.engine_logprobs[0]) + float(rollouts.advantages.sum())
        for parameter in self.optimizer.parameters:
            parameter.grad = (
                torch.full_like(parameter, float(np.sin(value))) + parameter.detach().sign() * 0.1
            )
        self.optimizer.step(rollouts.step)


def score(rollouts: Samples) -> Samples:
    """Rewards and advantages that say which step they are of."""
    rewards = np.arange(GROUP_SIZE) + (rollouts.step or 0) * 1.0
    rollouts.samples = [
        replace(sample, reward=reward) for sample, reward in zip(rollouts, rewards.tolist(), strict=True)
    ]
    rollouts.fill(advantages=np.repeat(rewards.astype(np.float32), rollouts.lengths))
    return rollouts


def start(root: Path, trainer: Trainer) -> RunLayout:
    """A whole run, from its directory to its last checkpoint; started again where no manifest was written."""
    layout = RunLayout(root) if (root / "manifest.json").is_file() else new_run(root)
    trainer.restart()
    with layout.held():
        forget_partials(layout)
        if not layout.manifest.is_file():
            write_atomically(layout.manifest, b'{"schema": "lockstep.manifest/1"}')
        for path in (layout.metrics, layout.verdicts):
            drop_partial_line(path)
        checkpoint = newest_checked(layout.checkpoints, lambda told: None)
        first = load_checkpoint(checkpoint, trainer.policy, trainer.optimizer) if checkpoint else 0
        keep_newest(layout.checkpoints)
        open_recorder(layout).verdict(BeforeStep(first), HOLDS)
        write_atomically(layout.certificate, b'{"schema": "lockstep.certificate/1"}')
        for step in range(first, STEPS):
            one_step(layout, trainer, step)
    return layout


def one_step(layout: RunLayout, trainer: Trainer, step: int) -> None:
    """Drawn ─► scored ─► admitted ─► trained ─► synced ─► metrics ─► checkpoint.

    What is there already is not made again.
    """
    if layout.rollouts(step).is_file():
        rollouts = store.load(layout.rollouts(step), GROUP_SIZE, SAMPLING)
    else:
        if layout.drawn(step).is_file():
            rollouts = store.load(layout.drawn(step), GROUP_SIZE, SAMPLING)
        else:
            rollouts = trainer.draw(step)
            store.save(layout.drawn(step), rollouts)
        if not rollouts.rewarded:
            score(rollouts)
            store.save(layout.drawn(step), rollouts)
        store.admit(layout, step)
    trainer.train(rollouts)
    open_recorder(layout).verdict(AfterSync(step + 1), HOLDS)
    if step not in {record.step for record in read_steps(layout.metrics)}:
        open_recorder(layout).step(step, step + 1, {"loss": float(step)})
    if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == STEPS:
        save_checkpoint(layout.checkpoints, step + 1, trainer.policy, trainer.optimizer, trainer.model_path)


def assert_finished(layout: RunLayout, trainer: Trainer, undisturbed: dict[str, bytes]) -> None:
    """As the run that nothing happened to.

    Same weights, every step once, the last checkpoint there and nothing half-written.
    """
    assert trainer.weights() == undisturbed
    assert [record.step for record in read_steps(layout.metrics)] == list(range(STEPS))
    last = newest_checkpoint(layout.checkpoints)
    assert last is not None
    assert last.name == f"step-{STEPS:06d}"
    trainer.restart()
    assert load_checkpoint(checked(last), trainer.policy, trainer.optimizer) == STEPS
    assert trainer.weights() == undisturbed
    assert [path.name for path in layout.checkpoints.iterdir()] == [last.name]


def assert_nothing_half_written(root: Path) -> None:
    """Every file that lies under its own name is whole, and nothing else lies there."""
    for path in root.rglob("*"):
        assert ".partial-" not in path.name, path
        if path.suffix == ".json":
            msgspec.json.decode(path.read_bytes())
        elif path.suffix == ".jsonl":
            assert path.read_bytes()[-1:] in (b"", b"\n"), path
            read_lines(path)
        elif path.suffix == ".parquet":
            store.load(path, GROUP_SIZE, SAMPLING)
    layout = RunLayout(root)
    assert len(list(layout.checkpoints.glob("step-*"))) <= 2
    if (newest := newest_checkpoint(layout.checkpoints)) is not None:
        assert newest.name.startswith("step-")
