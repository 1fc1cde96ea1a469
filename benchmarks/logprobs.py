"""The token log-probability function against the naive full-logits one.

Forward and backward, fp32 head, T = 4096.

    python benchmarks/logprobs.py [--json] [--repeats 3]

Time: both in one process, in turn, after a warm-up of each; the ratio is taken pair by pair. Memory: each in
a process of its own; the kernel's high-water mark of resident memory is reset once weights and inputs are in
place and touched, and what the mark rises above that is the figure. It includes the gradients, which both
must hold.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from lockstep.policy.logprobs import token_logprobs, token_logprobs_reference

T = 4096
SIZES = ((49152, 576), (151936, 896))
TEMPERATURE = 0.7
TARGET_TIME = 1.25
TARGET_MEMORY = 1 / 6
NAIVE_COPIES = 4
"""[T, V] tensors that the naive version holds at its peak, for the check that it fits at all."""


def ours(hidden, head, targets):
    """Forward of the chunked version."""
    return token_logprobs(hidden, head, targets, temperature=TEMPERATURE).logprobs


def naive(hidden, head, targets):
    """Forward of the full-logits version."""
    return token_logprobs_reference(hidden, head, targets, temperature=TEMPERATURE)


def inputs(vocabulary, width):
    """Hidden states, head and targets that want gradients."""
    torch.manual_seed(0)
    hidden = torch.randn(T, width, requires_grad=True)
    head = (torch.randn(vocabulary, width) * 0.05).requires_grad_()
    return hidden, head, torch.randint(0, vocabulary, (T,))


def once(function, data):
    """Seconds of one forward and backward."""
    for tensor in data[:2]:
        tensor.grad = None
    began = time.perf_counter()
    function(*data).sum().backward()
    return time.perf_counter() - began


def peak_bytes(name, vocabulary, width):
    """What the high-water mark rises above weights and inputs, measured in a fresh process."""
    command = [sys.executable, __file__, "--peak", name, str(vocabulary), str(width)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_peak(name, vocabulary, width):
    """The body of that process."""
    data = inputs(vocabulary, width)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmHWM")
    once({"ours": ours, "naive": naive}[name], data)
    print(status("VmHWM") - before)


def status(key):
    """A field of /proc/self/status, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(vocabulary, width, repeats):
    """Times, peaks and ratios of one size."""
    result = {"T": T, "V": vocabulary, "D": width, "ours_peak_bytes": peak_bytes("ours", vocabulary, width)}
    needed = NAIVE_COPIES * T * vocabulary * 4
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        return result | {"naive": f"does not fit: about {needed / 1e9:.0f} GB of {free / 1e9:.0f} GB free"}
    result["naive_peak_bytes"] = peak_bytes("naive", vocabulary, width)
    data = inputs(vocabulary, width)
    once(ours, data), once(naive, data)
    pairs = [(once(ours, data), once(naive, data)) for _ in range(repeats)]
    ratios = [a / b for a, b in pairs]
    return result | {
        "ours_s": statistics.median(a for a, _ in pairs),
        "naive_s": statistics.median(b for _, b in pairs),
        "time_ratio": statistics.median(ratios),
        "time_ratio_range": [min(ratios), max(ratios)],
        "memory_ratio": result["ours_peak_bytes"] / result["naive_peak_bytes"],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        measure_peak(args.peak[0], int(args.peak[1]), int(args.peak[2]))
        return
    cores = len(os.sched_getaffinity(0))
    machine = (
        f"{platform.machine()}, {cores} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    results = [measure(*size, args.repeats) for size in SIZES]
    if args.json:
        print(
            json.dumps(
                {"schema": "lockstep.benchmark.logprobs/1", "machine": machine, "results": results}, indent=1
            )
        )
        return
    print(machine)
    for r in results:
        print(
            f"T={r['T']} V={r['V']} D={r['D']}: "
            f"peak above weights and inputs {r['ours_peak_bytes'] / 1e6:.0f} MB",
            end="",
        )
        if "naive" in r:
            print(f"; naive {r['naive']}")
            continue
        print(
            f" against {r['naive_peak_bytes'] / 1e6:.0f} MB, "
            f"ratio {r['memory_ratio']:.3f} (target ≤ {TARGET_MEMORY:.3f})"
        )
        low, high = r["time_ratio_range"]
        print(
            f"  {r['ours_s']:.2f} s against {r['naive_s']:.2f} s, ratio {r['time_ratio']:.2f} "
            f"({low:.2f}–{high:.2f}; target ≤ {TARGET_TIME})"
        )


if __name__ == "__main__":
    main()
