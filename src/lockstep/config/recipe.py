"""The recipe: what a run is. TOML on disk, frozen structs in memory, strict about every key.

A run is reproduced by its recipe alone, so no default depends on the machine; what is resolved at run time (a
device, an engine's own defaults) goes into the manifest with its reason.
"""

import copy
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, field

from lockstep.config.evaluation import Evaluation, refuse_evaluation
from lockstep.config.keys import refuse_unknown_keys, set_key, value_at
from lockstep.config.objective import (
    ConfigSection,
    NonNegativeFloat,
    Objective,
    PositiveFloat,
    ValueHeadConfig,
)
from lockstep.config.task import TaskConfig, refuse_task
from lockstep.config.values import refuse_recomputed, refuse_unrepeatable
from lockstep.errors import RecipeError
from lockstep.records.tokens import NonNegative, Positive, SamplingParams

Dtype = Literal["float32", "bfloat16"]
EngineDtype = Literal["float32", "bfloat16", "float16"]
LrSchedule = Literal[
    "constant",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "constant_with_warmup",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
Seed = Annotated[int, Meta(ge=0, lt=2**32)]
"""What every generator of random numbers takes, numpy's and an engine's among them."""


class Model(ConfigSection, frozen=True):
    """The policy that is trained."""

    path: str
    """A directory with a Hugging Face checkpoint, the name of an installed model, or ``org/name``."""
    dtype: Dtype = "float32"
    """The dtype of the trainer's body; fp32 master weights are kept beside a bf16 body."""
    head_dtype: Dtype = "float32"
    """The dtype of the last matrix product, the trainer's and, through the adapter, the engine's."""
    device: str = "auto"
    """Where the trainer computes: ``cpu``, ``cuda``, ``cuda:1``. ``auto``: CUDA if there is one, else CPU."""


class EngineConfig(ConfigSection, frozen=True):
    """What samples tokens."""

    name: str = "auto"
    """One of ``engines/registry.py``. ``auto``: the newest installed vLLM, else transformers. ``openai``: the
    server at ``options.base_url``."""
    version: str = ""
    """Empty: the newest installed."""
    python: str = ""
    """An interpreter that has a vLLM already: used where it is, never changed. Empty: one of Lockstep's."""
    dtype: EngineDtype | None = None
    """None: the model's."""
    head_dtype: Dtype | None = None
    """None: the model's."""
    max_model_len: Positive = 1024
    weights: Literal["shared_memory", "nccl"] = "shared_memory"
    """What carries weights to it. ``nccl``: trainer and engine each on GPUs of their own."""
    double_buffer: bool = False
    """Weights are copied into one of two files by turns, so that the trainer may step while an engine still
    reads. Costs two copies of them in memory; without it the published file is the trainer's own memory."""
    restarts: NonNegative = 2
    """In flight: how often an engine that died is started again in a run; its requests are issued again."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the engine by its own names; each overrides what Lockstep would set."""


class Optimizer(ConfigSection, frozen=True):
    """AdamW over fp32 weights."""

    lr: PositiveFloat = 1e-6
    schedule: LrSchedule = "constant"
    """Over all optimizer steps of the run, as transformers has it by that name; ``constant``: warm-up, then
    ``lr``."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Its own keyword arguments, by transformers' names: ``min_lr``, ``num_decay_steps``, ``num_cycles`` …"""
    warmup_steps: NonNegative = 0
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0


class Training(ConfigSection, frozen=True):
    """How long and in what portions."""

    steps: Positive
    prompts_per_step: Positive = 8
    group_size: Annotated[int, Meta(ge=2)] = 8
    """Samples per prompt; advantages are relative to the group."""
    minibatches: Positive = 1
    """Optimizer steps per batch of rollouts."""
    tokens_per_microbatch: Positive = 4096
    """Bound on the tokens of one forward pass; more are accumulated."""
    gradient_checkpointing: bool = False
    """Layers are computed again in the backward pass: memory for time."""
    checkpoint_every: Positive = 20
    seed: Seed = 0


class Parity(ConfigSection, frozen=True):
    """How much the ladder compares."""

    probe_prompts: Annotated[int, Meta(ge=4)] = 16
    probe_tokens: Annotated[int, Meta(ge=4)] = 32
    """Sampled per probe prompt and pass."""
    canary_tokens: Annotated[int, Meta(ge=8)] = 8
    """Known tokens that engine and trainer score after every weight sync."""
    prove_within: Annotated[int, Meta(ge=1)] = 2
    """Steps trained on at most after a sync that canary and rollouts have not proven; then layer 3 does."""
    draw_tokens: NonNegative = 3072
    """Drawn at first, one each after prompts of one token, to see what tokens are drawn from; 0: not."""
    draws_see: PositiveFloat = 0.05
    """A temperature off by this share is to be seen; up to four times ``draw_tokens`` are drawn for that."""
    direction_sequences: NonNegative | None = None
    """Drawn at full depth to test every direction of the gap; the verdict says what would have shown. None:
    128 where a side computes in less than fp32, else 32. 0: none."""
    directions_see: NonNegativeFloat = 0.0
    """So small a share is to show: more are drawn, for as long as is said first. 0: no share is asked for."""
    missing_share: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of a step's tokens that may lack a log-probability of the engine's: they are left out of the loss
    and of its denominator; more, and the step is refused."""
    override: str = ""
    """Train although the ladder does not pass, for the reason that this sentence gives. It is then stamped on
    manifest, verdicts, steps, alarms, checkpoints, summary, report and comparison, and no certificate is
    issued."""
    audit_share: Annotated[float, Meta(ge=0, le=1)] = 0.05
    """In flight with ``old_logprobs = "engine"``: share of the samples of earlier versions that the trainer
    scores under the weights that drew them, to measure the mismatch. With another all are."""
    search_s: PositiveFloat = 60.0
    """How long a check may look for the cause of what does not fit, in seconds; ``check --search-s``."""
    seed: Seed = 20_260_101
    """The probes' seed; ``training.seed`` is the run's, so that two runs are judged on the same tokens."""


class Loop(ConfigSection, frozen=True):
    """Which loop puts the stages in order."""

    kind: Literal["sync", "in_flight", "offline"] = "sync"
    """``in_flight``: the engine samples while the trainer trains (docs/concepts/in-flight.md). ``offline``:
    no engine; the task's items are pairs of answers (docs/guides/preferences.md)."""
    deadline_s: PositiveFloat = 1800.0
    """In flight: the longest wait in which nothing happens; who waits for what is told, and the run ends."""

    @property
    def ahead(self) -> bool:
        """True where samples are drawn before their step begins: earlier versions may have drawn them."""
        return self.kind == "in_flight"


class Rollout(ConfigSection, frozen=True):
    """In flight: how far sampling may run ahead, and what an update does to what is being drawn."""

    max_lag: NonNegative = 1
    """Versions between drawing a token and training on it, at most. 0: synchronous."""
    update: Literal["keep", "recompute", "wait", "abort"] = "keep"
    """For what is being drawn: ``keep`` its cache, ``recompute`` it under the new weights, ``wait`` for its
    end, or ``abort`` it and go on by its prefix."""
    in_flight: NonNegative = 0
    """Samples with the engine at once; 0: as many as it runs side by side."""
    cores: NonNegative = 0
    """Where engine and trainer compute on the same ones: so many are the engine's, the others the trainer's.
    0: both have all."""
    stale: Literal["wait", "drop"] = "wait"
    """A group that would be too old is waited for; or it is dropped, which falls on long answers."""
    ring: Literal["memory", "disk"] = "memory"
    """Where the weights of the last ``max_lag`` versions are kept; the manifest says how large they are."""


class Recording(ConfigSection, frozen=True):
    """Where figures and verdicts go, beside the run's own files."""

    sinks: tuple[str, ...] = ()
    """Modules of ``runs/sinks/``: ``csv``, ``tensorboard``, ``wandb``, ``mlflow``, ``trackio``."""
    aliases: Literal["", "trl", "verl", "pipelinerl"] = ""
    """Sinks also get figures under this system's names, those alone whose formula is the same."""


class Recipe(ConfigSection, frozen=True):
    """A whole run. Example: ``recipes/quickstart.toml``."""

    model: Model
    task: TaskConfig
    sampling: SamplingParams
    training: Training
    engine: EngineConfig = EngineConfig()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    value_head: ValueHeadConfig = ValueHeadConfig()
    parity: Parity = Parity()
    evaluation: Evaluation = Evaluation()
    recording: Recording = Recording()
    loop: Loop = Loop()
    rollout: Rollout = Rollout()

    @property
    def overlaps(self) -> bool:
        """True where the engine draws while the trainer trains."""
        return self.loop.ahead and self.rollout.max_lag > 0

    @property
    def engine_cores(self) -> int:
        """The engine's own while it draws beside the trainer; 0: it has all."""
        return self.rollout.cores if self.overlaps else 0


def load_recipe(path: Path, overrides: list[str] | None = None, engine: str | None = None) -> Recipe:
    """Read a TOML recipe and apply ``--engine`` and ``--set`` overrides.

    Args:
        path: the file.
        overrides: ``section.key=value`` strings; the value is read as TOML, else as a plain string.
        engine: in place of the recipe's ``engine.name``; another engine's options and version are dropped,
            overrides are not.

    Raises:
        RecipeError: for a file that is not there or no TOML, an unknown key (the nearest is named), a value
            of the wrong type or out of range.
    """
    table = _read(path)
    if engine is not None:
        section = table.setdefault("engine", {})
        if isinstance(section, dict) and section.get("name", "auto") != engine:
            section = {key: value for key, value in section.items() if key not in ("version", "options")}
        table["engine"] = section | {"name": engine} if isinstance(section, dict) else section
    for override in overrides or []:
        set_key(table, override)
    return parse_recipe(table, str(path))


def _read(path: Path) -> dict[str, Any]:
    boundary = f"recipe {path}"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "lockstep init writes one (recipes/quickstart.toml)"
        raise RecipeError(boundary, got="no such file", expected="a TOML recipe", hint=hint) from error
    except OSError as error:
        got = error.strerror or str(error)
        raise RecipeError(
            boundary, got=got, expected="a TOML recipe", hint="name a file that can be read"
        ) from error
    except (ValueError, RecursionError) as error:
        # No TOML, no UTF-8, a number of thousands of digits, nested too deeply.
        raise RecipeError(
            boundary, got=str(error), expected="valid TOML", hint=f"open {path} there"
        ) from error


def parse_overrides(table: dict[str, Any], overrides: list[str], source: str) -> Recipe:
    """A recipe from a table in code and ``--set`` overrides; the table is left as it was.

    Raises:
        RecipeError: as :func:`load_recipe`.
    """
    own = copy.deepcopy(table)
    for override in overrides:
        set_key(own, override)
    return parse_recipe(own, source)


def with_sets(recipe: Recipe, sets: Sequence[str]) -> Recipe:
    """A recipe with ``--set`` overrides.

    Raises:
        RecipeError: as :func:`load_recipe`.
    """
    return parse_overrides(msgspec.to_builtins(recipe), list(sets), "--set")


def parse_recipe(table: dict[str, Any], source: str) -> Recipe:
    """Build a :class:`Recipe` from a nested dict, naming ``source`` in errors."""
    refuse_unknown_keys(table, Recipe, source)
    refuse_recomputed(table, source)
    refuse_unrepeatable(table, source)
    try:
        # TOML's and JSON's keys are text, a token's id too.
        recipe = msgspec.convert(table, Recipe, str_keys=True)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `")
        of_a_key, _, where = where.rpartition("$")
        key = where.rstrip("`").lstrip(".") or "(top level)"
        message = f"keys that are {message.removeprefix('Expected ')}" if of_a_key else message
        raise RecipeError(
            f"recipe {source}, key {key}",
            got=value_at(table, key),
            expected=message.removeprefix("Expected "),
            hint=f"--set {key}=…  or edit {source}",
        ) from error
    _refuse_untrainable(recipe, source)
    return recipe


def _refuse_untrainable(recipe: Recipe, source: str) -> None:
    refuse_task(recipe.task, source)
    if recipe.task.environment and recipe.loop.ahead:
        raise RecipeError(
            f"recipe {source}, key task.environment",
            got=f"{recipe.task.environment!r} with loop.kind = {recipe.loop.kind!r}",
            expected="the synchronous loop: one in flight draws a single turn of each sample",
            hint="--set loop.kind=sync",
        )
    refuse_evaluation(recipe.evaluation, recipe.task, source)
    if recipe.sampling.n != 1:
        raise RecipeError(
            f"recipe {source}, key sampling.n",
            got=str(recipe.sampling.n),
            expected="no such key: the samples per prompt are training.group_size",
            hint=f"--set training.group_size={recipe.sampling.n}",
        )
    if recipe.sampling.temperature == 0.0:
        raise RecipeError(
            f"recipe {source}, key sampling.temperature",
            got="0 (greedy)",
            expected=(
                "a positive temperature: greedy samples of a group are all alike, so every advantage is 0"
            ),
            hint="--set sampling.temperature=1.0",
        )
    if recipe.objective.correction != "none" and recipe.objective.old_logprobs == "engine":
        raise RecipeError(
            f"recipe {source}, key objective.correction",
            got=f"{recipe.objective.correction!r} with objective.old_logprobs = 'engine'",
            expected=(
                "one of them: the engine's numbers as old log-probabilities hold the mismatch ratio already"
            ),
            hint="--set objective.old_logprobs=trainer",
        )
    groups = recipe.training.prompts_per_step
    parts = recipe.training.minibatches
    if groups % parts:
        raise RecipeError(
            f"recipe {source}, key training.minibatches",
            got=str(parts),
            expected=f"a divisor of training.prompts_per_step = {groups}",
            hint="--set training.minibatches=1",
        )
