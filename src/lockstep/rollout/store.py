"""Rollouts on disk: written before they are trained on, so that a killed run loses none and trains on none twice."""

from pathlib import Path

import numpy as np

from lockstep.records.tokens import FLOAT32, INT32, Completion
from lockstep.records.versions import VersionSpan
from lockstep.rollout.collect import Rollouts
from lockstep.runs.read import read_rollouts
from lockstep.runs.write import write_rollouts


def save(path: Path, rollouts: Rollouts) -> None:
    """Write one row a completion."""
    size = rollouts.group_size
    n = len(rollouts.completions)
    advantages = rollouts.advantages if len(rollouts.advantages) else np.full(n, np.nan, np.float32)
    write_rollouts(
        path,
        {
            "step": [rollouts.step] * n,
            "item": [rollouts.items[i // size] for i in range(n)],
            "sample": [c.sample_index for c in rollouts.completions],
            "prompt_token_ids": [rollouts.prompts[i // size] for i in range(n)],
            "token_ids": [np.frombuffer(c.token_ids, INT32) for c in rollouts.completions],
            "engine_logprobs": [np.frombuffer(c.logprobs, FLOAT32) for c in rollouts.completions],
            "missing_logprobs": [c.missing for c in rollouts.completions],
            "weight_version": [c.version_spans[0].version for c in rollouts.completions],
            "finish_reason": [c.finish_reason for c in rollouts.completions],
            "text": rollouts.texts,
            "reward": rollouts.rewards,
            "advantage": advantages,
        },
    )


def load(path: Path, group_size: int) -> Rollouts:
    """Read what :func:`save` wrote, exactly."""
    rows = read_rollouts(path)
    completions = [
        Completion(
            prompt_index=i // group_size,
            sample_index=row["sample"],
            token_ids=np.asarray(row["token_ids"], INT32).tobytes(),
            logprobs=np.asarray(row["engine_logprobs"], FLOAT32).tobytes(),
            finish_reason=row["finish_reason"],
            version_spans=(VersionSpan(0, len(row["token_ids"]), row["weight_version"]),),
            missing=row["missing_logprobs"],
        )
        for i, row in enumerate(rows)
    ]
    return Rollouts(
        step=rows[0]["step"],
        group_size=group_size,
        items=[row["item"] for row in rows[::group_size]],
        prompts=[np.asarray(row["prompt_token_ids"], np.int32) for row in rows[::group_size]],
        completions=completions,
        texts=[row["text"] for row in rows],
        rewards=np.array([row["reward"] for row in rows]),
        advantages=np.array([row["advantage"] for row in rows], np.float32),
    )
