"""Bring both sides up, model, task, trainer and engine, in the order in which a mistake is cheapest to find.

torch and transformers, which take 5 s to import, are imported while the engine starts in its own process.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.cluster.ranks import ONE, Ranks, joined, refuse_ranks
from lockstep.config.recipe import Recipe
from lockstep.engines.base import Engine, EngineSpec
from lockstep.engines.registry import Choice, choose, launch
from lockstep.errors import RecipeError
from lockstep.objectives.corrections.registry import refuse_correction
from lockstep.objectives.registry import refuse_objective
from lockstep.policy.pretrained import resolve_model
from lockstep.rendering import Renderer
from lockstep.rollout.tasks import EVALUATION_SEED_OFFSET, Task
from lockstep.runs.manifest import Manifest, build_manifest
from lockstep.runs.record import refuse_unknown_sinks
from lockstep.stopping import held
from lockstep.weights.directory import remove_weights, weights_directory

if TYPE_CHECKING:
    from lockstep.parity.pair import Pair

Say = Callable[[str], None]
POLICY = "OMP_WAIT_POLICY"
OFFLINE = Choice("none", None, "no engine runs in an offline loop")


@dataclass(frozen=True)
class Plants:
    """How an engine is broken on purpose, by those who hold a check to it. In production there is none."""

    launcher: str
    """:attr:`EngineSpec.launcher`."""
    around: Callable[[Engine], Engine]
    """The running engine → what the trainer has in its place."""


@dataclass(eq=False)
class Session:
    """Both sides, running."""

    pair: "Pair"
    choice: Choice
    model_path: Path
    launch_engine: Callable[[], Engine] | None = None
    """Starts another engine like the first, and ends it with the session."""
    held_out: Task | None = None
    """Questions of evaluations, where the recipe has them."""
    asked: Recipe | None = None
    """The recipe of the run, where the pair's is another: of several ranks."""

    def restart_engine(self) -> None:
        """Another engine in the place of one that died; it holds the weights that the first began with.

        Raises:
            EngineError: when it does not start.
        """
        assert self.launch_engine is not None, "a session that was opened has one"
        self.pair.engine.close()
        self.pair.engine = self.launch_engine()

    def loop_choices(self) -> dict[str, tuple[str, str]]:
        """What the loop resolved, each with its reason."""
        recipe = self.pair.recipe
        if not recipe.loop.ahead:
            return {}
        n = recipe.rollout.max_lag
        size = self.pair.trainer.nbytes
        reason = f"{n} versions of {size / 1e6:.0f} MB in {recipe.rollout.ring}"
        return {"rollout.ring": (f"{n * size} bytes", f"rollout.max_lag = {n}: {reason}")}

    @cached_property
    def manifest(self) -> Manifest:
        """What runs here, with the weights' digests when first asked for: before the first step."""
        from lockstep.policy.fingerprint import tokenizer_digest

        pair = self.pair
        environment = self.choice.environment
        choices = {
            "engine": (_named(self.choice), self.choice.reason),
            **pair.trainer.choices(),
            **self.loop_choices(),
        }
        return build_manifest(
            self.asked or pair.recipe,
            pair.engine.ready,
            choices,
            self.model_path,
            resolved=(self.choice.name, environment.version if environment else ""),
            model={**pair.trainer.digests(), "tokenizer_sha256": tokenizer_digest(pair.renderer.tokenizer)},
            planted=pair.engine.altered_by,
        )


@contextlib.contextmanager
def open_session(
    recipe: Recipe, engine_log: Path, say: Say, plants: Plants | None = None, api_key_env: str = ""
) -> Iterator[Session]:
    """Start everything, and end everything on the way out.

    Args:
        api_key_env: the variable that the command line confirmed as holding a server's key.

    Raises:
        UsageError: for a model, an engine, a task or a prompt that cannot be.
        EngineError: when the engine does not start.
    """
    choice, model_path = preflight(recipe, api_key_env)
    if choice == OFFLINE:
        got = "an offline loop"
        hint = "--set loop.kind=sync"
        raise RecipeError("recipe, key loop.kind", got=got, expected="a loop with an engine", hint=hint)
    say(f"model {recipe.model.path}, engine {_named(choice)}")
    directory = weights_directory()
    with contextlib.ExitStack() as stack:
        # First in and so last out: the engine reads from there until it is closed.
        stack.callback(remove_weights, directory)
        ranks = stack.enter_context(joined())
        task = ranks.task(recipe.task, recipe.training.seed)
        stack.callback(task.close)
        held_out = held_out_of(recipe, ranks)
        if held_out is not None:
            stack.callback(held_out.close)
        spec = _spec(
            recipe, model_path, directory, engine_log, api_key_env, plants.launcher if plants else ""
        )
        # An engine with its own process starts while the trainer loads; what ends this ends it in its start.
        starting = _begun(stack, choice, spec) if choice.environment and ranks.first else None
        renderer = Renderer(model_path, task.tools)
        task.pass_over_long(lambda messages: len(renderer.prompt(messages)))
        refuse_long_prompt(recipe, task, renderer)
        from lockstep.parity.pair import Pair
        from lockstep.training.trainer import Trainer
        from lockstep.weights.publish import publisher_of

        publisher = partial(publisher_of, recipe.engine, directory, say)
        trainer = Trainer.load(model_path, recipe, publisher, ranks)

        def launched(first: Engine | None = None) -> Engine:
            engine = ranks.engine(lambda: first or _begun(stack, choice, spec))
            engine.wait_ready()
            if recipe.engine.weights == "nccl":
                engine.need("nccl_weights")
            say(f"engine {engine.ready.engine} {engine.ready.version} is up ({engine.ready.start_s:.0f} s)")
            return plants.around(engine) if plants else engine

        pair = Pair(launched(starting), trainer, renderer, task, ranks.recipe(recipe), say=say)
        yield Session(pair, choice, model_path, launched, held_out, recipe)


def _begun(stack: contextlib.ExitStack, choice: Choice, spec: EngineSpec) -> Engine:
    # An engine in this process loads its model meanwhile, which may be stopped.
    with held() if choice.environment else contextlib.nullcontext():
        return stack.enter_context(contextlib.closing(launch(choice, spec)))


@contextlib.contextmanager
def open_engine(recipe: Recipe, engine_log: Path, say: Say, api_key_env: str = "") -> Iterator[Engine]:
    """The engine alone, for a look at what it resolves to.

    Raises:
        UsageError, EngineError: as :func:`open_session`.
    """
    choice = choose(recipe.engine, api_key_env)
    model_path = Path() if choice.name == "openai" else resolve_model(recipe.model.path)
    say(f"starting {_named(choice)}")
    directory = weights_directory()
    with contextlib.ExitStack() as stack:
        stack.callback(remove_weights, directory)
        engine = _begun(stack, choice, _spec(recipe, model_path, directory, engine_log, api_key_env))
        engine.wait_ready()
        yield engine


def held_out_of(recipe: Recipe, ranks: Ranks = ONE) -> Task | None:
    """The questions that a recipe's evaluations ask; None where it has none.

    Raises:
        RecipeError: as :class:`Task`.
    """
    evaluation = recipe.evaluation
    if not evaluation.every:
        return None
    return ranks.task(evaluation.task(recipe.task), recipe.training.seed + EVALUATION_SEED_OFFSET)


def wait_asleep(recipe: Recipe, say: Say) -> None:
    """Have OpenMP threads sleep where those of trainer and engine share cores at the same time.

    By default GNU's library spins for milliseconds before a waiting thread sleeps, longer than the scheduler
    gives it: on 2 cores a step in flight took 20.7 s, and 6.5 s with this. The library reads its environment
    when torch is imported, and so does the engine's process when it starts.
    """
    if not recipe.overlaps or recipe.rollout.cores or POLICY in os.environ:
        return
    if "torch" in sys.modules:
        say(f"trainer and engine spin on the same cores while they wait; {POLICY}=PASSIVE ends it")
        return
    os.environ[POLICY] = "PASSIVE"


def preflight(recipe: Recipe, api_key_env: str = "") -> tuple[Choice, Path]:
    """What can be wrong before anything is started or written: objective, sinks, engine's environment, model.

    Raises:
        UsageError: when one is not there; says how to get it.
    """
    refuse_ranks(recipe)
    refuse_objective(recipe.objective)
    refuse_correction(recipe.objective)
    refuse_unknown_sinks(recipe.recording.sinks)
    if recipe.optimizer.schedule != "constant" or recipe.optimizer.schedule_options:
        from lockstep.training.optimizer import refuse_schedule  # which asks transformers

        refuse_schedule(recipe.optimizer, recipe.training.steps * recipe.training.minibatches)
    if recipe.loop.kind == "offline":
        from lockstep.loop.offline import refuse_offline

        refuse_offline(recipe)
        return OFFLINE, resolve_model(recipe.model.path)
    return choose(recipe.engine, api_key_env), resolve_model(recipe.model.path)


def _named(choice: Choice) -> str:
    return (
        f"{choice.name} {choice.environment.version}"
        if choice.environment
        else f"{choice.name} ({choice.reason})"
    )


def _spec(
    recipe: Recipe, model_path: Path, directory: Path, log: Path, api_key_env: str, launcher: str = ""
) -> EngineSpec:
    return EngineSpec(
        model_path=model_path,
        dtype=recipe.engine.dtype or recipe.model.dtype,
        head_dtype=recipe.engine.head_dtype or recipe.model.head_dtype,
        max_model_len=recipe.engine.max_model_len,
        options=recipe.engine.options,
        weights=recipe.engine.weights,
        weights_dir=directory,
        cores=recipe.engine_cores,
        log_path=log.resolve(),
        api_key_env=api_key_env,
        launcher=launcher,
    )


def refuse_long_prompt(recipe: Recipe, task: Task, renderer: Renderer) -> None:
    """What the engine has no room for.

    Raises:
        RecipeError: where the first prompt and what is sampled after it are longer than it takes.
    """
    # The first stands for all; a longer one the engine refuses when it is asked.
    length = len(renderer.prompt(task.messages(task.item(0))))
    needed = length + max(recipe.sampling.max_tokens, recipe.parity.probe_tokens)
    if needed > recipe.engine.max_model_len:
        raise RecipeError(
            "recipe, key engine.max_model_len",
            got=str(recipe.engine.max_model_len),
            expected=f"at least {needed}: the first prompt has {length} tokens",
            hint=f"--set engine.max_model_len={needed + 64}",
        )
