"""docs/reference is what the code says."""

import subprocess
import sys
from pathlib import Path

from lockstep.parity.causes import CAUSES

ROOT = Path(__file__).parents[2]


def test_the_reference_is_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reference_has_all_that_the_catalog_says_of_a_figure():
    from lockstep.metrics.catalog import METRICS

    lines = (ROOT / "docs" / "reference" / "metrics.md").read_text().splitlines()
    rows = {line.split("`")[1]: line.replace("\\|", "|") for line in lines if line.startswith("| `")}
    for metric in METRICS:
        of = (metric.unit, metric.formula, metric.estimator, metric.reduction, metric.mask, metric.clipping)
        assert all(said in rows[metric.name] for said in (*of, metric.denominator, metric.nan_rule))


def test_the_reference_of_objectives_has_the_head_of_each_file():
    """With the keys that make GRPO's variants, and why a bound below 1 is no clip."""
    page = " ".join((ROOT / "docs" / "reference" / "objectives.md").read_text().split())
    assert 'Dr. GRPO advantage_scale = "none" aggregation = "seq-mean-token-sum-norm"' in page
    assert "A bound below 1 scales every gradient, also at ratio 1. TRL reads `epsilon_high`" in page
    assert "is no pair" in page


def test_every_cause_that_the_code_names_is_explained():
    import re

    named = set()
    for path in (ROOT / "src" / "lockstep").rglob("*.py"):
        named |= set(re.findall(r'(?:finding|Explanation|Explained)\((?:case,)?\s*"(\w+)"', path.read_text()))
    assert len(named) > 10
    assert named <= CAUSES.keys()


def test_every_fix_and_every_factor_that_an_engine_declares_is_of_a_cause():
    from lockstep.engines.openai_http import OpenAIHttpEngine
    from lockstep.engines.transformers import TransformersEngine
    from lockstep.engines.vllm.v0 import VllmV0
    from lockstep.engines.vllm.v1 import VllmV1

    for engine in (VllmV0, VllmV1, OpenAIHttpEngine, TransformersEngine):
        assert engine.facts.fixes.keys() <= CAUSES.keys()
        assert {CAUSES[factor.cause].layer for factor in engine.facts.factors} <= {"path"}
    assert len(VllmV1.facts.factors) == 3
