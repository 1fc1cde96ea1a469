"""Ablation on a known gap: effects and rest sum to the total; factors that act together are seen to."""

import pytest

from lockstep.config.recipe import parse_recipe, with_sets
from lockstep.diagnose.ablation import EVERY_ORDER, MeanGap, ablate, known_good, shapley
from lockstep.errors import UsageError

TABLE = {
    "model": {"path": "m"},
    "task": {"name": "t"},
    "sampling": {"max_tokens": 1},
    "training": {"steps": 1},
}


def measure(recipe):
    raw = recipe.engine.options.get("logprobs_mode") == "raw_logprobs"
    truncated = recipe.sampling.top_p < 1.0
    bf16 = recipe.engine.dtype == "bfloat16"
    gap = 0.3 * raw + 0.2 * truncated + 0.1 * (raw and truncated) + 0.04 * bf16 + 1e-5
    return MeanGap(gap, (0.0, 1.0))


def test_effects_and_rest_sum_to_the_total():
    sets = ["engine.options.logprobs_mode=raw_logprobs", "sampling.top_p=0.9", "engine.dtype=bfloat16"]
    recipe = with_sets(parse_recipe(TABLE, "test"), sets)
    said = []
    found = ablate(recipe, None, said.append, measure)
    assert found.total_nats == pytest.approx(0.64001)
    assert sum(f.effect_nats for f in found.factors) + found.unexplained_nats == pytest.approx(
        found.total_nats
    )
    assert found.unexplained_nats == pytest.approx(1e-5)
    effects = {f.name.partition("=")[0]: (f.effect_nats, f.alone_nats) for f in found.factors}
    assert effects["sampling.top_p"] == pytest.approx((0.25, 0.3)), "half of what both bring together"
    assert effects["engine.options.logprobs_mode"] == pytest.approx((0.35, 0.4))
    assert effects["engine.dtype"] == pytest.approx((0.04, 0.04))
    assert len(said) == len(set(said)), "nothing is measured twice"


def test_an_engine_version_is_the_last_factor():
    recipe = with_sets(parse_recipe(TABLE, "test"), ["engine.version=0.18.1"])
    found = ablate(
        recipe,
        "0.8.5",
        lambda text: None,
        lambda r: MeanGap(0.5 if r.engine.version == "0.18.1" else 0.0, (0.0, 0.0)),
    )
    assert [(f.name, f.effect_nats) for f in found.factors] == [("engine.version=0.18.1", 0.5)]
    assert found.factors[0].flag == "--set engine.version=0.8.5"


@pytest.mark.parametrize(
    ("engine", "spec", "says"),
    [
        ("vllm", "vllm==9.9.9", r"engine vllm==9\.9\.9: got no recipe for it, expected vllm=="),
        ("auto", "9.9.9", r"engine 9\.9\.9: got no recipe for it, expected vllm=="),
        ("transformers", "vllm==9.9.9", r"engine vllm==9\.9\.9: got no recipe for it, expected vllm=="),
        (
            "transformers",
            "vllm==0.32.0",
            "got it with engine.name = 'transformers'",
        ),
    ],
)
def test_a_version_that_does_not_exist_is_refused_before_anything_is_measured(engine, spec, says):
    recipe = with_sets(parse_recipe(TABLE, "test"), [f"engine.name={engine}"])
    with pytest.raises(UsageError, match=says) as refused:
        known_good(recipe, spec)
    assert refused.value.exit_code == 2


def test_where_nothing_differs_all_is_unexplained():
    constant = MeanGap(0.2, (0.1, 0.3))
    found = ablate(parse_recipe(TABLE, "test"), None, lambda text: None, lambda r: constant)
    assert found.factors == ()
    assert found.unexplained_nats == 0.2


def test_the_order_of_the_factors_moves_no_effect():
    gap = lambda mended: 1.0 - 0.5 * (0 in mended) - 0.2 * (1 in mended) + 0.1 * ({0, 1} <= mended)  # noqa: E731
    first = shapley(3, gap)
    turned = {0: 2, 1: 0, 2: 1}
    second = shapley(3, lambda mended: gap({at for at, place in turned.items() if place in mended}))
    assert first == pytest.approx([0.45, 0.15, 0.0])
    assert [second[turned[at]] for at in range(3)] == pytest.approx(first)


def test_errors_that_cancel_are_named_and_have_no_negative_effect():
    sets = ["engine.options.logprobs_mode=raw_logprobs", "sampling.top_p=0.9", "engine.dtype=bfloat16"]

    def cancelling(recipe):
        raw = 0.3 * (recipe.engine.options.get("logprobs_mode") == "raw_logprobs")
        truncated = -0.25 * (recipe.sampling.top_p < 1.0)
        return MeanGap(abs(raw + truncated) + 0.02 * (recipe.engine.dtype == "bfloat16"), (0.0, 1.0))

    found = ablate(with_sets(parse_recipe(TABLE, "test"), sets), None, lambda text: None, cancelling)
    effects = {f.name.partition("=")[0]: (f.effect_nats, f.alone_nats) for f in found.factors}
    assert effects["sampling.top_p"] == pytest.approx((0.0, -0.25)), "alone, mending it makes things worse"
    assert effects["engine.options.logprobs_mode"] == pytest.approx((0.05, -0.2))
    assert [(pair[0].partition("=")[0], pair[1].partition("=")[0]) for pair in found.cancel] == [
        ("sampling.top_p", "engine.options.logprobs_mode")
    ]
    assert found.cancel[0][2] == pytest.approx(0.5)
    assert sum(f.effect_nats for f in found.factors) + found.unexplained_nats == pytest.approx(
        found.total_nats
    )


def test_of_many_factors_one_order_is_measured():
    names = ["top_p=0.9", "top_k=9", "min_p=0.1", "repetition_penalty=1.2", "presence_penalty=0.1"]
    sets = [*(f"sampling.{name}" for name in names), "engine.options.logprobs_mode=raw_logprobs"]
    recipe = with_sets(parse_recipe(TABLE, "test"), sets)
    said = []
    found = ablate(recipe, None, said.append, measure)
    assert len(found.factors) > EVERY_ORDER
    assert not found.every_order
    assert len(said) <= 2 * len(found.factors) + 1
