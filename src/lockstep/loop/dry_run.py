"""What a run would be: the recipe as it is resolved, prompts as the engine would get them, memory, files.

Nothing is started and nothing is written.
"""

import contextlib
import math
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from lockstep.config.recipe import Recipe
from lockstep.config.written import toml_of
from lockstep.errors import ModelError
from lockstep.loop.open import held_out_of, preflight, refuse_long_prompt
from lockstep.objectives.registry import advantage_of, needs_of
from lockstep.rendering import Renderer
from lockstep.rollout.preferences import Preferences
from lockstep.rollout.rewards import Item
from lockstep.rollout.tasks import Task
from lockstep.runs.layout import RunLayout
from lockstep.runs.tensor_files import header_of

SHOWN = 3
GIB = 2**30


class Prompt(Struct, frozen=True, kw_only=True):
    """A question as the engine would get it."""

    item: int
    text: str
    """The rendered tokens, read back."""
    token_ids: tuple[int, ...]
    answer: str


class DryRun(Struct, frozen=True, kw_only=True):
    """What a run would be."""

    engine: str
    engine_reason: str
    model_path: str
    objective: str
    """The objective, with the estimator of its advantages."""
    optimizer_steps: int
    samples: int
    prompts: tuple[Prompt, ...]
    n_parameters: int
    memory_gib: dict[str, float]
    """What the trainer takes, by part, without activations; what the engine takes is its own."""
    writes: tuple[str, ...]
    recipe: dict[str, Any]


def dry_run(recipe: Recipe, out: Path | None, api_key_env: str = "") -> DryRun:
    """Look at everything that can be looked at without a start.

    Raises:
        UsageError: as a run would, before it starts anything.
        EnvironmentFault: where an environment's reset fails, as it would in a run.
    """
    choice, path = preflight(recipe, api_key_env)
    prompts = _prompts(recipe, path)
    parameters = _parameters(path)
    training = recipe.training
    root = RunLayout(out if out is not None else Path("runs/<date>-<random>"))
    return DryRun(
        engine=f"{choice.name} {choice.environment.version if choice.environment else ''}".strip(),
        engine_reason=choice.reason,
        model_path=str(path),
        objective=f"{recipe.objective.name}, advantages: {advantage_of(recipe.objective)}",
        optimizer_steps=training.steps * training.minibatches,
        samples=training.steps * training.prompts_per_step * training.group_size,
        prompts=prompts,
        n_parameters=parameters,
        memory_gib={name: n / GIB for name, n in _memory(recipe, parameters).items()},
        writes=_writes(recipe, root),
        recipe=msgspec.to_builtins(recipe),
    )


def _writes(recipe: Recipe, run: RunLayout) -> tuple[str, ...]:
    """Every file and directory of a run, and where a sink keeps its own."""
    own = [str(run.manifest), str(run.metrics), f"{run.checkpoints}/"]
    if recipe.loop.kind != "offline":
        own += [*map(str, (run.certificate, run.verdicts, run.alarms, run.engine_log))]
        own.append(f"{run.root}/rollouts/")
    if recipe.loop.ahead:
        own.append(str(run.ledger))
    return (*own, *(f"{run.root}/({sink})" for sink in recipe.recording.sinks))


def _prompts(recipe: Recipe, model: Path) -> tuple[Prompt, ...]:
    """The first questions, after what a run asks of its questions before it starts an engine.

    Raises:
        UsageError: for questions that are none, or leave the engine no room.
    """
    task = Task(recipe.task, recipe.training.seed)
    with contextlib.ExitStack() as stack:
        stack.callback(task.close)
        if (held_out := held_out_of(recipe)) is not None:
            stack.callback(held_out.close)
        renderer = Renderer(model, task.tools)
        task.pass_over_long(lambda messages: len(renderer.prompt(messages)))
        if recipe.loop.kind == "offline":
            Preferences(task, renderer, recipe).step(0)
        else:
            refuse_long_prompt(recipe, task, renderer)
        return tuple(_prompt(renderer, task, number) for number in range(SHOWN))


def _prompt(renderer: Renderer, task: Task, number: int) -> Prompt:
    item = task.item(number)
    ids = renderer.prompt(task.messages(item, _said_first(task, item)))
    return Prompt(
        item=number,
        text=renderer.tokenizer.decode(ids),
        token_ids=tuple(ids.tolist()),
        answer=str(item.get("answer", item.get("chosen", ""))),
    )


def _said_first(task: Task, item: Item) -> str:
    """What an environment adds to a question; empty without one."""
    environments = task.environments
    if environments is None:
        return ""
    one = environments.made()
    try:
        return str(environments.call(one.reset, **item) or "")
    finally:
        environments.close(one)


def _parameters(path: Path) -> int:
    """Elements of all tensors of a checkpoint, from its files' headers.

    Raises:
        ModelError: for a file that has none.
    """
    total = 0
    for file in sorted(path.glob("*.safetensors")):
        try:
            tensors = header_of(file).tensors
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model {path}, {file.name}",
                got=str(error),
                expected="a safetensors file",
                hint="bring the checkpoint there again, whole",
            ) from error
        total += sum(math.prod(tensor.shape) for tensor in tensors.values())
    return total


def _memory(recipe: Recipe, parameters: int) -> dict[str, int]:
    """Bytes by what holds them."""
    width = 4 if recipe.model.dtype == "float32" else 2
    buffers = 2 if recipe.engine.double_buffer else 1
    return {
        "weights": width * parameters,
        "gradients": width * parameters,
        "adam moments": 8 * parameters,  # two, in fp32
        "fp32 masters": 0 if width == 4 else 4 * parameters,
        "fp32 master gradients": 0 if width == 4 else 4 * parameters,  # of each update, beside the model's
        # With one buffer the trainer's parameters lie in the published file themselves.
        "published weights": 0 if buffers == 1 else 2 * width * parameters,
        "reference model": width * parameters if needs_of(recipe.objective).reference else 0,
        "ring of versions": _versions_held(recipe) * width * parameters,
    }


def _versions_held(recipe: Recipe) -> int:
    """Copies of the weights in memory under which tokens of earlier versions are scored."""
    return recipe.rollout.max_lag if recipe.loop.ahead and recipe.rollout.ring == "memory" else 0


def told(plan: DryRun, recipe: Recipe) -> str:
    """For people: the recipe last, as a file that a run can be started with."""
    total = sum(plan.memory_gib.values())
    parts = ", ".join(f"{name} {size:.2f}" for name, size in plan.memory_gib.items() if size)
    lines = [
        f"engine      {plan.engine} ({plan.engine_reason})",
        f"model       {plan.model_path}, {plan.n_parameters / 1e6:.1f} M parameters",
        f"objective   {plan.objective}",
        f"steps       {plan.optimizer_steps} of the optimizer, {plan.samples} samples in all",
        f"memory      {total:.2f} GiB in the trainer ({parts}), activations and the engine beside it",
    ]
    for prompt in plan.prompts:
        lines += [
            f"prompt {prompt.item}    {len(prompt.token_ids)} tokens; the answer is {prompt.answer!r}",
            f"  {prompt.text!r}",
            f"  {' '.join(map(str, prompt.token_ids))}",
        ]
    lines += [f"would write {name}" for name in plan.writes]
    lines += ["", "the recipe; every other key is at its default:", "", toml_of(recipe)]
    return "\n".join([*lines, "nothing was started"])
