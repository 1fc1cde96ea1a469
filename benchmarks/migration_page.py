"""The migration's page from its document: ``python benchmarks/migration_page.py DOCUMENT.json``.

Writes ``docs/concepts/the-migration.md`` and its picture. Every number there is the document's, which
``migration_results.py`` made of the runs' files; the sentences are of the setting, and of no result.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import migration_claims as claims
from migration_arms import COMPARED
from migration_results import STORY

from lockstep.report.document import Line, Plot
from lockstep.report.svg import HEIGHT, WIDTH, svg
from lockstep.runs.durable import write_atomically
from lockstep.runs.strict import exact

ROOT = Path(__file__).parents[1]
DRAWN = ("v0", "v1-defaults", "v1-all", "v1-logprobs", "tis")
"""Blue, red and green as the story has them, then two more."""
STYLE = (
    "text{fill:#1a1a1a;font:11px sans-serif}.axis{stroke:#595959;fill:none}.grid{stroke:#d0d0d0}"
    ".l{fill:none;stroke-width:2}.b{stroke:none;opacity:.15}"
    ".l0{stroke:#0b5fb4}.l1{stroke:#c0392b}.l2{stroke:#1b7a3d}.l3{stroke:#7a3fa0}.l4{stroke:#8a6100}"
    ".f0{fill:#0b5fb4}.f1{fill:#c0392b}.f2{fill:#1b7a3d}.f3{fill:#7a3fa0}.f4{fill:#8a6100}"
)
COLUMNS = (
    ("clip rate", "clip_fraction"),
    ("KL (k3), nats", "policy_kl_k3_nats"),
    ("entropy, nats", "entropy_mean_nats"),
    ("reward, first quarter", "reward_first_quarter"),
    ("last", "reward_last_quarter"),
    ("mean ratio", "policy_ratio_mean"),
    (r"mean \|gap\|, nats", "gap_abs_mean_nats"),
    ("mismatch KL, nats", "mismatch_kl_k3_nats"),
    ("masked", "correction_masked_fraction"),
    ("lag", "lag_steps"),
)
VERDICT_COLUMNS = (
    *("arm", "figure", "verdict", "reference", "difference", "90 %", "margin"),
    *("seeds that would tell", "since step"),
)
STORY_TOLD = """\
ServiceNow's PipelineRL moved its engine from vLLM 0.8.5 (V0, blue) to 0.18.1 (V1). The first V1 run (red)
left the reference in clip rate, KL, entropy and reward; four mends of the backend brought it back
(green): processed log-probabilities, explicit runtime defaults, the in-flight weight update, and the last
product in fp32 ([vLLM V0 to V1: correctness before
corrections](https://huggingface.co/blog/ServiceNow-AI/correctness-before-corrections))."""
BUILT = """\
A run is `lockstep train recipes/quickstart.toml` in flight at lag 1, at T = .7 and under GSPO, as
PipelineRL's runs were; all that an arm sets is listed at the end. What this is not:

- **Small.** SmolLM2-135M learns two-term addition on two CPU cores, with answers of some three tokens.
  The range that a sequence's ratio is held in is fifty times that of a public GSPO recipe of
  PipelineRL's (`conf/math_qwen05_gspo_common.yaml`, [.997, 1.004]), in the same proportion: a mean over
  three tokens moves further than one over thousands.
- **V0's update.** vLLM 0.8.5 has no pause, and Lockstep's adapter lets its requests end before weights
  change (`rollout.update = "wait"`). PipelineRL's V0 exchanged weights between two steps of the engine,
  requests going on.
- **V1's defaults.** Raw log-probabilities, the prefix cache on, `generation_config = "auto"` (which moves
  nothing here: Lockstep's requests name every setting). Asynchronous scheduling cannot be had: 0.18.1
  turns it off on a CPU. Chunked prefill stays off in every arm: there a seeded request whose prefill is
  chunked ends the engine.
- **V1's own weight update.** Lockstep's worker always exchanges weights between two steps of the engine
  and clears what must be cleared; an update without that is a planted fault, `--plant keep_cache`,
  stamped on each run that has it. vLLM's own update clears no cache: requests go on over what the old
  weights wrote, and a prompt that was cached before an update is found after it. The fixed arms pause,
  keep the caches of what is running, and find a cached prompt under its own version alone
  (`rollout.update = "keep"`): that rule mends a stale prefix cache too.
- **The stale head** of a tied model on some CPUs is mended in every arm; the story's GPUs have nothing of
  the kind.
- **The fp32 head** has nothing to mend where all is in fp32, so a variant with both bodies in bf16 stands
  for it. V0 is not in it: its attention on a CPU rounds bf16 more widely than V1's.
- **Two denominators.** The clip is of the trainer now to the engine when it sampled, as PipelineRL has
  it. A correction needs the trainer's own number there (`objective.old_logprobs = "sampling"`), so clip
  rate and KL of those arms leave the mismatch out; of the fixed run both are the same number, for there
  the two sides agree{agree}.

What the ladder refuses is trained on under `parity.override`, which is stamped on every step."""


@dataclass(frozen=True)
class Places:
    """Where what was found goes."""

    document: Path
    page: Path
    picture: Path


def in_tree(form: str) -> Places:
    """In this clone."""
    concepts = ROOT / "docs" / "concepts"
    return Places(
        ROOT / "evidence" / "migration" / f"{form}.json",
        concepts / "the-migration.md",
        concepts / "pictures" / "the-migration.svg",
    )


def write(document: Mapping[str, Any], places: Places) -> None:
    """The document as it is, the page and the picture made of it."""
    texts = {
        places.document: json.dumps(document, indent=1, allow_nan=False) + "\n",
        places.page: page(document, places),
        places.picture: picture(document) + "\n",
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
        path.chmod(0o644)  # written like a run's file, which is private


def page(document: Mapping[str, Any], places: Places) -> str:
    """The page, in Markdown."""
    found = exact(document)
    make = "make migration" if found["form"] == "full" else "make migration-short"
    made = f"python benchmarks/migration_page.py {_in_clone(places.document)}"
    shown = os.path.relpath(places.picture, places.page.parent)
    lines = [
        "# The migration: vLLM 0.8.5 to 0.18.1, fix by fix",
        "",
        f"Made by `{make}` of its runs' files, and again by `{made}`; not written by hand.",
        "",
        STORY_TOLD,
        "",
        "## What is run here",
        "",
        *_ran(found, make),
        "",
        BUILT.format(agree=_agreement(found)),
        "",
        "## What was reproduced",
        "",
        *_claims(found),
        "",
        *_mean_ratio(found),
        f"![Clip rate, KL, entropy and reward over the steps]({shown})",
        "",
        "## What the ladder says before the first step",
        "",
        *_ladders(found),
        "",
        "## Figures",
        "",
        *_figures(found),
        "",
        "## Verdicts",
        "",
        *_verdicts(found),
        "## Runs",
        "",
        *_runs(found),
        "",
        "## What each arm sets",
        "",
        *_sets(found),
    ]
    return "\n".join(lines) + "\n"


def _in_clone(path: Path) -> str:
    """Where a file is in the clone; outside it its name alone."""
    inside = path.absolute()
    return str(inside.relative_to(ROOT)) if inside.is_relative_to(ROOT) else path.name


def _ran(found: Mapping[str, Any], make: str) -> list[str]:
    runs = [run for arm in found["arms"] for run in arm["runs"]]
    ended = sum(run["status"] == "finished" for run in runs)
    machine = found["machine"]
    seeds = ", ".join(map(str, found["seeds"]))
    one = " One seed says nothing of another, so no figure here is called different or equivalent by it."
    return [
        f"`{make}`, the {found['form']} form: {len(found['arms'])} arms, seeds {seeds}; {ended} of "
        f"{len(runs)} runs finished, in {_took(found['seconds'])} on {machine['cores']} cores "
        f"({machine['processor']})."
        f"{one * (len(found['seeds']) == 1)}",
    ]


def _took(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"


def _agreement(found: Mapping[str, Any]) -> str:
    gaps = _values(found, "v1-all", "gap_abs_max_nats")
    return f" to {max(gaps):.1g} nats" if gaps else ""


def _claims(found: Mapping[str, Any]) -> Iterator[str]:
    yield from ["| the story | held against | here | figures: reference → arm |", "|---|---|---|---|"]
    for claim in claims.found(found):
        held = f"`{claim.arm}` against `{claim.reference}`" if claim.reference else f"`{claim.arm}`"
        yield f"| {claim.says} | {held} | **{claim.outcome}** | {claim.numbers} |"


def _mean_ratio(found: Mapping[str, Any]) -> Iterator[str]:
    """The first fix's trap: the mean is right again, and says nothing of the rest."""
    means = {name: _values(found, name, "policy_ratio_mean") for name in ("v0", "v1-defaults", "v1-logprobs")}
    if not all(means.values()):
        return
    told = {name: f"{fmean(values):.4g}" for name, values in means.items()}
    yield (
        f"Processed log-probabilities alone take the mean ratio from {told['v1-defaults']} to "
        f"{told['v1-logprobs']}; the reference has {told['v0']}. What the mean does not show stands in the "
        "figures beside it."
    )
    yield ""


def _ladders(found: Mapping[str, Any]) -> Iterator[str]:
    yield from ["| arm | layer | says | effect, nats a token (95 %) | mend |", "|---|---|---|---|---|"]
    for arm in found["arms"]:
        for verdict in _first_ladder(arm):
            effect = verdict["effect_nats"]
            size = (
                ""
                if effect is None
                else f"{effect:.3g} ({verdict['ci95'][0]:.3g} to {verdict['ci95'][1]:.3g})"
            )
            says = f"{verdict['status']} {verdict['cause'].replace('_', ' ')}".strip()
            mend = f"`{verdict['fix']}`" if verdict["fix"] else ""
            yield f"| `{arm['name']}` | {verdict['layer']} | {says} | {size} | {mend} |"


def _first_ladder(arm: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What stopped the ladder of the first seed that has one; all five layers as one where nothing did."""
    ladder = next((run["ladder"] for run in arm["runs"] if run["ladder"]), [])
    stopped = [verdict for verdict in ladder if verdict["status"] != "PASS"]
    if ladder and not stopped:
        return [{**ladder[-1], "layer": f"all {len(ladder)}"}]
    return stopped[:1]


def _figures(found: Mapping[str, Any]) -> Iterator[str]:
    yield "Means over the steps, then over the seeds that finished; in brackets the least and most of a seed."
    yield ""
    yield f"| arm | seeds | {' | '.join(title for title, _ in COLUMNS)} |"
    yield f"|---|---|{'---|' * len(COLUMNS)}"
    for arm in found["arms"]:
        finished = [run for run in arm["runs"] if run["status"] == "finished"]
        cells = [
            _cell([run["figures"][name] for run in finished if name in run["figures"]]) for _, name in COLUMNS
        ]
        yield f"| `{arm['name']}` | {len(finished)} | {' | '.join(cells)} |"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    ends = f" [{min(values):.3g}, {max(values):.3g}]" if len(values) > 1 else ""
    return f"{fmean(values):.3g}{ends}"


def _verdicts(found: Mapping[str, Any]) -> Iterator[str]:
    for comparison in found["comparisons"]:
        yield f"`{comparison['command']}`"
        yield ""
        yield f"| {' | '.join(VERDICT_COLUMNS)} |"
        yield f"|{'---|' * len(VERDICT_COLUMNS)}"
        for against in comparison["against"]:
            for figure in against["figures"]:
                yield f"| `{against['name']}` | {_verdict(figure)} |"
        yield ""
    if not found["comparisons"]:
        yield from ["No two arms have a finished run to compare.", ""]


def _verdict(figure: Mapping[str, Any]) -> str:
    low, high = figure["ci90"]
    known = low == low
    cells = (
        f"`{figure['name']}`",
        figure["verdict"],
        f"{figure['reference_mean']:.3g}",
        f"{figure['difference']:+.3g}",
        f"{low:+.3g} to {high:+.3g}" if known else "–",
        f"{figure['margin']:.3g}" if known else "–",
        str(figure["seeds_needed"] or "–"),
        "–" if figure["since_step"] is None else f"{figure['since_step']:g}",
    )
    return " | ".join(cells)


def _runs(found: Mapping[str, Any]) -> Iterator[str]:
    yield from ["| run | engine | ended | steps | minutes | why |", "|---|---|---|---|---|---|"]
    for arm in found["arms"]:
        for run in arm["runs"]:
            minutes = f"{run['seconds'] / 60:.1f}" if "seconds" in run else "–"
            reason = run["reason"].replace("|", r"\|").replace("\n", " ")
            cells = (
                f"`{run['name']}`",
                run.get("engine", "–"),
                run["status"],
                str(run["steps"]),
                minutes,
                reason,
            )
            yield f"| {' | '.join(cells)} |"


def _sets(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"Every arm: `{' '.join(found['common'])}`"
    yield ""
    for arm in found["arms"]:
        own = [text for text in arm["sets"] if text not in found["common"]]
        planted = "".join(f" --plant {fault}" for fault in arm["planted"])
        yield f"- `{arm['name']}`, {arm['says']}: `{' '.join(own)}{planted}`"


def _values(found: Mapping[str, Any], arm: str, figure: str) -> list[float]:
    runs = [run for one in found["arms"] if one["name"] == arm for run in one["runs"]]
    return [
        run["figures"][figure] for run in runs if run["status"] == "finished" and figure in run["figures"]
    ]


def picture(document: Mapping[str, Any]) -> str:
    """The story's four curves, two by two."""
    found = exact(document)
    reference = next(iter(COMPARED))
    series = {(s["arm"], s["figure"]): s for c in found["comparisons"] for s in c["series"]}
    arms = [arm for arm in DRAWN if any((arm, figure) in series for figure in STORY)]
    high = HEIGHT + 16 * max(len(arms), 1)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {2 * (high + 20)}">'
    parts = [head, f"<style>{STYLE}</style>", '<rect width="100%" height="100%" fill="#fff"/>']
    for place, figure in enumerate(STORY):
        plot = _plot(figure, [series[arm, figure] for arm in arms if (arm, figure) in series])
        x = WIDTH * (place % 2)
        y = (high + 20) * (place // 2)
        parts.append(f'<text x="{x + 58}" y="{y + 14}">{figure}</text>')
        inner = f'<svg x="{x}" y="{y + 20}" width="{WIDTH}" height="{high}" '
        parts.append(inner + svg(plot, f"each arm beside {reference}").removeprefix("<svg "))
    return "".join([*parts, "</svg>"])


def _plot(figure: str, series: Sequence[Mapping[str, Any]]) -> Plot:
    xs = tuple(sorted({step for one in series for step in one["steps"]}))
    return Plot(title=figure, unit="", x_label="step", xs=xs, lines=tuple(_line(one, xs) for one in series))


def _line(one: Mapping[str, Any], xs: Sequence[float]) -> Line:
    def over(values: Sequence[float]) -> tuple[float, ...]:
        at = dict(zip(one["steps"], values, strict=True))
        return tuple(at.get(x, float("nan")) for x in xs)

    band = {"low": over(one["low"]), "high": over(one["high"])} if one["seeds"] > 1 else {}
    return Line(name=one["arm"], ys=over(one["mean"]), **band)


def told(document: Mapping[str, Any]) -> Iterator[str]:
    """What was found, for a terminal."""
    for claim in claims.found(exact(document)):
        yield f"{claim.outcome:<15} {claim.says}: {claim.numbers}"


def main() -> int:
    """Make the page of a document; without one, say how."""
    if len(sys.argv) != 2:
        print(__doc__)
        return 0
    document = json.loads(Path(sys.argv[1]).read_text())
    write(document, in_tree(document["form"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
