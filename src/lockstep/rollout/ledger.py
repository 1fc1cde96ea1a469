"""What a schedule knows, as records: what is in flight, what waits, and where each sample and token ended."""

import msgspec
from msgspec import Struct


class Bound(Struct, frozen=True, kw_only=True):
    """What a schedule holds to."""

    max_lag: int
    """Versions between drawing and training; 0 is synchronous."""
    groups_per_step: int
    group_size: int
    steps: int
    in_flight: int
    """Groups with the engines at once, at most."""
    drops: bool = False
    """Drop what is too old, in place of waiting for it."""


class Flight(Struct, frozen=True):
    """A group that an engine draws."""

    group: int
    born: int
    """The version that every engine had confirmed when it was admitted: none of its tokens is older."""
    attempt: int = 0
    """How often it was issued before."""


class Finished(Struct, frozen=True):
    """A group whose samples are all there."""

    group: int
    oldest: int
    """The version of its oldest token."""
    lengths: tuple[int, ...]
    """Tokens of each sample."""

    @property
    def tokens(self) -> int:
        """Tokens of all its samples."""
        return sum(self.lengths)


class Ledger(Struct):
    """Where every sample and every token ended; counts of samples, but where it says tokens."""

    issued: int = 0
    """Samples that were asked for, each once however often it was reissued."""
    trained: int = 0
    dropped: dict[str, int] = {}
    """Samples that were not trained on, by reason."""
    drawn_tokens: int = 0
    """Tokens that arrived from an engine."""
    trained_tokens: int = 0
    dropped_tokens: dict[str, int] = {}
    reissued: int = 0
    """Samples asked for again, because an engine or the trainer ended; what was drawn of them is not here."""
    kept_lengths: dict[int, int] = {}
    """Trained samples by length: the key is the smallest power of two that is no smaller."""
    dropped_lengths: dict[int, int] = {}


class State(Struct):
    """All that a schedule knows."""

    step: int = 0
    """The next step to be trained; the version of the weights that the trainer holds."""
    next_group: int = 0
    """The first that was never admitted."""
    confirmed: dict[str, int] = {}
    """The version that each engine serves, as far as it has confirmed."""
    in_flight: dict[int, Flight] = {}
    reissue: dict[int, int] = {}
    """Groups whose requests were lost, with the attempts so far."""
    finished: dict[int, Finished] = {}
    training: dict[int, Finished] = {}
    """The step's groups, while it is trained."""
    ended_below: int = 0
    """Every group below it has ended."""
    ended_beyond: set[int] = set()
    """Groups from there on that have ended."""
    ledger: Ledger = msgspec.field(default_factory=Ledger)
