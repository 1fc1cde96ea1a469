"""The last step of an installation: the engine's own adapter samples from a tiny model and scores that."""

import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lockstep.engines.base import EngineSpec
from lockstep.engines.environments import tiny_model
from lockstep.engines.environments.locate import Environment
from lockstep.errors import InstallError
from lockstep.records.capabilities import Capability
from lockstep.records.tokens import FLOAT32, INT32, SamplingParams

PROMPTS = [np.arange(5, 5 + length, dtype=np.int32) for length in (3, 17)]
AGREEMENT_NATS = 1e-3
"""Two layers of fp32 arithmetic: decode and prefill differ by 1e-6; another distribution or row by 0.1."""


def drives(environment: Environment) -> bool:
    """True when there is an adapter for it."""
    from lockstep.engines.registry import ADAPTERS

    return (environment.name, environment.generation) in ADAPTERS


class Smoke(NamedTuple):
    """What came of a smoke test that passed."""

    said: str
    """One sentence."""
    capabilities: dict[str, Capability]
    """What the engine says it can do."""


def smoke_test(environment: Environment, log: Path) -> Smoke:
    """Sample at T = 1 and score the same tokens.

    Raises:
        InstallError: when a log-probability is missing, or sampling and scoring disagree.
        EngineError: when the engine does not start.
    """
    from lockstep.engines.registry import Choice, start

    with tempfile.TemporaryDirectory(prefix="lockstep-smoke-") as scratch:
        model = Path(scratch) / "model"
        subprocess.run([environment.python, tiny_model.__file__, model], check=True, capture_output=True)
        spec = EngineSpec(
            model_path=model,
            dtype="float32",
            head_dtype="float32",
            max_model_len=64,
            options={},
            weights_dir=Path(scratch),
            log_path=log,
        )
        engine = start(Choice(environment.name, environment, "smoke test"), spec)
        try:
            completions = engine.sample(
                PROMPTS, [SamplingParams(max_tokens=4, seed=row) for row in range(len(PROMPTS))]
            )
            ids = [np.frombuffer(completion.token_ids, INT32) for completion in completions]
            scores = engine.score([np.r_[prompt, tail] for prompt, tail in zip(PROMPTS, ids, strict=True)])
        finally:
            engine.close()
    sampled = np.concatenate([np.frombuffer(completion.logprobs, FLOAT32) for completion in completions])
    scored = np.concatenate([score[-len(tail) :] for score, tail in zip(scores, ids, strict=True)])
    largest = float(np.abs(sampled - scored).max())
    # Negated: a number that is missing makes a NaN, which is no agreement.
    if not largest <= AGREEMENT_NATS:
        raise InstallError(
            f"smoke test of {environment.name} {environment.version}",
            got=f"sampling and scoring differ by {largest:.1e} nats",
            expected=f"at most {AGREEMENT_NATS:g}",
            hint=f"the log is {log}",
        )
    said = f"{sampled.size} tokens sampled and scored alike to {largest:.0e} nats"
    return Smoke(said, engine.ready.capabilities)
