"""A trainer spread over processes by FSDP2: every rank runs the whole loop, and one of them has the engine.

    torchrun --standalone --nproc-per-node 2 -m lockstep.cluster.ranks train recipes/quickstart.toml

    rank 0   engine ──reply──► told ──► gate, layers, canary ──► rows 0, 2, … ─┐
                                │                                              ├─ sum ─► its part of a tensor
    rank 1                      └─────► gate, layers, canary ──► rows 1, 3, … ─┘

What the engine and the reward functions answer is told to all, so that each rank comes to the same decision
at the same place, and no two wait for each other. Each keeps a part of every tensor, of its gradient and of
the optimizer's state. Rows with a backward pass are shared out; those without one are scored by every rank.
The first rank writes the run; the others write theirs into a directory that goes with them.
"""

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from lockstep import errors
from lockstep.config.recipe import Recipe, TaskConfig
from lockstep.engines.base import Engine, EngineFacts
from lockstep.records.messages import Ready
from lockstep.records.tokens import Completion, SamplingParams
from lockstep.records.versions import LoadMode, LoadReceipt, WeightUpdate
from lockstep.rollout.rewards import Item
from lockstep.rollout.tasks import Task

if TYPE_CHECKING:  # the command line comes by here, and torch takes seconds to import
    from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(hours=1)
"""How long a rank waits for another: the first one may start an engine meanwhile."""
LAUNCHED = "LOCKSTEP_RANK_SCRATCH"
"""In the environment of a rank: the directory that goes with it, empty for the first one."""
ALONE = ("--resume", "--continue", "--dry-run", "--plant")
"""Flags of ``lockstep train`` that are for one process."""
NO_SEARCH_S = 1e-9
"""A search for a cause ends by the clock, and each rank has its own: one process names it, several do not."""
OF_TORCHRUN = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_",
    "ROLE_",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_",
    "TORCHELASTIC_",
)
"""How torchrun's variables begin: an engine that inherited them would look for ranks of its own."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes of one trainer, and which of them this is. By default there is one."""

    number: int = 0
    count: int = 1
    group: Any = None
    """The process group of what :meth:`broadcast` sends: beside a load, another thread may be scoring."""

    @property
    def first(self) -> bool:
        """True where the engine is."""
        return self.number == 0

    def turns(self, items: Sequence[T]) -> list[Sequence[T]]:
        """In order, as many at a time as there are ranks; each computes the one of its number."""
        return [items[at : at + self.count] for at in range(0, len(items), self.count)]

    def own(self, turn: Sequence[T]) -> T:
        """What this rank computes in a turn.

        All compute, for FSDP2 gathers from all: in a short turn some compute one again, for nothing.
        """
        return turn[self.number % len(turn)]

    def shared(self, turn: Sequence[object], own: Sequence["Tensor"]) -> "list[Sequence[Tensor]]":
        """The numbers of each of a turn: those that this rank computed with their graph.

        Args:
            own: what this rank computed, float32 [T] each.
        """
        if self.count == 1:
            return [own]
        import torch
        from torch import distributed

        found: list[Sequence[Tensor]] = []
        for rank in range(len(turn)):
            here = rank == self.number
            length = torch.tensor([len(own[0])], device=own[0].device)
            distributed.broadcast(length, rank)
            numbers = (
                torch.stack([one.detach() for one in own])
                if here
                else own[0].new_empty(len(own), int(length))
            )
            distributed.broadcast(numbers, rank)
            found.append(own if here else numbers.unbind())
        return found

    def owed(self, losses: Sequence["Tensor"], own: Sequence["Tensor"]) -> "Tensor":
        """The loss that this rank sends back: of a short turn a surplus rank's is 0."""
        if self.number < len(losses):
            return losses[self.number]
        import torch

        return torch.stack([0.0 * one.sum() for one in own]).sum()

    def add_up(self, gradients: Sequence["Tensor | None"]) -> None:
        """Sum gradients of what every rank holds whole, in place."""
        if self.count > 1:
            from torch import distributed

            for gradient in gradients:
                distributed.all_reduce(gradient)

    def broadcast(self, ask: Callable[[], T], kind: Any) -> T:
        """Give every rank what the first rank's ``ask`` answers, or raise there the error that it raises.

        Args:
            kind: the answer's type, as msgspec decodes it.
        """
        if self.count == 1:
            return ask()
        answer: tuple[str, Any] = ("", None)
        raised: errors.LockstepError | None = None
        if self.first:
            try:
                answer = ("", ask())
            except errors.LockstepError as error:
                raised = error
                answer = (type(error).__name__, (error.boundary, error.got, error.expected, error.hint))
        data = self._sent(msgspec.msgpack.encode(answer) if self.first else b"")
        if raised is not None:
            raise raised
        name, said = msgspec.msgpack.decode(data, type=tuple[str, msgspec.Raw])
        if name:
            boundary, got, expected, hint = msgspec.msgpack.decode(said)
            raise getattr(errors, name, errors.EngineError)(boundary, got=got, expected=expected, hint=hint)
        return msgspec.msgpack.decode(said, type=kind)

    def _sent(self, data: bytes) -> bytes:
        import torch
        from torch import distributed

        size = torch.tensor([len(data)])
        distributed.broadcast(size, 0, group=self.group)
        sent = bytearray(data) if self.first else bytearray(int(size))
        distributed.broadcast(torch.frombuffer(sent, dtype=torch.uint8), 0, group=self.group)
        return bytes(sent)

    # ── what the loop holds in place of its own ─────────────────────────────────────────────────────────────

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe as a pair of these ranks has it: nothing is tried that the clock would end."""
        if self.count == 1:
            return recipe
        parity = msgspec.structs.replace(recipe.parity, search_s=NO_SEARCH_S)
        return msgspec.structs.replace(recipe, parity=parity)

    def engine(self, launch: Callable[[], Engine]) -> Engine:
        """The first rank's, asked by all; with one rank the engine itself."""
        if self.count == 1:
            return launch()
        return ToldEngine(self, launch() if self.first else None)

    def task(self, config: TaskConfig, seed: int) -> Task:
        """The task, whose rewards the first rank computes."""
        return Task(config, seed) if self.count == 1 else ToldTask(self, config, seed)


ONE = Ranks()


def refuse_ranks(recipe: Recipe) -> None:
    """Where this process is one rank of several: refuse what only one can run.

    Raises:
        UsageError: names it.
    """
    if LAUNCHED not in os.environ:
        return
    if scratch := os.environ[LAUNCHED]:
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)  # after the run's summary
    refused = {
        f"loop.kind = {recipe.loop.kind}": recipe.loop.kind != "sync",
        "a task with an environment": bool(recipe.task.environment),
        "several rewards": bool(recipe.task.rewards),
        f"model.dtype = {recipe.model.dtype}": recipe.model.dtype != "float32",
        f"engine.dtype = {recipe.engine.dtype}": recipe.engine.dtype not in ("", None, "float32"),
        f"engine.weights = {recipe.engine.weights}": recipe.engine.weights == "nccl",
    }
    got = ", ".join(what for what, holds in refused.items() if holds)
    if got:
        expected = "the synchronous loop in fp32, with one reward and no environment"
        hint = "lockstep train RECIPE, in one process"
        raise errors.UsageError("a trainer of several ranks", got=got, expected=expected, hint=hint)


class ToldEngine(Engine):
    """The first rank's engine; the others are told what it answers.

    Args:
        inner: None on every rank but the first.
    """

    def __init__(self, ranks: Ranks, inner: Engine | None) -> None:
        self._ranks = ranks
        self._inner = inner
        self.vocabulary = ranks.broadcast(lambda: self._of.vocabulary, int | None)
        self.asked = ranks.broadcast(lambda: self._of.asked, dict[str, Any])
        # What full depth switches on is functions, and no run asks for it.
        self.facts = ranks.broadcast(lambda: msgspec.structs.replace(self._of.facts, factors=()), EngineFacts)

    @property
    def _of(self) -> Engine:
        assert self._inner is not None, "only the first rank asks"
        return self._inner

    def wait_ready(self) -> None:
        """See :class:`Engine`."""

        def ready() -> Ready:
            self._of.wait_ready()
            return self._of.ready

        self.ready = self._ranks.broadcast(ready, Ready)

    def _sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        own = zlib.crc32(b"".join(prompt.tobytes() for prompt in prompts))
        if self._ranks.broadcast(lambda: own, int) != own:
            raise errors.EngineError(
                f"rank {self._ranks.number}, prompts",
                got="others than the first rank's",
                expected="the same on every rank",
                hint="the data set gives another order in each process: sort it",
            )
        return self._ranks.broadcast(lambda: self._of.sample(prompts, params), list[Completion])

    def _score(self, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
        def scores() -> list[bytes]:
            found = self._of.score_as_asked(sequences, temperature)
            return [one.astype(np.float32).tobytes() for one in found]

        return [np.frombuffer(one, np.float32) for one in self._ranks.broadcast(scores, list[bytes])]

    def load(self, update: WeightUpdate, mode: LoadMode = "wait") -> LoadReceipt:
        """See :class:`Engine`."""
        return self._ranks.broadcast(lambda: self._of.load(update, mode), LoadReceipt)

    def abort(self) -> int:
        """See :class:`Engine`."""
        return self._ranks.broadcast(lambda: self._of.abort(), int)

    def counters(self) -> dict[str, float]:
        """See :class:`Engine`."""
        return self._ranks.broadcast(lambda: self._of.counters(), dict[str, float])

    def close(self) -> None:
        """See :class:`Engine`."""
        if self._inner is not None:
            self._inner.close()


class ToldTask(Task):
    """A task whose rewards the first rank computes: another process might come to others."""

    def __init__(self, ranks: Ranks, config: TaskConfig, seed: int) -> None:
        super().__init__(config, seed)
        self._ranks = ranks

    def rewards(self, completions: Sequence[str], items: Sequence[Item]) -> Iterator[float]:
        """See :class:`Task`."""
        asked = super().rewards
        yield from self._ranks.broadcast(lambda: list(asked(completions, items)), list[float])


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that this process was started as one of; :data:`ONE` where it was started by itself."""
    if LAUNCHED not in os.environ:
        yield ONE
        return
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        for name in [name for name in os.environ if name.startswith(OF_TORCHRUN)]:
            del os.environ[name]
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), group)
    finally:
        distributed.destroy_process_group()


def main() -> None:
    """Become ``lockstep train``, as the rank that torchrun has started."""
    arguments = sys.argv[1:]
    if "RANK" not in os.environ or arguments[:1] != ["train"] or any(a.startswith(ALONE) for a in arguments):
        print(
            "usage: torchrun --standalone --nproc-per-node N -m lockstep.cluster.ranks train RECIPE …",
            file=sys.stderr,
        )
        print("hint: a run goes on in one process: lockstep train --resume RUN", file=sys.stderr)
        sys.exit(errors.UsageError.exit_code)
    scratch = ""
    if os.environ["RANK"] != "0":
        # Made when the run's directory is, privately; a recipe that is refused leaves nothing behind.
        scratch = str(Path(tempfile.gettempdir()) / f"lockstep-rank-{uuid.uuid4().hex}")
        arguments += ["--out", str(Path(scratch) / "run"), "--set", "recording.sinks=[]"]
    command = [sys.executable, "-m", "lockstep.cli.main", *arguments]
    os.execve(sys.executable, command, os.environ | {LAUNCHED: scratch})


if __name__ == "__main__":
    main()
