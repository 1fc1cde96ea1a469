"""Rollouts on disk: stored as they are drawn, before anything judges, scores or trains on them.

    sampled ─save─► drawn/step-k ─score, save─► drawn/step-k ─┬─admit──► step-k            trained on
                                                              └─refuse─► refused/step-k    never

The names are the state: what lies under the last name may be trained on again by a resume, and nothing else may.
"""

from itertools import count, pairwise
from pathlib import Path

import numpy as np

from lockstep.errors import RunError
from lockstep.records.tokens import FLOAT32, INT32, Completion
from lockstep.records.versions import VersionSpan
from lockstep.rollout.collect import Rollouts
from lockstep.runs.durable import make_directory, rename
from lockstep.runs.layout import RunLayout
from lockstep.runs.rollouts import About, read_table, write_rollouts


def save(path: Path, rollouts: Rollouts) -> None:
    """Write one row a completion, in place of what was there.

    Raises:
        RunError: when it cannot be written.
    """
    size = rollouts.group_size
    n = len(rollouts.completions)
    make_directory(path.parent)
    write_rollouts(
        path,
        {
            "step": [rollouts.step] * n,
            "item": [rollouts.items[i // size] for i in range(n)],
            "sample": [c.sample_index for c in rollouts.completions],
            "prompt_token_ids": [rollouts.prompts[i // size] for i in range(n)],
            "prompt_tokens": [c.prompt_tokens for c in rollouts.completions],
            "token_ids": [np.frombuffer(c.token_ids, INT32) for c in rollouts.completions],
            "engine_logprobs": [np.frombuffer(c.logprobs, FLOAT32) for c in rollouts.completions],
            "missing_logprobs": [c.missing for c in rollouts.completions],
            "weight_version": [c.version_spans[0].version if c.version_spans else -1 for c in rollouts.completions],
            "version_spans": [
                [{"start": span.start, "stop": span.stop, "version": span.version} for span in c.version_spans]
                for c in rollouts.completions
            ],
            "finish_reason": [c.finish_reason for c in rollouts.completions],
            "text": rollouts.texts,
            "reward": rollouts.rewards if len(rollouts.rewards) else np.full(n, np.nan),
            "advantage": rollouts.advantages if len(rollouts.advantages) else np.full(n, np.nan, np.float32),
        },
        About(step=rollouts.step, group_size=size, sample_s=rollouts.sample_s, reward_s=rollouts.reward_s),
    )


def load(path: Path, group_size: int) -> Rollouts:
    """Read what :func:`save` wrote, exactly.

    Raises:
        RunError: when the file is not whole, or of groups of another size.
    """
    table, about = read_table(path)
    n = table.num_rows
    if about.group_size != group_size or n % group_size:
        raise RunError(
            f"rollouts {path}",
            got=f"{n} samples in groups of {about.group_size}",
            expected=f"groups of {group_size}",
            hint="was training.group_size changed since? Start a new run",
        )
    rows = table.drop_columns(["prompt_token_ids", "token_ids", "engine_logprobs"]).to_pylist()
    ids, logprobs = _lists(table["token_ids"]), _lists(table["engine_logprobs"])
    completions = [
        Completion(
            prompt_index=i // group_size,
            sample_index=row["sample"],
            token_ids=ids[i].tobytes(),
            logprobs=logprobs[i].tobytes(),
            finish_reason=row["finish_reason"],
            version_spans=tuple(VersionSpan(**span) for span in row["version_spans"]),
            missing=row["missing_logprobs"],
            prompt_tokens=row["prompt_tokens"],
        )
        for i, row in enumerate(rows)
    ]
    return Rollouts(
        step=about.step,
        group_size=group_size,
        items=[row["item"] for row in rows[::group_size]],
        prompts=_lists(table["prompt_token_ids"])[::group_size],
        completions=completions,
        texts=[row["text"] for row in rows],
        rewards=table["reward"].to_numpy().copy(),
        advantages=table["advantage"].to_numpy().copy(),
        sample_s=about.sample_s,
        reward_s=about.reward_s,
    )


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
    """The gate refused what was drawn: it is never trained on, and kept beside earlier refusals. Returns where it lies.

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


def _lists(column) -> list[np.ndarray]:
    """A column of lists as one array a row."""
    joined = column.combine_chunks()
    offsets, values = joined.offsets.to_numpy(), joined.values.to_numpy(zero_copy_only=False)
    return [values[start:stop].copy() for start, stop in pairwise(offsets)]
