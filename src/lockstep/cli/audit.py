"""``lockstep engines audit`` and ``lockstep check --audit-only``: what an engine resolved to, against what online RL needs."""

import tempfile
from pathlib import Path

from lockstep.cli.common import recipe_of
from lockstep.cli.console import Console, emit
from lockstep.config.recipe import Engine, Model, Recipe, Task, Training
from lockstep.errors import UsageError
from lockstep.records.tokens import SamplingParams


def run_audit(
    path: Path | None,
    url: str | None,
    before: str,
    overrides: list[str] | None,
    engine: str | None,
    api_key_env: str = "",
    *,
    as_json: bool,
) -> int:
    """Start the engine, or ask the server, and print one row for each setting. Returns the exit code.

    Raises:
        UsageError: for neither a recipe nor a URL, or a version whose defaults are not known.
    """
    from lockstep.engines.audit import VERSIONS, audit

    before = next((version for version in VERSIONS if before in (version, f"{version}.post2")), before)
    if before not in VERSIONS:
        raise UsageError("flag --from", got=before, expected=f"one of {', '.join(VERSIONS)}", hint="--from 0.8.5")
    recipe = _recipe(path, url, overrides, engine)
    from lockstep.loop.open import open_engine

    with (
        Console() as console,
        tempfile.TemporaryDirectory(prefix="lockstep-audit-") as scratch,
        open_engine(recipe, Path(scratch) / "engine.log", console.say, api_key_env) as running,
    ):
        rows, ready = audit(running, recipe, before), running.ready
    verdicts = {row.verdict for row in rows}
    code = 1 if "change" in verdicts else 3 if "unknown" in verdicts else 0
    name = f"{ready.engine} {ready.version} ({ready.generation})"
    if as_json:
        emit(
            "engines.audit", {"engine": name, "from": before, "verdict": {0: "PASS", 1: "FAIL", 3: "NOT_RUN"}[code], "rows": rows}
        )
        return code
    print(f"{name}; defaults of {before} beside it\n")
    print(f"{'setting':<22} {'asked':<20} {'resolved':<34} {'in ' + before:<28} verdict")
    for row in rows:
        print(f"{row.knob:<22} {row.asked:<20} {row.resolved:<34} {row.before:<28} {row.verdict}")
        if row.verdict != "ok":
            print(f"{'':<22} {row.why}\n{'':<22} pin: {row.flag}")
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("change", "watch", "unknown", "ok")}
    print("\n" + ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n))
    return code


def _recipe(path: Path | None, url: str | None, overrides: list[str] | None, engine: str | None) -> Recipe:
    if path is not None:
        extra = [f"engine.options.base_url={url}"] if url else []
        return recipe_of(path, [*(overrides or []), *extra], "openai" if url else engine)
    if url is None:
        raise UsageError(
            "engines audit", got="neither", expected="a recipe or --url", hint="lockstep engines audit recipes/quickstart.toml"
        )
    return Recipe(
        model=Model(path=""),
        task=Task(name=""),
        sampling=SamplingParams(max_tokens=1),
        training=Training(steps=1),
        engine=Engine(name="openai", options={"base_url": url}),
    )
