"""The catalog of figures. A name that is not here cannot be written to a run.

Sign and words are fixed once: ``gap = trainer_logprob − engine_logprob``; the *mismatch ratio* is exp(gap) at
the weights that sampled, the *policy ratio* is what an optimizer step changed since. In formulas ℓ is the
log-probability of a sampled token, n how many there are. What other systems call them, and where their
formula is another: ``aliases.py``.
"""

from lockstep.metrics.metric import Metric
from lockstep.metrics.of_run import OF_RUN
from lockstep.metrics.of_task import OF_TASK
from lockstep.metrics.of_training import OF_TRAINING

METRICS: tuple[Metric, ...] = (*OF_TASK, *OF_RUN, *OF_TRAINING)
BY_NAME = {metric.name: metric for metric in METRICS}


def metric_named(name: str) -> Metric | None:
    """The metric of a figure; of a family's member, the family's: NAME stands for the member in its name."""
    family, _, rest = name.partition("/")
    return BY_NAME.get(name) or BY_NAME.get(f"{family}/NAME/{rest.partition('/')[2]}")
