"""An alarm: a figure of training left what is predicted of it."""

from msgspec import Struct


class Alarm(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sentence, and where its cause is to be looked for.

    Example::

        Alarm(step=3, name="mismatch", layer="semantics",
              sentence="engine and trainer are not the same policy: mismatch ESS 0.71, …")
    """

    step: int
    """The training step, from 0."""
    name: str
    layer: str
    """The layer of the ladder that is most likely broken; ``task`` where none is."""
    sentence: str
    override: str = ""
    """The run's :class:`Override` as text, where it trains although the ladder did not pass; else empty."""

    def __str__(self) -> str:
        return f"{self.name}, likely layer {self.layer}: {self.sentence}"


class Override(Struct, frozen=True, kw_only=True):
    """A run that trains although the ladder did not pass: ``parity.override``."""

    reason: str
    """The recipe's sentence."""
    layer: str
    """The layer that did not pass."""
    cause: str
    """What was found there, or why it could not be run."""

    def __str__(self) -> str:
        return f"OVERRIDDEN ({self.layer}: {self.cause}): {self.reason}"
