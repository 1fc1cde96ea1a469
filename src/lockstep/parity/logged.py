"""Rollouts that another framework logged: token ids, log-probabilities, sampling settings. No engine runs.

Layers semantics and numerics are judged against the trainer's model; path, weights and objective need a live engine: NOT_RUN.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from lockstep.config.recipe import Recipe
from lockstep.errors import UsageError
from lockstep.parity.causes import CAUSES, finding
from lockstep.parity.hypotheses import Fit, fits
from lockstep.parity.layer4_numerics import judge_gap
from lockstep.parity.sampler import hidden_settings
from lockstep.parity.tolerances import noise_of
from lockstep.policy.model import Policy
from lockstep.policy.packing import Group
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import LAYERS, Verdict

COLUMNS = {
    "prompt": ("prompt_token_ids", "prompt_ids", "input_ids", "prompts"),
    "tokens": ("token_ids", "completion_token_ids", "completion_ids", "response_ids", "responses", "output_ids"),
    "logprobs": ("engine_logprobs", "logprobs", "rollout_log_probs", "token_logprobs", "old_logprobs", "response_logprobs"),
}
"""Names by which Lockstep, TRL, verl and others log them; the first that is there counts."""
SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
CLAMPED_LOGPROB = -9999.0
UNEXPLAINED = (
    "unexplained_numerics",
    "nothing is known of the engine that drew them",
    "say what the engine ran in: --set engine.dtype=bfloat16; then compare head and body precision",
)
NEEDS_ENGINE = "needs a live engine: lockstep check RECIPE"


@dataclass(eq=False)
class Logged:
    """Completions drawn under one sampling setting."""

    sampling: SamplingParams
    groups: list[Group]
    logprobs: np.ndarray
    """float32 [T], NaN where it is missing."""

    @property
    def owners(self) -> np.ndarray:
        """Which completion each token belongs to, int [T]."""
        return np.repeat(np.arange(len(self.groups)), [len(group.completions[0]) for group in self.groups])


def read_logged(path: Path, default: SamplingParams) -> list[Logged]:
    """Read a Parquet or JSONL file, grouped by sampling setting.

    Args:
        default: for settings that a row does not have.

    Raises:
        UsageError: for a file that is not there, a column that is missing, or tokens and log-probabilities of two lengths.
    """
    rows = _rows(path)
    if not rows:
        raise _unusable(path, "no row", "at least one completion")
    names = {role: name for role, known in COLUMNS.items() for name in reversed(known) if name in rows[0]}
    for role, known in COLUMNS.items():
        if role not in names:
            raise _unusable(path, f"columns {', '.join(rows[0])}", f"one of {', '.join(known)}")
    found: dict[bytes, Logged] = {}
    for number, row in enumerate(rows, 1):
        ids = np.asarray(row[names["tokens"]], np.int32)
        values = np.array([np.nan if v is None or v <= CLAMPED_LOGPROB else v for v in row[names["logprobs"]]], np.float32)
        values[~np.isfinite(values)] = np.nan
        if len(ids) != len(values):
            raise _unusable(path, f"{len(values)} log-probabilities in row {number}", f"one for each of {len(ids)} tokens")
        if len(ids):
            changes = {name: row[name] for name in SETTINGS if row.get(name) is not None}
            sampling = replace(default, **changes)
            part = found.setdefault(msgspec.json.encode(sampling), Logged(sampling, [], np.empty(0, np.float32)))
            part.groups.append(Group(np.asarray(row[names["prompt"]], np.int32), [ids]))
            part.logprobs = np.concatenate([part.logprobs, values])
    return list(found.values())


def judge(logged: Sequence[Logged], policy: Policy, recipe: Recipe) -> list[Verdict]:
    """All five layers' verdicts; a later one is NOT_RUN once one has failed."""
    engine_dtype = f"torch.{recipe.engine.dtype or recipe.model.dtype}"
    noise = noise_of(engine_dtype, str(policy.model.dtype))
    semantics = _worst([_semantics(part, policy, noise.p50) for part in logged])
    verdicts = [semantics]
    for layer in LAYERS[1:]:
        if semantics.status != "PASS":
            verdicts.append(Verdict(layer=layer, status="NOT_RUN", summary="not judged", reason="layer semantics did not pass"))
        elif layer == "numerics":
            gaps = [np.concatenate(policy.score(part.groups, part.sampling.temperature)) - part.logprobs for part in logged]
            owners = np.cumsum([0, *(len(part.groups) for part in logged)])
            all_owners = np.concatenate([part.owners + start for part, start in zip(logged, owners, strict=False)])
            verdicts.append(judge_gap(np.concatenate(gaps), all_owners, noise, recipe.objective, lambda: UNEXPLAINED, {}))
        else:
            verdicts.append(Verdict(layer=layer, status="NOT_RUN", summary="not judged", reason=NEEDS_ENGINE))
    return verdicts


def _semantics(part: Logged, policy: Policy, noise: float) -> Verdict:
    n, missing = part.logprobs.size, int(np.isnan(part.logprobs).sum())
    if missing:
        fix = "find where the log drops them; none may be filled in"
        return _fail("missing_logprobs", np.full(1, np.nan), part, fix, f"{missing} of {n} are null, non-finite or clamped", {})
    ranked = fits(policy, part.groups, part.logprobs, part.sampling)
    best, evidence = ranked[0], _evidence(ranked)
    figures = {"identified": best.semantics.describe(), "fit_p50_nats": best.p50}
    trainer = np.concatenate(policy.score(part.groups, part.sampling.temperature))
    gap = np.abs(trainer - part.logprobs)
    if not best.p50 <= noise:
        cause, told = _misaligned(trainer, part, noise)
        hidden = hidden_settings(policy, part.groups, part.logprobs, part.sampling, noise) if not told else None
        if hidden is not None:
            cause, told = hidden.cause, f"{hidden.name} fits to {hidden.miss:.1e} nats"
        return _fail(
            cause, gap, part, CAUSES[cause].mend, f"{told}; of what was asked for, {evidence}" if told else evidence, figures
        )
    found = best.semantics
    if found.penalised:
        return _fail("penalties_unmodelled", gap, part, "sample without penalties", evidence, figures)
    if found.truncated:
        return _fail("truncation_unmodelled", gap, part, "sample without top-k, top-p and min-p", evidence, figures)
    if found.temperature != part.sampling.temperature and part.sampling.temperature > 0.0:
        fix = "have the engine report processed log-probabilities (vLLM: --logprobs-mode processed_logprobs)"
        return _fail("raw_logprobs", gap, part, fix, evidence, figures)
    if part.sampling.truncates:
        fix = "sample without top-k, top-p and min-p: the numbers do not show what was cut"
        return _fail("truncation_unmodelled", gap, part, fix, evidence, figures)
    summary = f"the log holds what the trainer scores: {found.describe()}"
    return Verdict(layer="semantics", status="PASS", summary=summary, n_tokens=n, figures=figures)


def _misaligned(trainer: np.ndarray, part: Logged, noise: float) -> tuple[str, str]:
    """Cause and evidence: numbers that fit one token away are shifted; else nothing is known."""
    inside = np.flatnonzero(part.owners[1:] == part.owners[:-1])
    for shift, (ours, theirs) in {1: (inside, inside + 1), -1: (inside + 1, inside)}.items():
        if inside.size and np.median(np.abs(trainer[ours] - part.logprobs[theirs])) <= noise:
            return "shifted_logprobs", f"the log-probabilities are {abs(shift)} token {'late' if shift > 0 else 'early'}"
    return "unexplained_semantics", ""


def _evidence(ranked: Sequence[Fit]) -> str:
    return "; ".join(f"{fit.semantics.describe()} fits to {fit.p50:.1e} nats" for fit in ranked[:2]) + " (medians)"


def _fail(cause: str, effects: np.ndarray, part: Logged, fix: str, evidence: str, figures: dict[str, Any]) -> Verdict:
    owners = part.owners if effects.size == part.logprobs.size else np.zeros(effects.size, int)
    found = finding(cause, effects, owners, evidence, fix, part.logprobs.size)
    summary = f"{cause.replace('_', ' ')}, in completions drawn at T={part.sampling.temperature:g}"
    return Verdict(
        layer="semantics", status="FAIL", summary=summary, n_tokens=part.logprobs.size, findings=(found,), figures=figures
    )


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The first that failed, or a PASS over all tokens."""
    failed = next((verdict for verdict in verdicts if verdict.status == "FAIL"), None)
    if failed is not None:
        return failed
    return replace(verdicts[0], n_tokens=sum(verdict.n_tokens for verdict in verdicts))


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise _unusable(path, "no such file", "a .parquet or .jsonl file")
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        return [msgspec.json.decode(line) for line in path.read_bytes().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise _unusable(path, str(error).splitlines()[0], "Parquet, or one JSON object a line") from error


def _unusable(path: Path, got: str, expected: str) -> UsageError:
    return UsageError(f"rollouts {path}", got=got, expected=expected, hint="token ids and log-probabilities of each completion")
