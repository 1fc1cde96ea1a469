"""Ten million tokens of rollouts: how long counting them for the report takes, and how much memory.

    python benchmarks/report_reading.py [TOKENS]

The files are written first; what is timed is a fresh process that reads them, its imports included.
Processor time stands beside wall time: on a busy machine that is the measure.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

TOKENS, STEPS, LENGTH = 10_000_000, 25, 400
WALL_S, GIB = 5.0, 1.5

READ = """
import json, resource, sys, time
began = time.perf_counter()
from pathlib import Path
from lockstep.report.rollouts import gap_section, rollouts_section
from lockstep.report.tokens import read_gaps
paths = sorted(Path(sys.argv[1]).glob("step-*.parquet"))
gaps = read_gaps(paths)
gap_section(gaps, ""), rollouts_section(gaps, Path("none"), "")
used = resource.getrusage(resource.RUSAGE_SELF)
told = {"tokens": gaps.tokens, "wall_s": time.perf_counter() - began, "cpu_s": used.ru_utime + used.ru_stime}
print(json.dumps(told | {"peak_gib": used.ru_maxrss / 2**20}))
"""


def write(directory: Path, tokens: int) -> None:
    """A run's rollouts, ``STEPS`` files of equal size, through the recorder's own writer."""
    import numpy as np
    import pyarrow as pa

    from lockstep.runs.rollouts import About, write_rollouts

    random = np.random.default_rng(0)
    rows = tokens // STEPS // LENGTH
    size = rows * LENGTH
    offsets = pa.array(np.arange(0, size + 1, LENGTH, dtype=np.int32))

    def lists(values) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    for step in range(STEPS):
        engine = -random.exponential(1.0, size).astype(np.float32)
        trainer = engine + (1e-5 * random.standard_normal(size)).astype(np.float32)
        spans = [[{"start": 0, "stop": LENGTH, "version": step}]] * rows
        whole = {name: np.arange(rows, dtype=np.int64) for name in ("item", "group", "sample")}
        values = whole | {
            "step": np.full(rows, step, np.int64),
            "prompt_ids": [[1, 2]] * rows,
            "prompt_tokens": np.full(rows, 2, np.int64),
            "token_ids": lists(random.integers(0, 50_000, size).astype(np.int32)),
            "loss_mask": lists(np.ones(size, np.bool_)),
            "engine_logprobs": lists(engine),
            "missing_logprobs": np.zeros(rows, np.int64),
            "sampling_logprobs": lists(trainer),
            "weight_version": np.full(rows, step, np.int64),
            "version_spans": spans,
            "finish_reason": ["stop"] * rows,
            "text": ["a completion"] * rows,
            "reward": np.zeros(rows),
            "advantages": lists(np.zeros(size, np.float32)),
        }
        fields = {name: _typed(name, value) for name, value in values.items()}
        write_rollouts(directory / f"step-{step:06d}.parquet", fields, About(step=step, group_size=1))


def _typed(name: str, value):
    import pyarrow as pa

    from lockstep.runs.rollouts import columns

    return value.cast(columns().field(name).type) if isinstance(value, pa.Array) else value


def main() -> int:
    """Exit code 1 where a target is missed."""
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else TOKENS
    with tempfile.TemporaryDirectory(prefix="lockstep-report-") as scratch:
        write(Path(scratch), tokens)
        done = subprocess.run(
            [sys.executable, "-c", READ, scratch], capture_output=True, text=True, check=True
        )
    told = json.loads(done.stdout)
    print(
        f"{told['tokens']:,} tokens: {told['wall_s']:.1f} s, {told['cpu_s']:.1f} s of processor "
        f"(target {WALL_S:g}), {told['peak_gib']:.2f} GiB (target {GIB:g})"
    )
    return int(min(told["wall_s"], told["cpu_s"]) > WALL_S or told["peak_gib"] > GIB)


if __name__ == "__main__":
    sys.exit(main())
