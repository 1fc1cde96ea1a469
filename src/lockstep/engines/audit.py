"""A migration checklist, executable: what the running engine resolved to, against what online RL needs.

The list is of the engine that one comes from, and its adapter's (``registry.CHECKLISTS``); whichever engine
runs is held against it. The *resolved* value decides, never what was asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from msgspec import Struct

from lockstep.config.recipe import Recipe
from lockstep.engines.base import Engine
from lockstep.engines.environments.recipes import version_order

Standing = Literal["ok", "watch", "change", "unknown"]


class Judgement(NamedTuple):
    """What is said of a setting's value: where it stands, and why."""

    standing: Standing
    why: str


JudgeOfKnob = Callable[[Any, Recipe], Judgement]


class KnobRow(Struct, frozen=True):
    """One knob of one engine."""

    knob: str
    asked: str
    resolved: str
    before: str
    """The default in the version that one comes from."""
    verdict: Standing
    why: str
    flag: str
    """The recipe line that mends or pins it."""


@dataclass(frozen=True)
class Knob:
    """One setting: where it is read, what it was, and what RL needs it to be."""

    name: str
    keys: tuple[str, ...]
    """Names in the resolved configuration, the first that is there counts."""
    option: str
    """The engine argument."""
    defaults: dict[str, str]
    """Version → its own default."""
    judge: JudgeOfKnob
    flag: str


@dataclass(frozen=True)
class Checklist:
    """The settings of one engine that a migration has to look at."""

    versions: tuple[str, ...]
    """Whose defaults are known, the oldest first."""
    knobs: tuple[Knob, ...]


def audit(engine: Engine, recipe: Recipe, checklist: Checklist, before: str) -> list[KnobRow]:
    """One row for each knob.

    Args:
        before: the version one comes from, of the checklist's.
    """
    return [_row(knob, engine, recipe, before) for knob in checklist.knobs]


def _row(knob: Knob, engine: Engine, recipe: Recipe, before: str) -> KnobRow:
    resolved = engine.ready.resolved
    key = next((key for key in knob.keys if key in resolved), None)
    if key is None:
        verdict, why = _absent(knob, engine)
        value = "-"
    else:
        value = str(resolved[key])
        verdict, why = knob.judge(resolved[key], recipe)
    asked = engine.asked.get(knob.option, "-")
    return KnobRow(knob.name, str(asked), value, knob.defaults[before], verdict, why, knob.flag)


def _absent(knob: Knob, engine: Engine) -> Judgement:
    """A setting that is not in the resolved configuration.

    There is none in this version, as its adapter says, or the engine does not tell.
    """
    since = engine.facts.since.get(knob.name)
    if since is not None and (not since or version_order(engine.ready.version) < version_order(since)):
        return Judgement("ok", "this engine has no such setting")
    can = engine.ready.capabilities["resolved_config"]
    if not can.supported:
        return Judgement("unknown", can.how)
    if knob.keys[0].startswith("worker."):  # what every worker of ours measures
        return Judgement("unknown", "seen from inside the engine's worker only")
    return Judgement("unknown", "not in what this engine tells of itself; it may have another name there")
