"""What the processor's arithmetic allows of a step, beside what its stages take.

Counted are the products with the weights alone, of the tokens that were drawn, at 2 floating-point operations
for a weight and a token: one pass to draw them, three (one forward, two backward) to train on them. What the
prompts and attention need comes on top, so that a stage cannot take less than the least told here.
"""

import statistics
import time

WEIGHTS = 134_515_008
"""Of SmolLM2-135M; its embedding is its head, so that each is in one product."""
PASSES = {"sample_s": 1, "train_s": 3, "sync_s": 0, "canary_s": 0}
"""Through the weights, of each drawn token, by the figure of a stage."""


def flops_per_s(size=2048, rounds=5):
    """The most that fp32 products of square matrices reached, with all threads."""
    import torch

    left = torch.randn(size, size)
    right = torch.randn(size, size)
    spent = []
    for _ in range(rounds):
        began = time.perf_counter()
        torch.mm(left, right)
        spent.append(time.perf_counter() - began)
    return 2 * size**3 / min(spent)


def stages(rows, peak):
    """Of each stage of a step: median seconds, share of the step, and the least that arithmetic allows.

    Args:
        rows: figures of steps.
        peak: floating-point operations a second.
    """
    step = statistics.median(row["step_s"] for row in rows)
    tokens = statistics.median(row["n_tokens"] for row in rows)
    found = {}
    for name, passes in PASSES.items():
        seconds = statistics.median(row[name] for row in rows)
        least = passes * 2 * WEIGHTS * tokens / peak
        found[name] = {"seconds": seconds, "share": seconds / step, "least_s": least}
    rest = step - sum(stage["seconds"] for stage in found.values())
    return found | {"other": {"seconds": rest, "share": rest / step, "least_s": 0.0}}
