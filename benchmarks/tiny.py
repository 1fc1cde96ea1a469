"""The tests' tiny model for benchmarks: no download, no engine's environment, some steps a second."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETS = [
    "task.examples=0",
    "task.reward=tests.faults.test_loop_in_flight:varied",
    "engine.max_model_len=160",
    "sampling.max_tokens=90",
    "training.prompts_per_step=2",
    "training.group_size=2",
    "optimizer.lr=1e-3",
]


def sets(scratch: Path) -> list[str]:
    """``--set`` overrides of the quick start, on the transformers engine; writes the model."""
    sys.path.insert(0, str(ROOT))
    import torch
    from tests.tiny_checkpoint import write_checkpoint, write_model

    torch.set_num_threads(1)
    model = write_checkpoint(write_model(scratch / "model"), scratch / "tiny")
    return [*SETS, f"model.path={model}"]
