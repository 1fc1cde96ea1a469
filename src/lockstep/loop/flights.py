"""The rollout side of the loop in flight: what is drawn while the trainer trains.

    rollout thread   admit ─► submit ─► … ─► take in ─► admit ─► …      one request a group
                       ▲                        ▲
                       │ confirm(v)             │ inbox: a handle that ended, or a wake-up
    trainer's thread   └ next_batch() ◄──────── schedule ready          waits, with a deadline
    engine's threads                            └─ ended(handle)

Where an update cuts off what is drawn (``rollout.update = "abort"``), a handle ends early, and what it was of
goes on by its prefix after the update (``rollout/pieces.py``).
The schedule (``rollout/schedule.py``) is touched under one lock. An error of the rollout thread, an engine's
death among them, is the trainer's at its next question. ``quiet`` holds admission and lets what is drawn end;
``lose`` gives up what is drawn, which is then issued again.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from lockstep.engines.streaming import Handle
from lockstep.errors import EngineError
from lockstep.loop.drawn import bound_of, drawing_of, lengths_of
from lockstep.loop.run import Run
from lockstep.records.samples import Sample, Samples
from lockstep.records.tokens import SamplingParams
from lockstep.rollout import collect, store
from lockstep.rollout.empty import refuse_empty
from lockstep.rollout.ledger import State
from lockstep.rollout.pieces import CUT, Pieces
from lockstep.rollout.rewards_ahead import RewardsAhead
from lockstep.rollout.schedule import Schedule
from lockstep.runs.durable import make_directory
from lockstep.stopping import held

ENGINE = "engine"
JOIN_S = 30.0
"""For the rollout thread to take in what has ended."""
SAY_S = 30.0
"""Between two words on what the trainer waits for."""
SCHEDULE, QUEUE = "rollout/schedule.json", "rollout/finished.parquet"
"""In a checkpoint."""


class Flights:
    """Groups in flight and finished, and the thread that sees to them.

    Args:
        state: of a run that goes on, with the samples that were finished then.
    """

    def __init__(self, run: Run, state: State | None = None, finished: Samples | None = None) -> None:
        self._run = run
        self.schedule = Schedule(bound_of(run), (ENGINE,), state)
        self.settled = self.schedule.state.step
        """The version whose step is on record, and which is proven to be served: it can be saved."""
        self._samples: dict[int, list[Sample]] = {}
        for sample in finished or ():
            self._samples.setdefault(sample.group, []).append(sample)
        self._groups: dict[Handle, tuple[int, Sample | None]] = {}
        """The group that a request is of, and the sample that it goes on with."""
        self._pieces = Pieces()
        self._cut: dict[int, list[Sample]] = {}
        """What waits to go on, by group."""
        self._cuts = run.recipe.rollout.update == "abort"
        self._rewards = RewardsAhead(run.pair.task)
        self._inbox: queue.SimpleQueue[Handle | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._held = 0
        self._ending = False
        self._error: BaseException | None = None
        self._news = time.monotonic()
        self._empty_since: float | None = self._news
        self._idle_s = 0.0

    # ── the trainer's questions ─────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Begin to draw, from the thread's own start on."""
        self._empty_since = time.monotonic()  # the ladder before it is no idling
        self._idle_s = 0.0
        self._thread = threading.Thread(target=self._pump, args=(self._inbox,), name="rollouts", daemon=True)
        self._thread.start()

    def stop(self, drain_s: float = 0.0) -> None:
        """Draw nothing new, let what is drawn end for so long, and give the rest up, to be issued again.

        What went wrong in the rollout thread ends with this.
        """
        with self._changed:
            self._held += 1
        if drain_s and self._error is None:
            self._run.pair.engine.drain(drain_s)
        if self._thread is not None:
            self._ending = True
            self._inbox.put(None)  # behind all that has ended
            # Outside the lock, which the thread needs to take in what is left.
            self._thread.join(JOIN_S)
        with self._changed:
            for handle in self._groups:
                with contextlib.suppress(EngineError):
                    handle.cancel()
            # What still comes of them, an error of each when their engine died, goes where nobody looks.
            self._inbox = queue.SimpleQueue()
            self._groups.clear()
            self._pieces.clear()
            self._cut.clear()
            self.schedule.lost()
            self._thread = None
            self._ending = False
            self._error = None
            self._held -= 1
        self._rewards.close()

    def next_batch(self) -> Samples:
        """The next step's samples, in the order of the data, once they are there.

        Raises:
            EngineError: of the rollout thread; or when nothing has happened for ``loop.deadline_s``.
        """
        began = time.perf_counter()
        with self._changed:
            self._news = time.monotonic()
        waits = 0
        while (groups := self._taken_within(SAY_S)) is None:
            waits += 1
            self._run.say(f"{self.schedule.waits_for()}, for {waits * SAY_S:g} s now")
        step = self.schedule.state.step
        samples = [
            replace(sample, group=place)
            for place, (group, drawn) in enumerate(groups)
            for sample in self._rewards.rewards(group, drawn)
        ]
        waited = time.perf_counter() - began
        task = self._run.pair.task
        figures = task.figures() if self._run.recipe.task.max_prompt_tokens else {}
        return Samples(samples, self._run.recipe.sampling, step=step, sample_s=waited, figures=figures)

    def _taken_within(self, seconds: float) -> list[tuple[int, list[Sample]]] | None:
        """The next step's groups with what was drawn of each; None when they are not there by then.

        Raises:
            EngineError: as :meth:`next_batch`.
        """
        limit = self._run.recipe.loop.deadline_s
        until = time.monotonic() + seconds
        with self._changed:
            while not self.schedule.ready():
                self._raise()
                # Since anything happened, and not since the question alone: long answers are no deadlock
                # while others end.
                left = self._news + limit - time.monotonic()
                if left <= 0:
                    raise EngineError(
                        f"loop in flight, {self.schedule.waits_for()}",
                        got=f"nothing for {limit:g} s",
                        expected="a group that ends, or a version that is confirmed",
                        hint="the engine's log says more; loop.deadline_s is the longest wait",
                    )
                if (patience := until - time.monotonic()) <= 0:
                    return None
                self._changed.wait(min(left, patience))
            with held():
                taken = self.schedule.take()
            # References alone under the lock; rewards may take seconds, and the rollout thread goes on
            # meanwhile.
            return [(chosen.group, self._samples[chosen.group]) for chosen in taken]

    def trained(self, rollouts: Samples) -> None:
        """The step was trained on these; the ledger closes, or the run stops. Raises ScheduleError."""
        with self._changed, held():
            self.schedule.trained(lengths_of(rollouts))
            for item in {sample.item for sample in rollouts}:
                del self._samples[item]
            self.schedule.close()

    def confirm(self, version: int) -> None:
        """The engine serves ``version``, and that is proven."""
        with self._changed:
            self.schedule.confirm(ENGINE, version)
            self._news = time.monotonic()
        self._inbox.put(None)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Nothing is drawn while the body runs.

        Raises:
            EngineError: when what is drawn does not end within ``loop.deadline_s``.
        """
        with self._idle("a proof that needs an idle engine"):
            yield

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """What is being drawn ends with what there is of it, and goes on after the body.

        Raises:
            EngineError: when it does not end within ``loop.deadline_s``.
        """
        with self._changed:
            self._held += 1
            for handle in self._groups:
                with contextlib.suppress(EngineError):  # its death is told by what is asked of it next
                    handle.cancel()
        try:
            with self._idle("an update that cuts off what is drawn"):
                yield
        finally:
            with self._changed:
                self._held -= 1
            self._inbox.put(None)

    @contextlib.contextmanager
    def _idle(self, why: str) -> Iterator[None]:
        with self._changed:
            self._held += 1
        try:
            limit = self._run.recipe.loop.deadline_s
            if left := self._run.pair.engine.drain(limit):
                raise EngineError(
                    f"loop in flight, {why}",
                    got=f"{left} requests that have not ended in {limit:g} s",
                    expected="none",
                    hint="the engine's log says more",
                )
            yield
        finally:
            with self._changed:
                self._held -= 1
            self._inbox.put(None)

    def figures(self) -> dict[str, float]:
        """How things stand, by catalog name; the engine's idle time is since the last call."""
        with self._changed:
            state = self.schedule.state
            now = time.monotonic()
            idle = self._idle_s + (now - self._empty_since if self._empty_since is not None else 0.0)
            self._idle_s = 0.0
            self._empty_since = now if self._empty_since is not None else None
            size = self.schedule.bound.group_size
            return {
                "in_flight_samples": float(size * len(state.in_flight)),
                "queue_samples": float(size * len(state.finished)),
                "dropped_samples": float(sum(state.ledger.dropped.values())),
                "engine_idle_s": idle,
            }

    def write(self, checkpoint: Path) -> None:
        """Schedule and finished samples, into a checkpoint that is being written.

        A step that is being trained is none to whom goes on from there: its samples are finished ones.
        """
        with self._changed:
            self.schedule.close()
            make_directory(checkpoint / "rollout")
            (checkpoint / SCHEDULE).write_bytes(msgspec.json.encode(self.schedule.state))
            # Under the same lock as the schedule: a group that ended between the two would be in neither
            # file.
            groups = sorted(self.schedule.state.finished | self.schedule.state.training)
            there = [sample for group in groups for sample in self._samples[group]]
        if there:
            rollouts = Samples(there, self._run.recipe.sampling, step=self.schedule.state.step)
            before = self._run.pair.trainer.versions.before(
                rollouts, rollouts.step or 0, drawing_of(self._run)
            )
            rollouts.fill(sampling_logprobs=before.scored)
            store.save(checkpoint / QUEUE, rollouts)

    def replayed(self, rollouts: Samples) -> None:
        """A run that goes on has trained a step again from its stored samples."""
        with self._changed:
            self.schedule.replayed(lengths_of(rollouts))
            for item in {sample.item for sample in rollouts}:
                self._samples.pop(item, None)
            self.schedule.close()

    def refuse_stale(self, rollouts: Samples) -> None:
        """Hold each token of a step to the bound, by the version that the engine says drew it.

        Raises:
            ScheduleError: for one outside; nothing is clamped.
        """
        step = self.schedule.state.step
        for sample in rollouts:
            for span in sample.version_spans:
                where = (
                    f"question {sample.item}, sample {sample.sample}, tokens {span.start} to {span.stop - 1}"
                )
                self.schedule.refuse_stale(step, span.version, where)

    # ── the rollout thread ──────────────────────────────────────────────────────────────────────────────────

    def _pump(self, inbox: queue.SimpleQueue[Handle | None]) -> None:
        try:
            while True:
                self._admit(inbox)
                message = inbox.get()
                if message is not None:
                    self._take_in(message)
                elif self._ending:
                    return
        # A thread's error is nobody's: it is kept, and raised where the trainer asks next.
        except BaseException as error:
            with self._changed:
                if inbox is self._inbox:
                    self._error = error
                    self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _admit(self, inbox: queue.SimpleQueue[Handle | None]) -> None:
        with self._changed:
            if self._held or inbox is not self._inbox:  # a thread that outlived its stop draws nothing
                return
            of: list[tuple[int, Sample | None]] = []
            for group, samples in self._cut.items():
                # Of a group that had not begun nothing need be drawn one by one.
                begun = any(len(sample.token_ids) for sample in samples)
                of += [(group, sample) for sample in samples] if begun else [(group, None)]
            self._cut.clear()
            while self.schedule.room:
                of.append((self.schedule.admit().group, None))
            if not of:
                return
            asked = [self._request(group, sample) for group, sample in of]
            if self._empty_since is not None:
                self._idle_s += time.monotonic() - self._empty_since
                self._empty_since = None
            # Under the lock: what ends at once finds its group.
            prompts = [prompt for prompt, _ in asked]
            params = [sampling for _, sampling in asked]
            handles = self._run.pair.engine.submit(prompts, params, inbox.put)
            self._groups.update(zip(handles, of, strict=True))
            for group, _ in of:
                self._pieces.asked(group)

    def _request(self, group: int, cut: Sample | None) -> tuple[np.ndarray, SamplingParams]:
        pair = self._run.pair
        recipe = self._run.recipe
        place = group // recipe.training.prompts_per_step, group
        if cut is None:
            prompt = pair.renderer.prompt(pair.task.messages(pair.task.item(group)))
            seed = collect.sampling_seed(recipe.training.seed, *place)
            return prompt, collect.request(recipe, pair.renderer, seed)
        n = len(cut.token_ids)
        seed = collect.sampling_seed(recipe.training.seed, *place, cut.sample, n)
        left = recipe.sampling.max_tokens - n
        asked = collect.request(recipe, pair.renderer, seed, n=1, max_tokens=left)
        return np.r_[cut.prompt_ids, cut.token_ids], asked

    def _goes_on(self, sample: Sample) -> bool:
        cut = self._cuts and sample.finish_reason == CUT
        return cut and len(sample.token_ids) < self._run.recipe.sampling.max_tokens

    def _take_in(self, handle: Handle) -> None:
        with self._changed:
            group, cut = self._groups.pop(handle, (None, None))
            if group is None:
                return  # it was given up
            completions = handle.result(0.0)
            self._news = time.monotonic()
            if not self._groups:
                self._empty_since = self._news
            for completion in completions:
                if not (self._cuts and completion.finish_reason == CUT):
                    refuse_empty(completion)
            pieces = [Sample.of(c, handle.prompt, group, group=group) for c in completions]
            if cut is not None:
                pieces = [replace(piece, sample=cut.sample) for piece in pieces]
            drawn = self._pieces.add(group, pieces)
            open_samples = [s for s in drawn or () if self._goes_on(s)]
            if open_samples:
                self._cut[group] = open_samples
            if drawn is None or open_samples:
                return
            self._pieces.forget(group)
            samples = [replace(s, text=self._run.pair.renderer.text(s.token_ids)) for s in drawn]
            oldest = min(span.version for sample in samples for span in sample.version_spans)
            self._samples[group] = samples
            self._rewards.begin(group, samples)
            self.schedule.finish(group, oldest, [len(sample.token_ids) for sample in samples])
            for gone in self._samples.keys() - self.schedule.state.finished.keys():
                if gone not in self.schedule.state.training:
                    del self._samples[gone]
                    self._rewards.forget(gone)
            self._changed.notify_all()
