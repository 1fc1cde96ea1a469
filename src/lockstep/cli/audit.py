"""``lockstep engines audit``: what an engine resolved to, against what online RL needs."""

from pathlib import Path

from lockstep import api
from lockstep.cli.common import recipe_of
from lockstep.cli.console import Console, emit
from lockstep.cli.flags import EXIT_CODES
from lockstep.config.recipe import EngineConfig, Model, Recipe, TaskConfig, Training
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
    """Audit, and print one row for each setting. Returns the exit code.

    Raises:
        UsageError: for neither a recipe nor a URL, or a version whose defaults are not known.
    """
    recipe = _recipe(path, url, overrides, engine)
    with Console() as console:
        audited = api.audit(recipe, before, api_key_env=api_key_env, say=console.say)
    if as_json:
        emit(
            "engines.audit",
            {
                "engine": audited.engine,
                "from": audited.before,
                "verdict": audited.status,
                "rows": audited.rows,
            },
        )
    else:
        _show(audited)
    return EXIT_CODES[audited.status]


def _show(audited: api.Audit) -> None:
    print(f"{audited.engine}; defaults of {audited.before} beside it\n")
    print(f"{'setting':<22} {'asked':<20} {'resolved':<34} {'in ' + audited.before:<28} verdict")
    for row in audited.rows:
        print(f"{row.knob:<22} {row.asked:<20} {row.resolved:<34} {row.before:<28} {row.verdict}")
        if row.verdict != "ok":
            print(f"{'':<22} {row.why}\n{'':<22} pin: {row.flag}")
    counts = {
        verdict: sum(row.verdict == verdict for row in audited.rows)
        for verdict in ("change", "watch", "unknown", "ok")
    }
    print("\n" + ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n))


def _recipe(path: Path | None, url: str | None, overrides: list[str] | None, engine: str | None) -> Recipe:
    if path is not None:
        extra = [f"engine.options.base_url={url}"] if url else []
        return recipe_of(path, [*(overrides or []), *extra], "openai" if url else engine)
    if url is None:
        expected = "a recipe or --url"
        hint = "lockstep engines audit recipes/quickstart.toml"
        raise UsageError("engines audit", got="neither", expected=expected, hint=hint)
    return Recipe(
        model=Model(path=""),  # a server says itself what it resolved to; no model of ours is read
        task=TaskConfig(name=""),
        sampling=SamplingParams(max_tokens=1),
        training=Training(steps=1),
        engine=EngineConfig(name="openai", options={"base_url": url}),
    )
