"""What the score test sees in bf16, how often it names it right, and how often it calls noise a fault.

A power study beside the quantile gates, on the tokens of a real engine in bf16 and a trainer in bf16:

    draw     the engine's tokens and numbers, its re-scores besides               one start of the engine
    slopes   ∂ log p_i / ∂θ_k of every token and direction (policy/pulls.py,      one backward pass over
             a copy of the sequence for each of its tokens)                       every token's prefix
    faults   the trainer's bf16 scores with each fault planted, three sizes each  one forward pass each
    study    sequences resampled, all directions tested, the best named           no model at all

A fault is planted on the trainer's side (``trainer.holding``): 1.05 there is 1 / 1.05 in the engine. The
slopes are those of the trainer that is right, as if the engine were wrong: the same to first order.
Repetitions take other sequences out of those that were drawn, without putting any back; two repetitions share
some. Every step keeps what it has under --work, and goes on there after a kill.

    python benchmarks/score_power.py [--work DIR] [--model made-qwen2] [--engine vllm]
        [--sequences 768] [--until study]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from score_power_evidence import TOKENS, drawn, evidence_of, planted, say, slopes
from score_power_faults import Planted, faults_of, made_qwen2

from lockstep.config.recipe import load_recipe
from lockstep.metrics.reduce import outside_clip
from lockstep.parity.evidence import within
from lockstep.parity.explain.numerics.direction import Direction
from lockstep.parity.explain.score_test import alike, score_test, statistic, token_weights
from lockstep.parity.own_noise import OwnNoise
from lockstep.parity.search_tolerances import SCORE_AGAIN_T
from lockstep.parity.tolerances import NOISE, PHANTOM_CLIP_FRACTION
from lockstep.policy.pretrained import resolve_model
from lockstep.runs.manifest import processor

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
BF16 = NOISE["torch.bfloat16"]
BUDGETS = {1024: 12, 4096: 12, 16384: 3}
"""Tokens → repetitions of each fault and size. A second look takes as many tokens again, where there are so
many."""
CLEAN = {1024: 200, 4096: 200, 16384: 40}
CLOSE = 0.5
"""Of |t|: farther from what noise reaches on the same sequences without a fault, no flips are thrown anew."""


def main() -> int:
    """Every step up to ``--until``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lockstep-score-power")
    parser.add_argument("--model", default="made-qwen2")
    parser.add_argument("--engine", choices=["vllm", "transformers"], default="vllm")
    parser.add_argument("--sequences", type=int, default=768)
    parser.add_argument("--until", choices=["draw", "slopes", "faults", "study"], default="study")
    flags = parser.parse_args()
    name = f"{flags.model}-{flags.engine}"
    work = flags.work / name
    work.mkdir(parents=True, exist_ok=True)
    model = made_qwen2(work / "model") if flags.model == "made-qwen2" else resolve_model(flags.model)
    sets = [f"model.path={model}", "model.dtype=bfloat16", f"parity.probe_tokens={TOKENS}"]
    if flags.engine == "transformers":  # whose kernels are the trainer's: the rounding is the trainer's alone
        sets.append("engine.dtype=float32")
    recipe = load_recipe(QUICKSTART, sets, flags.engine)
    steps = {
        "draw": lambda: drawn(recipe, work, flags.sequences),
        "slopes": lambda: slopes(recipe, model, work),
        "faults": lambda: planted(recipe, model, work),
        "study": lambda: print(json.dumps(study(work, name), indent=1)),
    }
    for name, step in steps.items():
        say(f"{name}")
        step()
        if name == flags.until:
            break
    return 0


@dataclass(frozen=True, eq=False)
class Known:
    """All that repetitions are taken from: T tokens of S sequences."""

    slopes: np.ndarray
    """float32 [K, T]."""
    directions: list[Direction]
    engine: np.ndarray
    clean: np.ndarray
    """The trainer's, bf16."""
    noise: OwnNoise
    n_sequences: int

    def rows(self, which: np.ndarray) -> np.ndarray:
        """The tokens of some sequences, int [T]."""
        return (which[:, None] * TOKENS + np.arange(TOKENS)).ravel()

    def pulls(self, trainer: np.ndarray, which: np.ndarray) -> np.ndarray:
        """N_s of every direction, float64 [K, S]."""
        rows = self.rows(which)
        weights = token_weights((self.engine - trainer)[rows].astype(np.float64), trainer[rows])
        moved = self.slopes[:, rows] * weights.astype(np.float32)
        return moved.reshape(len(self.slopes), which.size, TOKENS).sum(-1, dtype=np.float64)


@dataclass(frozen=True)
class Look:
    """What one repetition found."""

    seen: bool
    """Significant at first look."""
    proven: bool
    """And again on other sequences; as ``seen`` where there are none."""
    best: Direction
    alike: tuple[Direction, ...]
    gates: bool
    """The quantile gates refuse."""
    ratio: bool
    """The width beside own noise refuses."""


def look(known: Known, trainer: np.ndarray, which: np.ndarray, others: np.ndarray, critical: float) -> Look:
    """One repetition.

    Args:
        critical: what noise reaches on these sequences where no fault is planted; 0: not known.
    """
    pulls = known.pulls(trainer, which)
    t = np.abs(statistic(pulls))
    best = int(t.argmax())
    seen = bool(t[best] > critical)
    if critical == 0.0 or abs(t[best] - critical) < CLOSE:
        seen = score_test(pulls).significant
    proven = seen
    if seen and others.size:
        again = statistic(known.pulls(trainer, others)[best][None])[0] * np.sign(pulls[best].sum())
        proven = bool(again >= SCORE_AGAIN_T)
    rows = known.rows(which)
    gap = trainer[rows] - known.engine[rows]
    phantom = outside_clip(gap, 0.2, 0.2).mean() > PHANTOM_CLIP_FRACTION
    ratio = known.noise.ratio(gap, trainer[rows], np.repeat(np.arange(which.size), TOKENS))
    ties = tuple(known.directions[n] for n in alike(pulls, best)[1:]) if seen else ()
    gates = bool(not within(BF16, gap) or phantom)
    return Look(seen, proven, known.directions[best], ties, gates, ratio.exceeded)


def repetitions(known: Known, tokens: int, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sequences of each repetition, and as many others for a second look (none where too few are left)."""
    size = tokens // TOKENS
    for seed in range(n):
        order = np.random.default_rng(seed).permutation(known.n_sequences)
        others = order[size : 2 * size]
        yield order[:size], others if others.size == size else others[:0]


def study(work: Path, name: str) -> dict:
    """Detection, names and false alarms by budget, into ``evidence/score_power/NAME.json``."""
    recipe = load_recipe(QUICKSTART, [f"parity.probe_tokens={TOKENS}"])
    sample, rescored = evidence_of(recipe, work)
    clean = np.load(work / "clean.npz")
    directions = [
        Direction(f, tuple(t), p, o) for f, t, p, o in json.loads((work / "directions.json").read_text())
    ]
    parts = [np.load(path)["slopes"] for path in sorted(work.glob("slopes-*.npz"))]
    own = (sample.engine_logprobs - rescored) / np.sqrt(2.0)
    rounded = clean["bf16"] - clean["exact"]
    known = Known(
        slopes=np.concatenate(parts, axis=1),
        directions=directions,
        engine=sample.engine_logprobs,
        clean=clean["bf16"],
        noise=OwnNoise.measured(clean["exact"], [own, rounded], rounded),
        n_sequences=len(sample),
    )
    out = Path(__file__).parents[1] / "evidence" / "score_power" / f"{name}.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    found |= _described(known, name, rounded, own)
    found.setdefault("clean", {})
    found.setdefault("faults", {})
    criticals = {
        tokens: _clean(known, tokens, found["clean"])
        for tokens in BUDGETS
        if tokens <= known.engine.size  # of fewer that were drawn there is no such repetition
    }
    _write(out, found)
    for number, fault in enumerate(faults_of(None)):
        for size in fault.sizes:
            path = work / f"fault-{number:02d}-{size:g}.npz"
            told = f"{fault.name} {size:g}"
            if path.exists() and told not in found["faults"]:
                trainer = np.load(path)["scores"]
                found["faults"][told] = _fault(known, fault, trainer, criticals)
                _write(out, found)
                say(f"{told}: {found['faults'][told]}")
    return {"clean": found["clean"], "n_faults": len(found["faults"])}


def _write(out: Path, found: dict) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.rename(out)


def _described(known: Known, name: str, rounded: np.ndarray, own: np.ndarray) -> dict:
    gap = known.clean - known.engine
    owners = np.repeat(np.arange(known.n_sequences), TOKENS)
    return {
        "pair": name,
        "machine": processor(),
        "sequences": known.n_sequences,
        "tokens_each": TOKENS,
        "directions": len(known.directions),
        "gap_abs_p50_nats": float(np.median(np.abs(gap))),
        "gap_abs_p999_nats": float(np.quantile(np.abs(gap), 0.999)),
        "trainer_to_reference_abs_p50_nats": float(np.median(np.abs(rounded))),
        "engine_decode_to_prefill_abs_p50_nats": float(np.median(np.abs(own)) * np.sqrt(2.0)),
        "gap_in_own_noise": known.noise.ratio(gap, known.clean, owners).value,
    }


def _clean(known: Known, tokens: int, found: dict) -> dict[int, float]:
    """False alarms; returns what noise reaches on each repetition's sequences, by repetition."""
    looks = []
    criticals = {}
    wanted = CLEAN[tokens] if str(tokens) not in found else BUDGETS[tokens]
    for number, (which, others) in enumerate(repetitions(known, tokens, wanted)):
        if number < BUDGETS[tokens]:
            criticals[number] = score_test(known.pulls(known.clean, which)).critical
        looks.append(look(known, known.clean, which, others, 0.0))
    if str(tokens) not in found:
        found[str(tokens)] = {
            "n": len(looks),
            "seen": sum(one.seen for one in looks),
            "proven": sum(one.proven for one in looks),
            "gates": sum(one.gates for one in looks),
            "ratio": sum(one.ratio for one in looks),
            "called": sorted({one.best.describe() for one in looks if one.seen}),
        }
        say(f"clean, {tokens} tokens: {found[str(tokens)]}")
    return criticals


def _fault(known: Known, fault: Planted, trainer: np.ndarray, criticals: dict[int, dict[int, float]]) -> dict:
    moved = np.sqrt(np.square((trainer - known.clean).astype(np.float64)).mean())
    result: dict = {"moves_rms_nats": float(moved)}
    for tokens, reached in criticals.items():
        looks = [
            look(known, trainer, which, others, reached[number])
            for number, (which, others) in enumerate(repetitions(known, tokens, BUDGETS[tokens]))
        ]
        seen = [one for one in looks if one.seen]
        result[str(tokens)] = {
            "n": len(looks),
            "seen": len(seen),
            "proven": sum(one.proven for one in looks),
            "right": sum(fault.right(one.best) for one in seen),
            "in_group": sum(_in_group(fault, one) for one in seen),
            "gates": sum(one.gates for one in looks),
            "ratio": sum(one.ratio for one in looks),
            "told": _most([one.best.describe() for one in seen if not _in_group(fault, one)]),
        }
    return result


def _in_group(fault: Planted, one: Look) -> bool:
    return fault.right(one.best) or any(fault.right(way) for way in one.alike)


def _most(names: Sequence[str]) -> str:
    """The commonest wrong name."""
    return max(names, key=names.count, default="")


if __name__ == "__main__":
    sys.exit(main())
