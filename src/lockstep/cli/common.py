"""What the verbs share."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lockstep.cli.console import show
from lockstep.config.recipe import EngineName, Recipe, load_recipe
from lockstep.errors import UsageError
from lockstep.records.verdicts import Verdict

if TYPE_CHECKING:
    from lockstep.loop.open import Plants


def recipe_of(path: Path, overrides: list[str] | None, engine: str | None) -> Recipe:
    """The recipe with ``--engine`` and then ``--set`` applied."""
    known = get_args(EngineName)
    if engine is not None and engine not in known:
        raise UsageError("flag --engine", got=repr(engine), expected=f"one of {', '.join(known)}", hint="--engine transformers")
    return load_recipe(path, overrides, engine)


def planted(names: list[str] | None) -> tuple[str, ...]:
    """The faults of ``--plant``, known by name."""
    from lockstep.faults.catalogue import planted as known

    return known(names or [])


def plants(faults: tuple[str, ...]) -> "Plants | None":
    """They for :func:`~lockstep.loop.open.open_session`; None for none, and then nothing that plants is loaded."""
    if not faults:
        return None
    from lockstep.faults.at_load import plants as at_load

    return at_load(faults)


def layers_document(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The layers as ``--json`` gives them: ``layer``, ``verdict``, ``findings`` and what else a verdict holds."""
    from lockstep.runs.strict import plain

    return [plain(v) | {"verdict": v.status} for v in verdicts]


def show_ladder(verdicts: Sequence[Verdict]) -> None:
    """Five rows on stdout, and the failing one explained."""
    for verdict in verdicts:
        show(f"{verdict.layer:<10} {verdict.status:<8} {verdict.summary if verdict.status != 'NOT_RUN' else verdict.reason}")
        for found in verdict.findings:
            low, high = found.ci95
            show(f"           cause     {found.cause.replace('_', ' ')}")
            interval = f"95 % {low:.4f} to {high:.4f}, {found.n_tokens} tokens"
            show(f"           effect    {found.effect_nats:.4f} nats per token ({interval})")
            show(f"           evidence  {found.evidence}")
            show(f"           fix       {found.fix}")
