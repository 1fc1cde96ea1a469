"""The ladder on a real engine: silent when clean; each planted fault is found in its layer, by its cause."""

from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from transformers import FalconH1Config, LlamaConfig

from lockstep.config.recipe import load_recipe, with_sets
from lockstep.deep import factors
from lockstep.errors import RewardError, RunError, WeightSyncError
from lockstep.faults.at_load import AtLoad
from lockstep.faults.campaign import planted
from lockstep.faults.catalogue import FAULTS
from lockstep.faults.fault import Fault
from lockstep.faults.proxies import Withheld, edits, numbers_of, with_numbers
from lockstep.loop.open import open_engine, open_session
from lockstep.parity import certificate, ladder
from lockstep.parity.canary import Canary
from lockstep.parity.evidence import gather
from lockstep.parity.ladder import climb
from lockstep.parity.layers import numerics as layer4_numerics
from lockstep.parity.pair import draw
from lockstep.parity.probes import probe_prompts
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import Verdict
from lockstep.runs.certificate import read_certificate
from lockstep.runs.record import open_recorder
from tests.e2e.conftest import QUICKSTART, SMALL, tiny_checkpoint

P999_NATS = 1e-3
"""What the ladder promises for fp32."""


def sampling(pair, **changes):
    pair.recipe = replace(pair.recipe, sampling=replace(pair.recipe.sampling, **changes))


def test_a_clean_pair_passes_all_five_layers(pair, tmp_path):
    sampling(pair, temperature=0.7)
    result = climb(pair)
    assert [v.status for v in result.verdicts] == ["PASS"] * 5, [v.summary for v in result.verdicts]
    assert result.verdicts[0].figures["identified"] == "tempered"
    numerics = result.verdicts[3].figures
    assert 0 < numerics["gap_abs_p999_nats"] <= P999_NATS
    assert numerics["phantom_clip_fraction"] == 0.0
    assert result.verdicts[4].figures["policy_ratio_mean"] == 1.0
    path = tmp_path / "certificate.json"
    issued = certificate.issue(pair, result.verdicts, path)
    assert read_certificate(path) == issued
    path.write_bytes(path.read_bytes().replace(b'"PASS"', b'"FAIL"', 1))
    with pytest.raises(RunError, match="digest"):
        read_certificate(path)


REAL = (
    "corrupted_completions",
    "stale_head",
)
"""What a tiny model in this process cannot show (``tests/faults`` plants the rest); ``make faults`` plants
all, here too. That a tensor is named on the real engine is shown on a hybrid model below."""


@pytest.mark.parametrize("name", REAL)
def test_a_planted_fault_is_named_in_its_layer(pair, name):
    fault = FAULTS[name]
    pair.recipe = with_sets(pair.recipe, [s for s in fault.sets if not s.startswith("engine.")])
    with planted(pair, fault):
        result = climb(pair)
    assert result.failed is not None
    assert (result.failed.layer, result.failed.findings[0].cause) == (fault.layer, fault.cause)
    before = [v.status for v in result.verdicts[: result.verdicts.index(result.failed)]]
    assert before == ["PASS"] * len(before)
    assert all(v.status == "NOT_RUN" for v in result.verdicts[len(before) + 1 :])
    low, high = result.failed.findings[0].ci95
    assert 0 <= low <= result.failed.findings[0].effect_nats <= high
    assert high > 0


def test_a_starved_cache_really_preempts_changes_no_number_and_fails_where_it_does(pair, monkeypatch):
    monkeypatch.setattr(factors, "PROMPTS", 8)
    starve = [factor for factor in pair.engine.facts.factors if factor.cause == "preemption"]
    monkeypatch.setattr(pair.engine, "facts", replace(pair.engine.facts, factors=starve))
    path = Verdict(layer="path", status="PASS", summary="clean", n_tokens=1)
    with ExitStack() as stack:
        starved = []

        def kept(*args):
            starved.append(stack.enter_context(open_engine(*args)))
            return nullcontext(starved[0])

        verdict = factors.deepen(pair, path, kept)
        # A preempted request that goes on over half a cache: its later numbers are off.
        broken = edits(edit_completions=tail_off)(SimpleNamespace(engine=starved[0]))
        failed = factors.deepen(pair, path, lambda *args: nullcontext(broken))
    assert (verdict.status, verdict.figures["factors_not_run"]) == ("PASS", [])
    assert verdict.figures["num_preemptions"] > 0
    # 0 where an engine has one core, hence one order of sums.
    assert verdict.figures["preemption_abs_max_nats"] <= P999_NATS
    assert (failed.status, [found.cause for found in failed.findings]) == ("FAIL", ["preemption"])
    assert failed.figures["preemption_abs_max_nats"] == pytest.approx(1.0, abs=P999_NATS)


def tail_off(self, completions):
    numbers = [numbers_of(completion).copy() for completion in completions]
    for row in numbers[::2]:
        row[len(row) // 2 :] -= 1.0
    return [with_numbers(completion, row) for completion, row in zip(completions, numbers, strict=True)]


def test_a_hybrid_models_recurrent_part_is_judged_too(installed, tmp_path):
    path = tiny_hybrid(installed[1], tmp_path / "hybrid")
    recipe = load_recipe(QUICKSTART, [*SMALL, f"model.path={path}"])
    lost = Fault(
        "recurrent",
        "stale_tensors",
        "",
        proxy=lambda pair: Withheld(pair, lambda name: "layers.1.mamba.in_proj" in name),
    )
    with open_session(recipe, tmp_path / "engine.log", print) as session:
        clean = climb(session.pair)
        assert clean.passed, [v.summary for v in clean.verdicts]
        with planted(session.pair, lost):
            failed = climb(session.pair).failed
    assert failed is not None
    assert (failed.layer, failed.findings[0].cause) == ("weights", "stale_tensors")
    assert "model.layers.1.mamba.in_proj.weight" in failed.summary


def tiny_hybrid(tokenizer, path):
    """Attention and Mamba2 side by side, with random weights.

    In fp32; vLLM 0.32.0 runs few such models on a CPU.
    """
    config = FalconH1Config(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mamba_d_ssm=128,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_n_groups=1,
        mamba_d_state=32,
        initializer_range=0.1,
    )
    return tiny_checkpoint(config, tokenizer, path)


def test_a_sync_that_is_not_delivered_stops_training_and_is_named(pair, tmp_path):
    from lockstep.loop.open import Session
    from lockstep.loop.run import Run
    from lockstep.loop.stages import sync
    from lockstep.runs.layout import new_run

    layout = new_run(tmp_path / "run")
    run = Run(Session(pair, None, Path()), layout, print, open_recorder(layout))
    sample = draw(pair, probe_prompts(pair, 4, pair.seed), SamplingParams(max_tokens=8), pair.seed)
    run.canary = Canary.of(sample, pair.recipe.parity.canary_tokens)
    run.canary.clean_gap_nats = run.canary.measure(pair).gap_abs_mean_nats
    saved = {p: p.detach().clone() for p in pair.trainer._policy.model.parameters()}
    try:
        with torch.no_grad():
            for parameter in saved:
                parameter.add_(torch.randn_like(parameter) * 1e-3)
        assert sync(run, 1)["canary_gap_abs_max_nats"] < P999_NATS
        with torch.no_grad():
            for parameter in saved:
                parameter.add_(torch.randn_like(parameter) * 1e-3)
        pair.engine = AtLoad(pair.engine, ("stale_head",))
        with pytest.raises(WeightSyncError, match="stale head"):
            sync(run, 2)
    finally:
        with torch.no_grad():
            for parameter, value in saved.items():
                parameter.copy_(value)


def test_the_engine_keeps_no_view_of_the_published_memory(pair):
    probe = [np.arange(100, 140, dtype=np.int32)]
    (before,) = pair.engine.score(probe)
    with torch.no_grad():
        saved = pair.trainer._policy.head.detach().clone()
        pair.trainer._policy.head.mul_(3.0)
    (after,) = pair.engine.score(probe)
    with torch.no_grad():
        pair.trainer._policy.head.copy_(saved)
    np.testing.assert_array_equal(before, after)


def test_completions_come_back_to_their_own_prompt(pair):
    prompts = [np.array([1000 + row, 7, 7], np.int32) for row in range(40)]
    found = draw(pair, prompts, SamplingParams(max_tokens=3), seed=5)
    trainer = np.concatenate(pair.trainer.score(found.groups, 1.0))
    assert np.abs(trainer - found.engine_logprobs).max() < P999_NATS
    assert found.lengths.tolist() == [3] * len(found)


def test_a_reward_that_fails_shows_the_sample_and_keeps_the_rollouts(pair, tmp_path):
    from lockstep.loop.open import Session
    from lockstep.loop.run import Run
    from lockstep.loop.stages import reward, sample
    from lockstep.runs.layout import new_run
    from lockstep.runs.rollouts import read_table

    layout = new_run(tmp_path / "run")
    run = Run(Session(pair, None, Path()), layout, print, open_recorder(layout))
    judge = pair.task._judge
    original = judge._reward
    drawn = None
    for broken, needle in (
        (lambda text, item: 1 / 0, "ZeroDivisionError"),
        (lambda text, item: float("nan"), "nan"),
    ):
        judge._reward = broken
        try:
            with pytest.raises(RewardError, match=needle) as raised:
                reward(run, 0, sample(run, 0))
        finally:
            judge._reward = original
        assert "completion" in raised.value.hint
        assert raised.value.exit_code == 2
        rows = read_table(layout.drawn(0))[0].to_pylist()
        assert len(rows) == 16
        # The second start takes what the first drew.
        assert drawn in (None, [row["token_ids"] for row in rows])
        drawn = [row["token_ids"] for row in rows]
        assert not layout.rollouts(0).exists()


def test_weights_are_read_from_the_runs_own_directory_only(pair, tmp_path):
    from lockstep.errors import UsageError
    from lockstep.records.versions import WeightUpdate

    stray = tmp_path / "weights.safetensors"
    stray.write_bytes(b"")
    with pytest.raises(UsageError, match=r"a \.safetensors file in"):
        pair.engine.load(WeightUpdate(5, str(stray)))


def test_the_resolved_configuration_is_read_back(session):
    resolved = session.manifest.engine.resolved
    assert resolved["worker.logprobs_mode"] == "processed_logprobs"
    assert resolved["worker.parameter_dtype"] == "torch.float32"
    assert resolved["worker.plugin_active"] is True
    assert resolved["model_config.generation_config"] == "vllm"
    assert msgspec.json.encode(session.manifest)


@pytest.fixture(scope="module")
def half(installed, tmp_path_factory):
    """A bf16 engine beside an fp32 trainer: of few layers, for a CPU without instructions for bf16 is slow.

    ``make faults`` holds clean bf16 pairs of the real model.
    """
    from lockstep.loop.open import open_session

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=3,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    root = tmp_path_factory.mktemp("half")
    model = tiny_checkpoint(config, installed[1], root / "model")
    recipe = load_recipe(
        QUICKSTART, [*SMALL, f"model.path={model}", "engine.dtype=bfloat16", "parity.direction_sequences=16"]
    )
    with open_session(recipe, root / "engine.log", print) as opened:
        yield opened.pair


def test_bf16_against_fp32_is_judged_by_the_clip_range(half, monkeypatch):
    taken = []  # for both verdicts: such an engine samples slowly
    monkeypatch.setattr(ladder, "gather", lambda pair: taken.append(gather(pair)) or taken[0])
    wide = climb(half)
    assert wide.passed, [v.summary for v in wide.verdicts]
    assert "the clip range bears it" in wide.verdicts[3].summary
    half.recipe = with_sets(half.recipe, ["objective.clip_low=3e-4", "objective.clip_high=4e-4"])
    failed = layer4_numerics.judge(half, taken[0], wide.verdicts[1])
    assert (failed.status, failed.findings[0].cause) == ("FAIL", "body_precision")
    assert failed.figures["phantom_clip_fraction"] > 0.5
    assert "would clip" in failed.findings[0].evidence
