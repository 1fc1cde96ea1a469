"""``lockstep metrics``: every figure there is, and what other systems call it."""

from typing import Annotated, Any

import msgspec
import typer

from lockstep.cli.console import emit, show
from lockstep.cli.flags import Json
from lockstep.errors import UsageError
from lockstep.metrics.aliases import ALIASES, SYSTEMS, System, alias_named
from lockstep.metrics.catalog import BY_NAME, METRICS, metric_named
from lockstep.metrics.metric import Metric


def metrics(
    name: Annotated[
        str | None, typer.Argument(help="One figure, by our name or by another system's.")
    ] = None,
    aliases: Annotated[
        str | None,
        typer.Option(metavar="trl|verl|pipelinerl", help="Another system's names, and where they differ."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Every figure of a run: formula, unit, estimator, what it is over, what stands below a ratio.

    A name whose formula is another elsewhere is refused, with how it differs: exit code 2.
    """
    system = _system(aliases)
    if name is not None:
        chosen = metric_named(name) or BY_NAME[alias_named(name, system).ours]
        emit("catalog", {"metrics": [_told(chosen)]}) if as_json else show(_one(chosen))
    elif as_json:
        emit("catalog", {"metrics": [_told(metric) for metric in METRICS]})
    elif system is not None:
        own = [alias for alias in ALIASES if alias.system == system]
        show("\n".join(f"{a.name:<46} {a.ours or '-':<28} {a.told}" for a in own))
    else:
        show("\n".join(f"{m.name:<28} {m.unit:<9} {m.formula}" for m in METRICS))


def _system(asked: str | None) -> System | None:
    if asked is None:
        return None
    for system in SYSTEMS:  # returned from there, so that it has their type
        if system == asked:
            return system
    raise UsageError(
        "flag --aliases", got=repr(asked), expected=f"one of {', '.join(SYSTEMS)}", hint="--aliases trl"
    )


def _told(metric: Metric) -> dict[str, Any]:
    own = [alias for alias in ALIASES if alias.ours == metric.name]
    return {
        **msgspec.structs.asdict(metric),
        "aliases": [
            {
                "system": a.system,
                "name": a.name,
                "exported": not a.differs,
                "only_with": a.only.said if a.only is not None else "",
                "differs": a.differs,
            }
            for a in own
        ],
    }


def _one(metric: Metric) -> str:
    rows = [(key, value) for key, value in msgspec.structs.asdict(metric).items() if value]
    own = [alias for alias in ALIASES if alias.ours == metric.name]
    rows += [(a.system, f"{a.name}: {a.told}") for a in own]
    return "\n".join(f"{key:<12} {value}" for key, value in rows)
