"""Which group is drawn when, and trained when: admission, queue, staleness, ledger. No clock, thread or I/O.

               admit                 finish              take                 trained
    prompts ───────────► in flight ──────────► finished ───────► in training ─────────► trained
                 ▲          │   ▲ admit           │
    every engine │     lost │   │                 │ too old, where rollout.stale = "drop"
    confirmed v ─┘          ▼   │                 ▼
                        to reissue            dropped (reason)

A *group* is one prompt with its samples; groups are numbered in the order of the data, and a sample's id is
``group · group_size + its place``. What a group waits for, and what ends the wait:

    to be admitted     live groups < (v + max_lag + 1) · groups a step   every engine confirms a newer v
                       groups in flight < in_flight                      one finishes
    to be trained      a step is ready                                   enough groups of its deadline finish

With ``drops`` False no token is trained further than ``max_lag`` versions from the one that drew it, and no
step waits for ever: ``docs/concepts/in-flight.md`` has the proof. The state is one record, so that a
checkpoint holds it whole.
"""

from collections.abc import Iterable, Mapping

from lockstep.errors import ScheduleError
from lockstep.rollout.ledger import Bound, Finished, Flight, State

STALE = "stale"
"""Reason of a group that was dropped because it would have been trained past the bound."""


class Schedule:
    """The machine: each method is one event, or one question.

    Args:
        engines: their names; an admission waits for the slowest of them.
        state: of a run that goes on; what was in flight or in training then is issued or trained again.
    """

    def __init__(
        self, bound: Bound, engines: Iterable[str] = ("engine",), state: State | None = None
    ) -> None:
        self.bound = bound
        self.state = state or State(confirmed=dict.fromkeys(engines, 0))
        if state is not None:
            # The step was not in the checkpoint: its groups are whole, and it is trained again.
            self.state.finished |= self.state.training
            self.state.training = {}
            self.lost()

    # ── questions ───────────────────────────────────────────────────────────────────────────────────────────

    @property
    def version(self) -> int:
        """The newest version that every engine has confirmed."""
        return min(self.state.confirmed.values())

    @property
    def done(self) -> bool:
        """True when every step is trained."""
        return self.state.step == self.bound.steps

    @property
    def outstanding(self) -> int:
        """Groups that were admitted, and are neither in training nor ended."""
        state = self.state
        return len(state.in_flight) + len(state.reissue) + len(state.finished)

    @property
    def room(self) -> int:
        """How many groups may be admitted now."""
        free = self.bound.in_flight - len(self.state.in_flight)
        return max(0, min(free, len(self.state.reissue) + self._new()))

    def _new(self) -> int:
        """Groups that were never admitted and may be, as far as steps and staleness go."""
        bound = self.bound
        state = self.state
        live = state.step * bound.groups_per_step + len(state.training) + self.outstanding
        # Counted from the version that every engine serves, not from the trainer's: a group that is admitted
        # now may be drawn by the slowest of them.
        return max(0, min(bound.steps, self.version + bound.max_lag + 1) * bound.groups_per_step - live)

    def ready(self) -> bool:
        """True when a step's groups are there."""
        return not self.done and not self.state.training and not self._missing()

    def _missing(self) -> dict[int, int]:
        """Deadline → how many groups of it or an earlier one must still finish before the next step."""
        bound = self.bound
        state = self.state
        lacking = {}
        if len(self._fresh()) < bound.groups_per_step:
            # Any groups do, under a deadline behind all others.
            lacking[bound.steps + bound.max_lag] = bound.groups_per_step - len(self._fresh())
        if bound.drops:
            return lacking
        due = {flight.group: flight.born for flight in state.in_flight.values()}
        # They will be admitted under the version of now at the earliest, whatever they were born under.
        due |= dict.fromkeys(state.reissue, self.version)
        for ends in range(state.step, state.step + bound.max_lag):
            # Groups this old or older can be trained on in this step at the latest.
            oldest = ends - bound.max_lag
            there = sum(group.oldest <= oldest for group in state.finished.values())
            to_come = sum(born <= oldest for born in due.values())
            # So many of them the later steps up to their deadline can still take.
            needed = there + to_come - (ends - state.step) * bound.groups_per_step
            if there < needed:
                lacking[ends] = needed - there
        return lacking

    def _fresh(self) -> list[Finished]:
        """Finished groups that the next step may train on, those first that are due first."""
        oldest = self.state.step - self.bound.max_lag
        groups = [group for group in self.state.finished.values() if group.oldest >= oldest]
        # Earliest deadline first: the order under which, if any order does, all are in time.
        return sorted(groups, key=lambda group: (group.oldest, group.group))

    def waits_for(self) -> str:
        """What the next step waits for, for people; empty where it waits for nothing."""
        if self.done or self.ready():
            return ""
        state = self.state
        if state.training:
            return f"step {state.step + 1} is being trained"
        many = max(self._missing().values())
        behind = {name: v for name, v in state.confirmed.items() if v < state.step}
        late = ", ".join(f"{name} still confirms version {v}" for name, v in behind.items())
        places = f"{len(state.in_flight)} in flight, {len(state.reissue)} to reissue, {self.room} to admit"
        return f"step {state.step + 1} waits for {many} groups ({places}{late and f'; {late}'})"

    # ── events ──────────────────────────────────────────────────────────────────────────────────────────────

    def admit(self) -> Flight:
        """Issue the next group: one that was lost before one that never was.

        Raises:
            ScheduleError: when there is no :attr:`room`.
        """
        state = self.state
        if not self.room:
            raise _wrong("admission", f"a group beyond {self.outstanding} outstanding", "room for it")
        if state.reissue:
            # The lowest number is the oldest in the order of the data, and is waited for first.
            group = min(state.reissue)
            flight = Flight(group, self.version, state.reissue.pop(group) + 1)
            state.ledger.reissued += self.bound.group_size
        else:
            flight = Flight(state.next_group, self.version)
            state.next_group += 1
            state.ledger.issued += self.bound.group_size
        state.in_flight[flight.group] = flight
        return flight

    def finish(self, group: int, oldest: int, lengths: Iterable[int]) -> None:
        """All samples of a group have arrived.

        Args:
            oldest: the version of its oldest token, as the engine says.

        Raises:
            ScheduleError: for a group that is not in flight, of another size, or drawn by a version that no
                engine served any more when it was asked for.
        """
        flight = self.state.in_flight.get(group)
        if flight is None:
            raise _wrong(f"group {group}", "an answer", "none: it is not in flight")
        finished = Finished(group, oldest, tuple(lengths))
        if len(finished.lengths) != self.bound.group_size:
            raise _wrong(f"group {group}", f"{len(finished.lengths)} samples", str(self.bound.group_size))
        if oldest < flight.born:
            raise _wrong(
                f"group {group}",
                f"a token that version {oldest} drew",
                f"none older than version {flight.born}: every engine had confirmed it",
            )
        del self.state.in_flight[group]
        self.state.finished[group] = finished
        self.state.ledger.drawn_tokens += finished.tokens
        self._forget_stale()

    def take(self) -> tuple[Finished, ...]:
        """The next step's groups, in the order of the data; they are in training from here on.

        Raises:
            ScheduleError: when the step is not :meth:`ready`.
        """
        if not self.ready():
            raise _wrong(f"step {self.state.step}", self.waits_for() or "nothing to train", "a step's groups")
        chosen = sorted(self._fresh()[: self.bound.groups_per_step], key=lambda finished: finished.group)
        for finished in chosen:
            self.state.training[finished.group] = self.state.finished.pop(finished.group)
        return tuple(chosen)

    def trained(self, lengths: Mapping[int, tuple[int, ...]]) -> None:
        """The step is trained: the trainer holds the next version.

        Args:
            lengths: group → tokens of each sample, as they were trained on.

        Raises:
            ScheduleError: where that is not what was taken, or was drawn past the bound.
        """
        state = self.state
        taken = {group: finished.lengths for group, finished in state.training.items()}
        # Length by length: a completion that was cut or replaced between queue and loss is not what was
        # counted as drawn.
        if dict(lengths) != taken or not taken:
            raise _wrong(
                f"step {state.step}", f"groups {sorted(lengths)} trained", f"those taken: {sorted(taken)}"
            )
        for finished in state.training.values():
            self.refuse_stale(state.step, finished.oldest, f"group {finished.group}")
            self._end(finished.group)
            state.ledger.trained += self.bound.group_size
            state.ledger.trained_tokens += finished.tokens
            _count(state.ledger.kept_lengths, finished.lengths)
        state.training = {}
        state.step += 1
        self._forget_stale()

    def confirm(self, engine: str, version: int) -> None:
        """An engine serves ``version``, and that is proven.

        Raises:
            ScheduleError: for a version that the trainer has not made, or an older one than before.
        """
        before = self.state.confirmed.get(engine)
        made = self.state.step
        if before is None or not before <= version <= made:
            raise _wrong(f"engine {engine}", f"version {version} confirmed", f"{before} to {made}")
        self.state.confirmed[engine] = version

    def drop(self, group: int, reason: str) -> None:
        """End a finished group without training on it. Raises ScheduleError where it is not finished."""
        finished = self.state.finished.pop(group, None)
        if finished is None:
            raise _wrong(f"group {group}", f"dropped ({reason})", "a finished group")
        ledger = self.state.ledger
        self._end(group)
        ledger.dropped[reason] = ledger.dropped.get(reason, 0) + self.bound.group_size
        ledger.dropped_tokens[reason] = ledger.dropped_tokens.get(reason, 0) + finished.tokens
        _count(ledger.dropped_lengths, finished.lengths)

    def lost(self) -> None:
        """What is in flight will never be answered: it is issued again, before anything new."""
        state = self.state
        state.reissue |= {flight.group: flight.attempt for flight in state.in_flight.values()}
        state.in_flight = {}

    def replayed(self, lengths: Mapping[int, tuple[int, ...]]) -> None:
        """A run that goes on has trained a step again from its stored samples; see :meth:`trained`.

        Groups that were admitted after the checkpoint and before these are issued again.

        Raises:
            ScheduleError: when there are not as many as a step has, or one of them has ended.
        """
        state = self.state
        if len(lengths) != self.bound.groups_per_step:
            raise _wrong(
                f"step {state.step}", f"{len(lengths)} groups stored", str(self.bound.groups_per_step)
            )
        # Issued after the checkpoint: the schedule that is gone on with has never heard of them.
        while state.next_group <= max(lengths):
            state.reissue[state.next_group] = 0
            state.ledger.issued += self.bound.group_size
            state.next_group += 1
        for group, counts in lengths.items():
            known = state.finished.pop(group, None)
            if known is None:
                if group not in state.reissue:
                    raise _wrong(f"group {group}", "trained again", "a group that has not ended")
                del state.reissue[group]
                state.ledger.drawn_tokens += sum(counts)
            # What it was drawn by was judged when it was first trained.
            state.training[group] = Finished(group, state.step, counts)
        self.trained(lengths)
        # Before anything is drawn again, every engine is sent the weights that the trainer has come to.
        state.confirmed = dict.fromkeys(state.confirmed, state.step)

    # ── what must hold ──────────────────────────────────────────────────────────────────────────────────────

    def refuse_stale(self, step: int, oldest: int, what: str) -> None:
        """The staleness bound, for whatever is about to be trained on.

        Raises:
            ScheduleError: when ``what`` was drawn by a version too old, or by one that was not made yet.
        """
        if not 0 <= step - oldest <= self.bound.max_lag:
            raise _wrong(
                f"step {step}, {what}",
                f"a token that version {oldest} drew: lag {step - oldest}",
                f"a lag of 0 to rollout.max_lag = {self.bound.max_lag}",
            )

    def close(self) -> None:
        """Hold the ledger against the state: every sample and every token is somewhere, once.

        Raises:
            ScheduleError: where it is not; names the side that lacks.
        """
        state = self.state
        ledger = self.state.ledger
        size = self.bound.group_size
        places = [*state.in_flight, *state.reissue, *state.finished, *state.training]
        open_groups = set(range(state.ended_below, state.next_group)) - state.ended_beyond
        if len(places) != len(set(places)) or set(places) != open_groups:
            odd = sorted(set(places) ^ open_groups) or sorted(places)
            raise _wrong("ledger", f"groups {odd[:8]} in no place or in two", "each open group in one")
        ended = ledger.trained + sum(ledger.dropped.values())
        if ledger.issued != ended + size * len(places):
            raise _wrong(
                "ledger, samples", f"{ledger.issued} issued", f"{ended} ended + {size * len(places)} open"
            )
        held = sum(finished.tokens for finished in (*state.finished.values(), *state.training.values()))
        gone = ledger.trained_tokens + sum(ledger.dropped_tokens.values())
        if ledger.drawn_tokens != gone + held:
            raise _wrong("ledger, tokens", f"{ledger.drawn_tokens} drawn", f"{gone} ended + {held} held")

    def _forget_stale(self) -> None:
        """What the next step may not train on any more, where it is dropped."""
        if self.bound.drops:
            oldest = self.state.step - self.bound.max_lag
            for group in sorted(g for g, finished in self.state.finished.items() if finished.oldest < oldest):
                self.drop(group, STALE)

    def _end(self, group: int) -> None:
        state = self.state
        if group < state.ended_below or group in state.ended_beyond:
            raise _wrong(f"group {group}", "a second end", "one")
        state.ended_beyond.add(group)
        while state.ended_below in state.ended_beyond:
            state.ended_beyond.remove(state.ended_below)
            state.ended_below += 1


def _count(histogram: dict[int, int], lengths: Iterable[int]) -> None:
    for length in lengths:
        bucket = 1 << max(0, length - 1).bit_length()
        histogram[bucket] = histogram.get(bucket, 0) + 1


def _wrong(where: str, got: str, expected: str) -> ScheduleError:
    hint = "nothing more is trained on; what was sampled is kept. Please report this with the run's ledger"
    return ScheduleError(f"schedule, {where}", got=got, expected=expected, hint=hint)
