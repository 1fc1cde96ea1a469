"""From what was recorded to a :class:`Report`: one function for a run; other documents: ``of_documents.py``.

run directory ─► verdicts, steps, manifest, rollouts ─► sections ─► Report ─► report.json ─► page.py
"""

import csv
import io
import re
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import numpy as np

from lockstep.errors import RunError
from lockstep.metrics.catalog import metric_named
from lockstep.records.verdicts import LAYERS, AfterSync, BeforeStep, OfCheck, OfRollouts, Status, Verdict
from lockstep.report.document import Download, Line, Plot, Report, Section, Table
from lockstep.report.ledger import ledger_section
from lockstep.report.rollouts import gap_section, rollouts_section
from lockstep.report.scores import scores_section
from lockstep.report.tokens import GapCounts, read_gaps
from lockstep.runs.layout import RunLayout
from lockstep.runs.read import RunRecord, read_verdicts
from lockstep.runs.sinks.base import VerdictRecord
from lockstep.summary import summarise

PLOTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Reward", ("reward_mean",)),
    ("Held-out reward", ("evaluation_reward_mean",)),
    ("Entropy", ("entropy_mean_nats",)),
    ("Clip rate", ("clip_fraction", "outside_clip_fraction", "phantom_clip_fraction")),
    ("KL, k3", ("policy_kl_k3_nats", "mismatch_kl_k3_nats")),
    ("Mean ratios", ("policy_ratio_mean", "mismatch_ratio_mean")),
    ("Effective sample size", ("policy_ess", "mismatch_ess")),
    ("|gap|", ("gap_abs_p50_nats", "gap_abs_p999_nats", "gap_abs_max_nats", "canary_gap_abs_max_nats")),
    ("Lag", ("lag_steps",)),
    ("Completion length", ("completion_tokens_mean",)),
    ("Turns and tool calls", ("turns_mean", "tool_calls_mean")),
    ("Pairs, the chosen further up", ("pair_accuracy",)),
    ("Gradient norm", ("grad_norm",)),
    ("Speed", ("tokens_per_s",)),
)
"""Titles and the figures of one axis; a figure that the run has not is left out."""
PART_OF_REWARD = re.compile(r"rewards/[^/]+/mean")
RESOLVED_SHOWN = 400


def of_run(run: RunRecord) -> Report:
    """The report of a training run.

    Raises:
        RunError: for a damaged file; damaged rollouts are said in their section instead.
    """
    summary = summarise(run)
    verdicts = run.verdicts
    ladder = _last_ladder(verdicts)
    status = _status(ladder, verdicts, bool(summary.planted or summary.override))
    gaps, lost = _gaps(run.layout)
    model = Path(run.manifest.model_path)
    sections = [
        *ladder_sections(ladder),
        _alarms(run),
        _proofs(verdicts),
        ledger_section(run.layout),
        gap_section(gaps, lost),
        *([_trajectories(run)] if len(run.steps) else []),
        _configuration(run),
        rollouts_section(gaps, model, lost),
    ]
    return Report(
        kind="run",
        title=f"Run {run.layout.root.name}",
        status=status,
        words=tuple(_words(run, ladder, gaps)),
        sections=tuple(section for section in sections if section is not None),
        downloads=(Download(name="metrics.csv", mime="text/csv", text=_csv(run)),),
    )


def of_check(directory: Path) -> Report:
    """The report of what ``lockstep check --out DIR`` left: the verdicts of its last climb.

    Raises:
        RunError: for a damaged file, or none.
    """
    layout = RunLayout(directory)
    records = read_verdicts(layout.verdicts)
    if not records:
        got = "no verdict in it"
        hint = f"lockstep check RECIPE --out {directory}"
        raise RunError(f"directory {directory}", got=got, expected="a run, or a check's --out", hint=hint)
    ladder = _last_ladder(records)
    return Report(
        kind="check",
        title=f"Check {directory.name}",
        status=_status(ladder, (), void=False),
        words=tuple(ladder_words(ladder)),
        sections=ladder_sections(ladder),
    )


def _last_ladder(records: Sequence[VerdictRecord]) -> list[Verdict]:
    """The verdicts of the last climb, from layer 1 on."""
    # A run that goes on climbs again, and keeps the verdicts of before.
    climbed = [record for record in records if isinstance(record.when, BeforeStep | OfCheck)]
    starts = [at for at, record in enumerate(climbed) if record.verdict.layer == LAYERS[0]]
    return [record.verdict for record in climbed[starts[-1] :]] if starts else []


def _status(ladder: Sequence[Verdict], records: Sequence[VerdictRecord], void: bool) -> Status:
    statuses = {verdict.status for verdict in ladder} | {
        record.verdict.status for record in records if record.verdict.status == "FAIL"
    }
    if "FAIL" in statuses:
        return "FAIL"
    return "PASS" if statuses == {"PASS"} and len(ladder) == len(LAYERS) and not void else "NOT_RUN"


def ladder_words(ladder: Sequence[Verdict]) -> list[str]:
    """What a ladder says, the failing layer first."""
    if not ladder:
        return ["No ladder was climbed: nothing is proven."]
    # One at most: the ladder stops at the first.
    failed = next((verdict for verdict in ladder if verdict.status == "FAIL"), None)
    if failed is None:
        left = [verdict.layer for verdict in ladder if verdict.status == "NOT_RUN"]
        if left:
            return [f"Nothing failed, but {', '.join(left)} could not be judged: this proves no parity."]
        return ["Engine and trainer were proven to be the same policy, layer by layer."]
    words = [f"Layer {failed.layer} failed: {failed.summary}."]
    for finding in failed.findings:
        low, high = finding.ci95
        words.append(
            f"The cause is {finding.cause.replace('_', ' ')}, worth {finding.effect_nats:.4f} nats per token "
            f"(95 % {low:.4f} to {high:.4f}). Mend: {finding.fix}"
        )
    return words


def planted_words(names: Sequence[str]) -> str:
    """What is said first where something was planted."""
    return f"Faults were planted on purpose ({', '.join(names)}): this certifies nothing."


def ladder_sections(ladder: Sequence[Verdict]) -> tuple[Section, ...]:
    """What a ladder has to show alone."""
    scores = scores_section(ladder)
    return (ladder_section(ladder), *(() if scores is None else (scores,)))


def ladder_section(ladder: Sequence[Verdict]) -> Section:
    """Five rows, and what was measured in each."""
    rows = tuple((v.layer, v.status, v.summary if v.status != "NOT_RUN" else v.reason) for v in ladder)
    tables = [Table(title="Layers", columns=("layer", "verdict", "what was found"), rows=rows)]
    for verdict in ladder:
        if verdict.findings:
            tables.append(_findings(verdict))
        figures = tuple((name, shown(value)) for name, value in sorted(verdict.figures.items()))
        if figures:
            title = f"Figures of layer {verdict.layer}, {verdict.n_tokens:,} tokens"
            tables.append(Table(title=title, columns=("figure", "value"), rows=figures, folded=True))
    return Section(title="Ladder", tables=tuple(tables))


def _findings(verdict: Verdict) -> Table:
    rows = tuple(
        (
            finding.cause.replace("_", " "),
            f"{finding.effect_nats:.4f} ({finding.ci95[0]:.4f} to {finding.ci95[1]:.4f})",
            finding.evidence,
            finding.fix,
        )
        for finding in verdict.findings
    )
    columns = ("cause", "effect, nats per token (95 %)", "evidence", "mend")
    return Table(title=f"Causes named in layer {verdict.layer}", columns=columns, rows=rows)


def _proofs(records: Sequence[VerdictRecord]) -> Section | None:
    """Every sync's proof: how many, and each that is no PASS."""
    proofs = [record for record in records if not isinstance(record.when, BeforeStep | OfCheck)]
    if not proofs:
        return None
    versions: dict[int, list[str]] = {}
    for record in proofs:
        if isinstance(record.when, AfterSync | OfRollouts):
            versions.setdefault(record.when.version, []).append(record.verdict.status)
    proven = sum("PASS" in statuses for statuses in versions.values())
    other = tuple(
        (str(record.when), record.verdict.status, record.verdict.reason or record.verdict.summary)
        for record in proofs
        if record.verdict.status != "PASS"
    )
    columns = ("proof", "verdict", "what was found")
    tables = (Table(title="Proofs that are no PASS", columns=columns, rows=other),) if other else ()
    text = f"{proven} of {len(versions)} weight syncs were proven by tokens that were scored after them."
    return Section(title="Weight syncs", text=(text,), tables=tables)


def _alarms(run: RunRecord) -> Section | None:
    """Each figure that left what is predicted of it."""
    if not run.alarms:
        return None
    rows = tuple((str(a.step + 1), a.name, a.layer, a.sentence) for a in run.alarms)
    columns = ("step", "figure", "likely layer", "what was seen")
    return Section(title="Alarms", tables=(Table(title="Alarms by step", columns=columns, rows=rows),))


def _gaps(layout: RunLayout) -> tuple[GapCounts, str]:
    """The counts over all admitted rollouts, and why there are none."""
    paths = sorted((layout.root / "rollouts").glob("step-*.parquet"))
    if not paths:
        return GapCounts(), "no rollouts were admitted"
    try:
        return read_gaps(paths), ""
    except ModuleNotFoundError as error:
        return GapCounts(), f'not read: this Python has no {error.name}: pip install "lockstep-rl[report]"'
    except RunError as error:
        return GapCounts(), f"not read: {error.boundary}: {error.got}"


def _trajectories(run: RunRecord) -> Section:
    steps = np.array([record.step + 1 for record in run.steps], np.float64)
    plots = []
    stamped = any(record.override for record in run.steps)
    of_each = {name for record in run.steps for name in record.metrics if PART_OF_REWARD.fullmatch(name)}
    for title, names in (*PLOTS, ("Each reward, before its weight", tuple(sorted(of_each)))):
        there = [name for name in names if run.steps.measured(name).any()]
        if there:
            # Of what is measured every so many steps, these.
            at = np.any([run.steps.measured(name) for name in there], axis=0)
            lines = tuple(Line(name=name, ys=tuple(run.steps.column(name)[at].tolist())) for name in there)
            metric = metric_named(there[0])
            assert metric is not None
            title = f"{title}, not proven" if stamped else title
            xs = tuple(steps[at].tolist())
            plots.append(Plot(title=title, unit=metric.unit, x_label="step", xs=xs, lines=lines))
    return Section(title="Trajectories", plots=tuple(plots))


def _configuration(run: RunRecord) -> Section:
    manifest = run.manifest
    chosen = tuple((name, value, why) for name, (value, why) in sorted(manifest.choices.items()))
    resolved = tuple((name, shown(value)) for name, value in sorted(manifest.engine.resolved.items()))
    facts = (
        ("engine", f"{manifest.engine.engine} {manifest.engine.version} ({manifest.engine.generation})"),
        ("model", manifest.recipe.model.path),
        *((name, version) for name, version in manifest.versions.items()),
        *manifest.machine.items(),
        ("planted faults", ", ".join(manifest.planted) or "none"),
    )
    tables = (
        Table(title="What ran", columns=("part", "value"), rows=facts),
        Table(title="What Lockstep chose, and why", columns=("setting", "value", "reason"), rows=chosen),
        Table(
            title="What the engine resolved to",
            columns=("setting", "value"),
            rows=resolved[:RESOLVED_SHOWN],
            note=f"{len(resolved) - RESOLVED_SHOWN} more are in manifest.json"
            if len(resolved) > RESOLVED_SHOWN
            else "",
            folded=True,
        ),
        Table(title="Recipe", columns=("key", "value"), rows=tuple(_flat(manifest.recipe)), folded=True),
    )
    return Section(title="Configuration", tables=tables)


def _flat(recipe: object) -> list[tuple[str, str]]:
    import msgspec

    table = msgspec.to_builtins(recipe)
    return [
        (f"{section}.{key}", shown(value)) for section, keys in table.items() for key, value in keys.items()
    ]


def shown(value: object) -> str:
    """A value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.5g}" if isfinite(value) else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) or "{}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    return str(value)


def _words(run: RunRecord, ladder: Sequence[Verdict], gaps: GapCounts) -> list[str]:
    words = ladder_words(ladder)
    if run.manifest.planted:
        words.insert(0, planted_words(run.manifest.planted))
    summary = summarise(run)
    if summary.override:
        words.insert(0, f"It was trained without proof. {summary.override}")
    if summary.alarms:
        many = "1 alarm was raised" if summary.alarms == 1 else f"{summary.alarms} alarms were raised"
        words.append(f"{many}; the first: {run.alarms[0]}")
    if summary.steps == 1:
        words.append(f"1 step was trained; its reward is {summary.reward_last_quarter:.3f}.")
    elif summary.steps:
        words.append(
            f"{summary.steps} steps were trained; the reward went from {summary.reward_first_quarter:.3f} "
            f"(first quarter) to {summary.reward_last_quarter:.3f} (last)."
        )
    if gaps.compared:
        words.append(
            f"Over {gaps.compared:,} tokens the largest |trainer − engine| is {gaps.largest:.3g} nats."
        )
    if gaps.missing:
        words.append(f"{gaps.missing:,} tokens have no finite log-probability of the engine's.")
    return words


def _csv(run: RunRecord) -> str:
    names = sorted({name for record in run.steps for name in record.metrics})
    stamped = any(record.override for record in run.steps)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("step", "weight_version", *names, *(("override",) if stamped else ())))
    for record in run.steps:
        # ``repr`` has every digit that it takes to read the number back.
        values = (repr(record.metrics[name]) if name in record.metrics else "" for name in names)
        stamp = (record.override,) if stamped else ()
        table.writerow((record.step, record.weight_version, *values, *stamp))
    return text.getvalue()
