"""The arms of the migration experiment, and in which order they are run: ``migration.py`` runs them.

    v0             vLLM 0.8.5                                                           blue
    v1-defaults    vLLM 0.18.1 with its own defaults and its own weight update          red
    v1-logprobs, v1-runtime, v1-updates   red with one fix
    v1-all         every fix                                                            green
    tis, masked-is, geometric             red with a correction in the objective: what people do instead
    bf16-…         body in bf16, for the fourth fix, the fp32 head, which in fp32 has nothing to mend

An arm is the green one less the fixes that it lacks, so that nothing else can differ. All of them are the
quick start in flight, at the story's temperature and under its objective.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OVERRIDE = "the migration's experiment: the broken backend is trained on to see what becomes of it"
FP32, BF16 = "fp32", "bf16"

COMMON = {
    "loop.kind": "in_flight",
    "loop.deadline_s": "300",
    "rollout.max_lag": "1",
    "sampling.temperature": "0.7",
    "objective.name": "gspo",
    # PipelineRL's conf/math_qwen05_gspo_common.yaml has .003 and .004, for answers of thousands of tokens,
    # whose mean ratio hardly moves. Ours have three: the same proportion, fifty times as wide.
    "objective.options.low": "0.15",
    "objective.options.high": "0.2",
    "objective.aggregation": "seq-mean-token-mean",
    # As PipelineRL has it: one ratio, of the trainer now to the engine when it sampled.
    "objective.old_logprobs": "engine",
    "parity.audit_share": "1.0",
    "parity.search_s": "20",
}

V0 = {"engine.version": "0.8.5", "rollout.update": "wait"}
"""This version has no pause, so requests end before its weights change."""

V1 = {
    "engine.version": "0.18.1",
    "engine.options.logprobs_mode": "processed_logprobs",
    "engine.options.enable_prefix_caching": "false",
    "engine.options.generation_config": "vllm",
    "engine.options.async_scheduling": "false",
    "rollout.update": "keep",
}
"""With every fix."""

IN_BF16 = {
    "model.dtype": "bfloat16",
    "model.head_dtype": "float32",
    "engine.head_dtype": "float32",
    "optimizer.lr": "5e-5",  # as recipes/quickstart-bf16.toml: a fifth of it moves no weight that is rounded
}


@dataclass(frozen=True)
class Unfixed:
    """What a backend is without one of the four fixes."""

    sets: Mapping[str, str]
    plants: tuple[str, ...] = ()
    """Lockstep's own mends of a load that are left out."""


WITHOUT = {
    "logprobs": Unfixed({"engine.options.logprobs_mode": "raw_logprobs"}),
    "runtime": Unfixed(
        {"engine.options.enable_prefix_caching": "true", "engine.options.generation_config": "auto"}
    ),
    # vLLM's pause clears caches unless it is told not to, and its weight update clears none. With the plant
    # nothing does: requests go on over the old weights' cache, and what was cached before an update is found
    # after it.
    "updates": Unfixed({"rollout.update": "recompute"}, ("keep_cache",)),
    "head": Unfixed({"engine.head_dtype": "bfloat16"}),
}
"""Fix → the backend that lacks it."""

BROKEN = ("logprobs", "runtime", "updates")


@dataclass(frozen=True)
class MigrationArm:
    """One configuration of the experiment."""

    name: str
    says: str
    sets: Mapping[str, str]
    plants: tuple[str, ...] = ()
    dtype: str = FP32


def _v1(name: str, says: str, lacks: Sequence[str], more: Mapping[str, str], dtype: str) -> MigrationArm:
    sets = COMMON | V1 | (IN_BF16 if dtype == BF16 else {})
    for fix in lacks:
        sets = sets | WITHOUT[fix].sets
    if lacks:
        sets = sets | {"parity.override": OVERRIDE}
    plants = tuple(plant for fix in lacks for plant in WITHOUT[fix].plants)
    return MigrationArm(name, says, sets | more, plants, dtype)


def _fp32(name: str, says: str, lacks: Sequence[str], **more: str) -> MigrationArm:
    return _v1(name, says, lacks, {f"objective.{key}": value for key, value in more.items()}, FP32)


def _bf16(name: str, says: str, lacks: Sequence[str]) -> MigrationArm:
    return _v1(name, says, lacks, {}, BF16)


def _corrected(name: str, says: str, correction: str) -> MigrationArm:
    # A correction is of the mismatch ratio, so the clip's denominator is the trainer's own number.
    return _fp32(name, says, BROKEN, correction=correction, old_logprobs="sampling")


ARMS = {
    arm.name: arm
    for arm in (
        MigrationArm("v0", "vLLM 0.8.5, the reference", COMMON | V0),
        _fp32("v1-defaults", "vLLM 0.18.1 as it comes, with its own weight update", BROKEN),
        _fp32("v1-all", "vLLM 0.18.1 with every fix", ()),
        _corrected("tis", "as it comes, truncated importance weights on top", "tis"),
        _fp32("v1-logprobs", "as it comes, with processed log-probabilities alone", ("runtime", "updates")),
        _fp32("v1-runtime", "as it comes, with the runtime defaults set alone", ("logprobs", "updates")),
        _fp32("v1-updates", "as it comes, with the pause and its cache rule alone", ("logprobs", "runtime")),
        _corrected("masked-is", "as it comes, masked importance weights on top", "masked_is"),
        _corrected("geometric", "as it comes, geometric rejection on top", "geometric_rejection"),
        _bf16("bf16-all", "bf16 body, every fix: heads in fp32 on both sides", ()),
        _bf16("bf16-no-head", "bf16 body, fixes 1 to 3: the engine's head in bf16", ("head",)),
        _bf16("bf16-head", "bf16 body, as it comes, with the fp32 head alone", BROKEN),
        _bf16("bf16-defaults", "bf16 body, as it comes, head and all", (*BROKEN, "head")),
    )
}

COMPARED = {
    "v0": ("v1-defaults", "v1-all", "v1-logprobs", "v1-runtime", "v1-updates"),
    "v1-all": ("tis", "masked-is", "geometric"),
    "bf16-all": ("bf16-no-head", "bf16-head", "bf16-defaults"),
}
"""Reference → what is held against it."""


@dataclass(frozen=True)
class Form:
    """How much of the experiment is run."""

    name: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: Mapping[str, int]
    """By the body's dtype."""
    sets: Mapping[str, str]
    """In every arm."""
    start_s: float
    """Guess: from the command to the first step, with the proof between them."""
    step_s: Mapping[str, float]
    """Guess, by the body's dtype; runs that are done say better. On two cores V1 took 11 s, V0 35 s."""


FULL = Form("full", tuple(ARMS), (0, 1, 2), {FP32: 24, BF16: 8}, {}, 100.0, {FP32: 14.0, BF16: 20.0})
SHORT = Form(
    "short",
    ("v0", "v1-defaults", "v1-all", "tis"),
    (0,),
    {FP32: 8},
    {
        # As ``lockstep check --depth quick`` has it.
        "parity.probe_prompts": "8",
        "parity.probe_tokens": "16",
        "parity.draw_tokens": "768",
        "parity.draws_see": "1.0",
        "training.checkpoint_every": "1000",
    },
    70.0,
    {FP32: 14.0},
)


@dataclass(frozen=True)
class PlannedRun:
    """One run: an arm under a seed."""

    arm: MigrationArm
    seed: int
    sets: tuple[str, ...]
    """``--set`` overrides of the quick start."""
    guess_s: float
    """How long it takes, before any run has told."""

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.arm.name}-{self.seed}"


def planned(form: Form, more: Sequence[str] = ()) -> list[PlannedRun]:
    """The runs in their order, a seed's arms together: a whole seed is soon there.

    Args:
        more: ``--set`` overrides of every arm, after its own.
    """
    return [_planned(form, ARMS[name], seed, more) for seed in form.seeds for name in form.arms]


def _planned(form: Form, arm: MigrationArm, seed: int, more: Sequence[str]) -> PlannedRun:
    steps = form.steps[arm.dtype]
    sets = dict(form.sets) | dict(arm.sets) | {"training.steps": str(steps), "training.seed": str(seed)}
    told = tuple(f"{key}={value}" for key, value in sets.items())
    return PlannedRun(arm, seed, (*told, *more), form.start_s + steps * form.step_s[arm.dtype])
