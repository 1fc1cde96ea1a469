"""What the verbs share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lockstep.cli.console import show
from lockstep.config.recipe import Recipe, load_recipe
from lockstep.errors import UsageError
from lockstep.records.verdicts import Verdict


def recipe_of(path: Path, overrides: list[str] | None, engine: str | None) -> Recipe:
    """The recipe with ``--engine`` and then ``--set`` applied."""
    from lockstep.engines.registry import NAMES

    if engine is not None and engine not in NAMES:
        expected = f"one of {', '.join(NAMES)}"
        hint = "--engine transformers"
        raise UsageError("flag --engine", got=repr(engine), expected=expected, hint=hint)
    return load_recipe(path, overrides, engine)


def with_parity(sets: list[str] | None, **keys: float | None) -> list[str]:
    """The overrides, behind them the keys of ``[parity]`` that have a flag of their own and were given."""
    return [*(sets or []), *(f"parity.{key}={value}" for key, value in keys.items() if value is not None)]


def layers_document(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The layers as ``--json`` gives them: ``layer``, ``verdict``, ``findings``, and what else one holds."""
    from lockstep.runs.strict import plain

    return [plain(v) | {"verdict": v.status} for v in verdicts]


def show_ladder(verdicts: Sequence[Verdict]) -> None:
    """Five rows on stdout, and the failing one explained."""
    for verdict in verdicts:
        show(
            f"{verdict.layer:<10} {verdict.status:<8} "
            f"{verdict.summary if verdict.status != 'NOT_RUN' else verdict.reason}"
        )
        for finding in verdict.findings:
            low, high = finding.ci95
            show(f"           cause     {finding.cause.replace('_', ' ')}")
            interval = f"95 % {low:.4f} to {high:.4f}, {finding.n_tokens} tokens"
            show(f"           effect    {finding.effect_nats:.4f} nats per token ({interval})")
            show(f"           evidence  {finding.evidence}")
            show(f"           fix       {finding.fix}")
