"""What a recipe says of rollouts in flight: how many, how old, how they are drawn, and which are scored."""

from lockstep.loop.run import Run
from lockstep.records.samples import Samples
from lockstep.rollout.ledger import Bound
from lockstep.training.versions import Drawing


def bound_of(run: Run) -> Bound:
    """The recipe's, on the engine as it resolved."""
    recipe = run.recipe
    engine = run.pair.engine
    most = recipe.rollout.in_flight or int(engine.ready.resolved.get(engine.facts.side_by_side, 0))
    training = recipe.training
    every = (recipe.rollout.max_lag + 1) * training.prompts_per_step
    return Bound(
        max_lag=recipe.rollout.max_lag,
        groups_per_step=training.prompts_per_step,
        group_size=training.group_size,
        steps=training.steps,
        in_flight=max(1, most // training.group_size) if most else every,
        drops=recipe.rollout.stale == "drop",
    )


def drawing_of(run: Run) -> Drawing:
    """How the recipe's rollouts are drawn across updates, and which of them are scored."""
    recipe = run.recipe
    share = recipe.parity.audit_share if recipe.objective.old_logprobs == "engine" else 1.0
    return Drawing(recipe.rollout.update == "keep", share, (recipe.training.seed,))


def lengths_of(rollouts: Samples) -> dict[int, tuple[int, ...]]:
    """Group → tokens of each of its samples."""
    found: dict[int, tuple[int, ...]] = {}
    for sample in rollouts:
        found[sample.item] = (*found.get(sample.item, ()), len(sample.token_ids))
    return found
