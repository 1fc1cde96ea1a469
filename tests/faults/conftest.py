"""A whole pair without a download: the tiny model behind the transformers engine; a tokenizer of 97 words."""

import json

import msgspec
import pytest
from msgspec.structs import replace

from lockstep.records.tokens import SamplingParams

NEUTRAL = {
    "model": {"path": "m"},
    "task": {"name": "t"},
    "sampling": {"max_tokens": 1},
    "training": {"steps": 1},
}
SHARP = SamplingParams(max_tokens=16, temperature=0.25)
"""The tiny model's logits are nearly flat."""
T = "sampling.temperature=0.25"


@pytest.fixture(scope="session")
def recipe(tiny_checkpoint):
    from lockstep.config.recipe import parse_recipe

    return parse_recipe(
        {
            "model": {"path": str(tiny_checkpoint)},
            "engine": {"name": "transformers", "max_model_len": 128},
            "task": {
                "name": "reasoning_gym:basic_arithmetic",
                "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            },
            "sampling": {"max_tokens": 5},
            "training": {"steps": 1},
            "parity": {"probe_prompts": 8, "probe_tokens": 16, "draw_tokens": 512, "draws_see": 1.0},
        },
        "tests/faults",
    )


@pytest.fixture(scope="session")
def session(recipe, tmp_path_factory):
    from lockstep.loop.open import open_session

    with open_session(recipe, tmp_path_factory.mktemp("run") / "engine.log", print) as opened:
        yield opened


@pytest.fixture
def pair(session, recipe):
    """The session's pair with the plain recipe, and with it again afterwards."""
    session.pair.recipe = replace(recipe)
    yield session.pair
    session.pair.recipe = recipe


@pytest.fixture(scope="session")
def log(session, recipe):
    """``log(sampling)``: rows as a framework logs them, drawn once for each setting."""
    known = {}

    from lockstep.config.recipe import with_sets
    from lockstep.parity.pair import draw
    from lockstep.parity.probes import probe_prompts

    def rows(sampling=SHARP, n=12):
        key = msgspec.json.encode((sampling, n))
        if key not in known:
            session.pair.recipe = with_sets(recipe, [f"parity.probe_tokens={sampling.max_tokens}"])
            sample = draw(session.pair, probe_prompts(session.pair, n, 0), sampling, 0)
            known[key] = [
                {
                    "prompt_ids": s.prompt_ids.tolist(),
                    "completion_ids": s.token_ids.tolist(),
                    "logprobs": s.engine_logprobs.tolist(),
                }
                for s in sample
            ]
        return json.loads(json.dumps(known[key]))

    return rows


def verdicts_of(tmp_path, pair, rows, *sets, **judged):
    from lockstep.config.recipe import parse_overrides
    from lockstep.logged.file import read_logged
    from lockstep.logged.judge import judge

    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows))
    recipe = parse_overrides(NEUTRAL, list(sets), "test")
    return judge(read_logged(path, recipe.sampling), pair.trainer, pair.renderer, recipe, **judged)


def named(verdicts):
    failed = [v for v in verdicts if v.status == "FAIL"]
    assert len(failed) == 1, [(v.layer, v.status, v.summary) for v in verdicts]
    assert failed[0].findings[0].fix
    return failed[0].layer, failed[0].findings[0].cause
