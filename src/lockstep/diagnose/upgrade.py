"""From one engine version to another: what changed, what each change is worth, and a recipe that is proven.

    FROM as it comes ─► observed ────────────────────────┐
    TO   as it comes ─► observed, its own update, ladder ├─► differences, each with effect, cause, flag
    TO + flag of the layer that failed ─► ladder ─► … ───┤   until the ladder passes or names no flag
    TO + every flag ─► ladder ─► certificate ────────────┤   the recipe that is written
    TO + every flag, its head in bf16 ─► observed ───────┘   what the version's own head would cost

One engine runs at a time. Engines are asked for their own defaults (``sides.py``), so that what one would
have got is what is shown; the dtype is the recipe's on both.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from lockstep.config.recipe import Recipe, load_recipe, with_sets
from lockstep.config.written import toml_of
from lockstep.diagnose.changes import Difference, differences
from lockstep.diagnose.sides import FirstRun, Side, as_it_comes, at_update, observed, untempered_nats
from lockstep.errors import LockstepError
from lockstep.faults.at_load import plants
from lockstep.loop.open import Say, open_session
from lockstep.parity.certificate import issue
from lockstep.parity.ladder import climb
from lockstep.records.verdicts import Status, Verdict
from lockstep.runs.durable import make_directory, write_atomically

if TYPE_CHECKING:
    from lockstep.parity.pair import Pair

Result = TypeVar("Result")
RECIPE = "recipe.toml"
SETTING = re.compile(r'\b((?:engine|sampling|model)\.[a-z_.]+) = ("[^"]*"|[0-9][\w.]*|true|false)')
"""An assignment in a fix that people read: what of it can be carried out."""
MOST_FLAGS = 6
"""Failing layers that are mended before it is given up."""


class Step(Struct, frozen=True, kw_only=True):
    """One climb of the ladder on the way to parity."""

    flags: tuple[str, ...]
    """Set by then; the last step is the recipe that is written, on Lockstep's own defaults."""
    status: Status
    layer: str
    """The layer that failed; empty where none did."""
    cause: str
    effect_nats: float
    ci95: tuple[float, float]
    fix: str


class Upgrade(Struct, frozen=True, kw_only=True):
    """What ``lockstep upgrade`` found."""

    verdict: Status
    """The verdict of the final check, with every flag."""
    summary: str
    """``same``, ``same with these flags``, or ``not the same, because …``."""
    before: Side
    after: Side
    differences: tuple[Difference, ...]
    steps: tuple[Step, ...]
    flags: tuple[str, ...]
    """``--set`` arguments of the written recipe."""
    recipe: str
    """The file; empty where nothing passed."""
    resolved: dict[str, tuple[str, str]]
    """Every setting that resolved otherwise: name → before, after."""


class Bench:
    """Engines, one after the other, each in a session of its own; tests have one without engines."""

    def __init__(self, log: Path, say: Say) -> None:
        self.log = log
        self.say = say

    def run(
        self, recipe: Recipe, what: str, work: "Callable[[Pair], Result]", *, breakable: bool = False
    ) -> Result:
        """What ``work`` makes of a running pair.

        Args:
            breakable: its worker can be told to leave parts of a weight update out.
        """
        self.say(f"upgrade: {what}")
        with open_session(recipe, self.log, self.say, plants() if breakable else None) as session:
            return work(session.pair)


def upgrade(
    recipe: Recipe, before: str, after: str, out: Path, say: Say, bench: Bench | None = None
) -> Upgrade:
    """Go from one version to the other.

    Args:
        before: ``0.8.5``, or a server's URL.
        after: ``0.18.1``.
        out: where the recipe and its certificate are written.

    Raises:
        UsageError: for a version that is not installed.
        EngineError: when an engine does not start.
    """
    make_directory(out)
    bench = bench or Bench(out / "engine.log", say)
    plain = as_it_comes(recipe, after)
    old = bench.run(_from(recipe, before), f"{before} as it comes", observed)
    what = f"{after} as it comes, and its own weight update"
    seen = bench.run(plain, what, _first_run, breakable=True)
    steps = _mended(bench, plain, after, seen.verdicts)
    flags = _flags(steps, seen.side)
    final = _written(_final(recipe, after, flags), flags, out)
    if steps[-1].fix.startswith("none: "):  # flags that this version refuses: there is no check of them
        last = steps.pop()
    else:
        last = bench.run(final, f"{after} with every flag: the check of the recipe", _prover(flags, out))
    if last.status != "PASS":
        # Written to be checked as it is read; one that did not pass is handed to nobody.
        (out / RECIPE).unlink()
    return Upgrade(
        verdict=last.status,
        summary=_summary(last, flags),
        before=old,
        after=seen.side,
        differences=tuple(differences(old, seen, _head_of_its_own(bench, final, after))),
        steps=(*steps, last),
        flags=tuple(flags),
        recipe=str(out / RECIPE) if last.status == "PASS" else "",
        resolved=_others(old, seen.side),
    )


def _from(recipe: Recipe, before: str) -> Recipe:
    if "://" not in before:
        return as_it_comes(recipe, before)
    engine = replace(recipe.engine, name="openai", version="", options={"base_url": before})
    return replace(recipe, engine=engine)


def _first_run(pair: "Pair") -> FirstRun:
    return FirstRun(observed(pair), at_update(pair), untempered_nats(pair), climb(pair).verdicts)


def _mended(bench: Bench, recipe: Recipe, after: str, verdicts: list[Verdict]) -> list[Step]:
    """Climb with one flag more each time, as the failing layer names it: until one passes, or names none."""
    steps = [_step((), verdicts)]
    flags = []
    while steps[-1].status == "FAIL" and len(flags) < MOST_FLAGS:
        more = [flag for flag in settings(steps[-1].fix) if flag not in flags]
        if not more:
            break
        flags += more
        what = f"{after} with {', '.join(flags)}"
        try:
            verdicts = bench.run(with_sets(recipe, flags), what, lambda pair: climb(pair).verdicts)
        except LockstepError as error:
            refused = f"none: this version refuses {', '.join(more)} ({error.got[:300]})"
            return [*steps, replace(steps[-1], flags=tuple(flags), fix=refused)]
        steps.append(_step(tuple(flags), verdicts))
    return steps


def _step(flags: tuple[str, ...], verdicts: list[Verdict]) -> Step:
    failed = next((verdict for verdict in verdicts if verdict.status == "FAIL"), None)
    named = failed.findings[0] if failed is not None else None
    passed = all(verdict.status == "PASS" for verdict in verdicts)
    return Step(
        flags=flags,
        status="FAIL" if failed is not None else "PASS" if passed else "NOT_RUN",
        layer=failed.layer if failed is not None else "",
        cause=named.cause if named else "",
        effect_nats=named.effect_nats if named else float("nan"),
        ci95=named.ci95 if named else (float("nan"), float("nan")),
        fix=named.fix if named else "",
    )


def settings(fix: str) -> list[str]:
    """The ``--set`` arguments in a fix; none where it is something to do by hand."""
    return [f"{name}={value.strip(chr(34))}" for name, value in SETTING.findall(fix)]


def _flags(steps: list[Step], new: Side) -> list[str]:
    """What the ladder asked for, then a pin for each setting that the audit would change or watch."""
    pins = [flag for row in new.rows if row.verdict in ("change", "watch") for flag in settings(row.flag)]
    named: dict[str, str] = {}
    for flag in [*steps[-1].flags, *pins]:
        named.setdefault(flag.partition("=")[0], flag)
    return list(named.values())


def _final(recipe: Recipe, after: str, flags: list[str]) -> Recipe:
    own = recipe.engine.options if recipe.engine.version == after else {}
    engine = replace(recipe.engine, name="vllm", version=after, python="", options=own)
    return with_sets(replace(recipe, engine=engine), flags)


def _written(recipe: Recipe, flags: list[str], out: Path) -> Recipe:
    """The recipe as it is read from the file that is kept: what is checked is what is handed over."""
    remarks = {flag.partition("=")[0]: "set by lockstep upgrade" for flag in flags}
    write_atomically(out / RECIPE, toml_of(recipe, remarks).encode())
    return load_recipe(out / RECIPE)


def _prover(flags: list[str], out: Path) -> "Callable[[Pair], Step]":
    """Climb, and certify what passed."""

    def prove(pair: "Pair") -> Step:
        verdicts = climb(pair).verdicts
        step = _step(tuple(flags), verdicts)
        if step.status == "PASS":
            issue(pair, verdicts, out / "certificate.json")
        return step

    return prove


def _head_of_its_own(bench: Bench, recipe: Recipe, after: str) -> Side | str:
    """The engine with its last product in bf16, as its own ``dtype=auto`` takes it; or why it was not."""
    if "bfloat16" in (recipe.engine.head_dtype, recipe.model.head_dtype):
        return "the recipe's own head is in bf16"
    in_bf16 = replace(recipe, engine=replace(recipe.engine, head_dtype="bfloat16"))
    try:
        return bench.run(in_bf16, f"{after} with its head in bf16", observed)
    except LockstepError as error:
        return f"{error.boundary}: {error.got}"


def _summary(last: Step, flags: list[str]) -> str:
    if last.status == "PASS":
        return f"same with these flags: {' '.join(f'--set {flag}' for flag in flags)}" if flags else "same"
    if last.status == "NOT_RUN":
        return "not judged whole: the check with every flag left a layer open"
    mend = f"; to mend it: {last.fix}" if last.fix else ""
    return f"not the same, because of {last.cause.replace('_', ' ')} in layer {last.layer}{mend}"


def _others(old: Side, new: Side) -> dict[str, tuple[str, str]]:
    names = sorted(old.resolved.keys() | new.resolved.keys())
    pairs = {name: (old.resolved.get(name, "none"), new.resolved.get(name, "none")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
