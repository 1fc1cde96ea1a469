"""Rollouts on disk: stored as they are drawn, before anything judges, scores or trains on them.

    sampled ─save─► drawn/step-k ─rewards, save─► drawn/step-k
        ─the trainer's numbers, save─► drawn/step-k ─┬─admit──► step-k            trained on
                                                     └─refuse─► refused/step-k    never

The names are the state: what lies under the last name may be trained on again by a resume, nothing else.
"""

from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.config.recipe import Recipe
from lockstep.errors import RunError
from lockstep.records.samples import Sample, Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.versions import VersionSpan
from lockstep.runs.durable import make_directory, rename
from lockstep.runs.layout import RunLayout
from lockstep.runs.rollouts import About, damaged_rollouts, read_table, write_rollouts

if TYPE_CHECKING:
    import pyarrow

PER_TOKEN = ("prompt_ids", "token_ids", "loss_mask", "engine_logprobs", "sampling_logprobs", "advantages")
"""Columns that hold an array a row, under the names that :class:`Sample` has for them."""
ALIKE = ("group", "sample", "item", "finish_reason", "text", "prompt_tokens")
"""Columns that hold one value a row, under the names that :class:`Sample` has for them."""


def save(path: Path, rollouts: Samples) -> None:
    """Write one row a sample, in place of what was there.

    Raises:
        RunError: when it cannot be written.
    """
    assert rollouts.step is not None, "probes are not stored"
    make_directory(path.parent)
    columns: dict[str, Any] = {
        name: [getattr(sample, name) for sample in rollouts] for name in (*ALIKE, *PER_TOKEN)
    }
    columns |= {
        "step": [rollouts.step] * len(rollouts),
        "missing_logprobs": [sample.missing for sample in rollouts],
        "weight_version": [
            sample.version_spans[0].version if sample.version_spans else -1 for sample in rollouts
        ],
        "version_spans": [
            [
                {"start": span.start, "stop": span.stop, "version": span.version}
                for span in sample.version_spans
            ]
            for sample in rollouts
        ],
        "reward": rollouts.rewards,
    }
    about = About(
        step=rollouts.step,
        group_size=rollouts.group_size,
        sample_s=rollouts.sample_s,
        reward_s=rollouts.reward_s,
        left_out=rollouts.left_out,
        figures=rollouts.figures,
    )
    write_rollouts(path, columns, about)


def load(path: Path, group_size: int, sampling: SamplingParams) -> Samples:
    """Read what :func:`save` wrote, exactly.

    Args:
        sampling: what the run samples with.

    Raises:
        RunError: when the file is not whole, or of groups of another size.
    """
    table, about = read_table(path)
    if about.group_size != group_size or table.num_rows % group_size:
        raise RunError(
            f"rollouts {path}",
            got=f"{table.num_rows} samples in groups of {about.group_size}",
            expected=f"groups of {group_size}",
            hint="was training.group_size changed since? Start a new run",
        )
    columns: dict[str, list[Any]] = {name: _arrays(table[name]) for name in PER_TOKEN}
    columns |= {name: table[name].to_pylist() for name in (*ALIKE, "version_spans", "reward")}
    samples = []
    for row in range(table.num_rows):
        values = {name: column[row] for name, column in columns.items()}
        values["version_spans"] = tuple(VersionSpan(**span) for span in values["version_spans"])
        samples.append(Sample(**values))
    return Samples(
        samples,
        sampling,
        step=about.step,
        sample_s=about.sample_s,
        reward_s=about.reward_s,
        left_out=about.left_out,
        figures=about.figures,
    )


def load_step(path: Path, step: int, recipe: Recipe, vocabulary: int) -> Samples:
    """What a step drew, fit to be judged: the file may have been copied, edited, or be another run's.

    Args:
        vocabulary: token ids that the model has.

    Raises:
        RunError: names what cannot be.
    """
    rollouts = load(path, recipe.training.group_size, recipe.sampling)
    wanted = recipe.training.prompts_per_step * recipe.training.group_size
    if rollouts.step != step:
        raise damaged_rollouts(path, f"those of step {rollouts.step}")
    if len(rollouts) != wanted:
        raise damaged_rollouts(path, f"{len(rollouts)} samples of {wanted}")
    for row, sample in enumerate(rollouts):
        if fault := _fault(sample, step, vocabulary):
            raise damaged_rollouts(path, f"sample {row}: {fault}")
    return rollouts


def _fault(sample: Sample, step: int, vocabulary: int) -> str:
    """What no sample of a step can be; empty where nothing is."""
    n = len(sample.token_ids)
    for name in PER_TOKEN[1:]:
        values = getattr(sample, name)
        if values is not None and len(values) != n:
            return f"{len(values)} {name} for {n} tokens"
    if not n or not len(sample.prompt_ids):
        return "no token" if not n else "no prompt"
    ids = np.concatenate([sample.prompt_ids, sample.token_ids])
    if ids.min() < 0 or ids.max() >= vocabulary:
        return f"token id {ids.min() if ids.min() < 0 else ids.max()}, of {vocabulary}"
    spans = sample.version_spans
    ends = [0, *(span.stop for span in spans)]
    # Each begins where the one before it ended, none is empty, and the last ends with the tokens.
    tiled = [span.start for span in spans] == ends[:-1] and ends[-1] == n and sorted(set(ends)) == ends
    if not tiled or any(not 0 <= span.version <= step for span in spans):
        return f"{', '.join(map(str, spans)) or 'no version'} of {n} tokens"
    return ""


def admit(layout: RunLayout, step: int) -> Path:
    """The gate admitted what was drawn: it may be trained on from here on. Returns where it lies.

    Raises:
        RunError: when the step has admitted rollouts already: nothing is trained on twice.
    """
    target = layout.rollouts(step)
    if target.exists():
        raise RunError(
            f"rollouts {target}",
            got="rollouts that were admitted before",
            expected="none: each step is trained on once",
            hint=f"lockstep train --resume {layout.root}",
        )
    return move(layout.drawn(step), target)


def refuse(layout: RunLayout, step: int) -> Path:
    """The gate refused what was drawn; returns where it lies.

    It is never trained on, and kept beside earlier refusals.

    Raises:
        RunError: when it cannot be moved.
    """
    first = layout.refused(step)
    names = (first if number == 1 else first.with_suffix(f".{number}.parquet") for number in count(1))
    return move(layout.drawn(step), next(path for path in names if not path.exists()))


def move(source: Path, target: Path) -> Path:
    """Rename for good. Returns the target.

    Raises:
        RunError: when it cannot be done; the source is then still there.
    """
    make_directory(target.parent)
    rename(source, target)
    return target


def _arrays(column: "pyarrow.ChunkedArray") -> list[np.ndarray | None]:
    """A column of lists as one array a row; None where it is null."""
    joined = column.combine_chunks()
    offsets = joined.offsets.to_numpy()
    values = joined.values.to_numpy(zero_copy_only=False)
    known = joined.is_valid().to_numpy(zero_copy_only=False)
    spans = zip(pairwise(offsets), known, strict=True)
    return [values[start:stop].copy() if there else None for (start, stop), there in spans]
