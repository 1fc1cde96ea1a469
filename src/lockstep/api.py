"""The library's verbs: the work of the command line, which itself only parses and shows.

    check(recipe)              ─► LadderResult     the ladder; with ``out`` also a certificate
    train(recipe, out=…)       ─► RunSummary       the ladder, then training; every sync is proven
    check_log(file, recipe)    ─► [Verdict]        what can be proven of rollouts that others logged
    verify(file, recipe)       ─► Verification     does a certificate still hold?
    audit(recipe, before)      ─► Audit            what an engine resolved to, against what online RL needs

torch and the engines are imported when a verb needs them. ``say`` is told what goes on, a line at a time.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec.structs import replace

from lockstep.config.recipe import Recipe, load_recipe, with_sets
from lockstep.errors import LockstepError, UsageError

if TYPE_CHECKING:
    from lockstep.engines.audit import KnobRow
    from lockstep.loop.open import Plants, Session
    from lockstep.loop.run import ShowsNow
    from lockstep.parity.ladder import LadderResult
    from lockstep.records.verdicts import Status, Verdict
    from lockstep.runs.certificate import Certificate
    from lockstep.runs.layout import RunLayout
    from lockstep.summary import RunSummary

Say = Callable[[str], None]
Depth = Literal["quick", "standard", "full"]
DEPTHS: tuple[Depth, ...] = ("quick", "standard", "full")
DEPTHS_OF_A_LOG = DEPTHS[1:]
QUICK = (
    "parity.probe_prompts=8",
    "parity.probe_tokens=16",
    "parity.draw_tokens=768",
    "parity.draws_see=1.0",
    "parity.direction_sequences=0",
)
"""What depth ``quick`` sets in the recipe."""


def quiet(text: str) -> None:
    """Say nothing."""


def check(
    recipe: Recipe | Path | str,
    *,
    out: Path | str | None = None,
    depth: str = "standard",
    plant: Sequence[str] = (),
    sign_key: Path | None = None,
    api_key_env: str = "",
    say: Say = quiet,
) -> "LadderResult":
    """Prove that engine and trainer are the same policy, or name what is not.

    Args:
        recipe: a recipe, or the file of one.
        out: where the verdicts are appended and, when all five layers pass, a certificate is issued; a result
            that is no PASS voids the certificate that is there.
        depth: ``quick`` takes fewer probes; ``full`` also updates in flight, starts engines for one factor
            each, and puts every direction of the numbers to a score test.
        plant: faults to break the backend with, by name; what comes of it certifies nothing.
        sign_key: a key file that the certificate is signed with.
        api_key_env: the variable that is confirmed as holding a server's key.

    Raises:
        UsageError: for what cannot be: a recipe, a fault, a model, an engine that is not installed.
        EngineError: when the engine does not start or answers with an error.
    """
    _refuse_depth(depth, DEPTHS)
    faults = _planted(plant)
    key = _key(sign_key, "--sign-key")
    loaded = _loaded(recipe)
    if depth == "quick":
        loaded = with_sets(loaded, QUICK)
    from lockstep.loop.open import open_session, preflight
    from lockstep.runs.durable import make_directory
    from lockstep.runs.layout import refuse_no_directory

    with tempfile.TemporaryDirectory(prefix="lockstep-check-") as scratch:
        directory = Path(out or scratch).absolute()
        refuse_no_directory(directory)
        preflight(loaded, api_key_env)
        # A recipe that is refused leaves no directory behind.
        make_directory(directory)
        with open_session(loaded, directory / "engine.log", say, _plants(faults), api_key_env) as session:
            return _climb(session, directory, depth, key, say)


def _climb(session: "Session", directory: Path, depth: str, key: bytes, say: Say) -> "LadderResult":
    from lockstep.deep.full import deeper
    from lockstep.loop.open import open_engine
    from lockstep.parity.certificate import issue
    from lockstep.parity.ladder import climb
    from lockstep.records.verdicts import OfCheck
    from lockstep.runs.certificate import void
    from lockstep.runs.layout import RunLayout
    from lockstep.runs.record import open_recorder

    layout = RunLayout(directory)
    recorder = open_recorder(layout)
    more = deeper(session.pair, open_engine) if depth == "full" else {}
    result = climb(session.pair, lambda layer: say(f"ladder: {layer}"), more)
    for verdict in result.verdicts:
        recorder.verdict(OfCheck(), verdict)
    if result.passed:
        issue(session.pair, result.verdicts, layout.certificate, depth, key)
    else:
        stopped = next(verdict.layer for verdict in result.verdicts if verdict.status != "PASS")
        void(layout.certificate, f"layer {stopped} of a later check here did not pass")
    return result


def train(
    recipe: Recipe | Path | str | None = None,
    *,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    resume_unfinished: bool = False,
    plant: Sequence[str] = (),
    sign_key: Path | None = None,
    api_key_env: str = "",
    say: Say = quiet,
    live: "ShowsNow | None" = None,
) -> "RunSummary":
    """Run the ladder, then online RL; every weight sync is proven.

    Args:
        recipe: a recipe, or the file of one; with ``resume`` the run's own is used.
        out: the run directory; ``runs/<date>-<random>`` if not given.
        resume: a run that was interrupted and goes on.
        resume_unfinished: without ``out``, go on with the newest run of this recipe if it was interrupted.
        plant: as :func:`check`.
        sign_key: as :func:`check`.
        api_key_env: as :func:`check`.
        live: shows what a run in flight is doing at the moment; None: nothing does.

    Raises:
        UsageError: for what cannot be, and for both of ``recipe`` and ``resume`` or neither.
        ParityError: when a proof fails; what was sampled and trained is kept.
        RewardError, DivergenceError, EngineError: as they say.
    """
    loaded, layout = _run_of(recipe, out, resume, resume_unfinished=resume_unfinished)
    start = _Start(_planted(plant), _key(sign_key, "--sign-key"), api_key_env, live)
    from lockstep.loop.open import preflight, wait_asleep
    from lockstep.runs.layout import new_run
    from lockstep.runs.manifest import finished, tidy
    from lockstep.runs.read import open_run
    from lockstep.summary import summarise

    preflight(loaded, api_key_env)
    wait_asleep(loaded, say)
    resumed = layout is not None
    layout = layout or new_run(Path(out) if out is not None else None)
    # As it was typed: people are told of no other path.
    named = layout.root
    layout = layout.absolute()  # somebody's reward may change the working directory
    with layout.held():
        say(f"run directory {named}{', which goes on' if resumed else ''}")
        if resumed and finished(layout, loaded):
            tidy(layout)
            say("its last step is trained and saved: nothing is left to do")
        else:
            _train(loaded, layout, say, start, resumed=resumed)
    return replace(summarise(open_run(layout.root)), run=str(named))


@dataclass(frozen=True)
class _Start:
    """What belongs to this start of a run and not to its recipe."""

    faults: tuple[str, ...]
    sign_key: bytes
    api_key_env: str
    live: "ShowsNow | None"


def _run_of(
    recipe: Recipe | Path | str | None,
    out: Path | str | None,
    resume: Path | str | None,
    *,
    resume_unfinished: bool,
) -> "tuple[Recipe, RunLayout | None]":
    """The recipe, and the run that goes on with it, if one does."""
    from lockstep.runs.layout import existing_run
    from lockstep.runs.manifest import read_recipe, unfinished_run

    if resume is not None:
        if recipe is not None or out is not None or resume_unfinished:
            got = "--resume with a recipe or its flags"
            hint = f"lockstep train --resume {resume}"
            raise UsageError("lockstep train", got=got, expected="--resume RUN alone", hint=hint)
        layout = existing_run(Path(resume))
        return read_recipe(layout.manifest), layout
    if recipe is None:
        hint = "lockstep train recipes/quickstart.toml"
        raise UsageError("lockstep train", got="no recipe", expected="one, or --resume RUN", hint=hint)
    loaded = _loaded(recipe)
    layout = unfinished_run(loaded, Path("runs")) if resume_unfinished and out is None else None
    # The manifest's: with the engine that ``auto`` came to then, whatever is installed by now.
    return (read_recipe(layout.manifest), layout) if layout else (loaded, None)


def _train(recipe: Recipe, layout: "RunLayout", say: Say, start: _Start, *, resumed: bool) -> None:
    from lockstep.loop.sync import session_of
    from lockstep.runs.manifest import refuse_other_run, write_manifest
    from lockstep.runs.record import recorder_of

    recorder = recorder_of(recipe, layout, say)
    with session_of(recipe, layout.engine_log, say, _plants(start.faults), start.api_key_env) as session:
        from lockstep.loop.run import Run
        from lockstep.loop.sync import steps_of

        if resumed:
            refuse_other_run(layout.manifest, session.manifest)
        else:
            # Not before the session: it says what the engine resolved to.
            write_manifest(layout.manifest, session.manifest)
        run = Run(session, layout, say, recorder, sign_key=start.sign_key, live=start.live)
        try:
            steps_of(recipe)(run, resumed=resumed)
        except LockstepError as error:
            error.add_note(
                f"what was sampled and trained is kept; go on with: lockstep train --resume {layout.root}"
            )
            raise


def check_log(
    file: Path, recipe: Recipe, *, rows: int | None = None, depth: str = "standard", say: Say = quiet
) -> "list[Verdict]":
    """Judge the two layers that need no engine on rollouts that any framework logged; the others are NOT_RUN.

    Args:
        file: Parquet or JSONL, one completion a row.
        recipe: its model scores them; its sampling stands where the file has no settings of its own.
        rows: measure the gap on so many completions, spread over the file; None on all.
        depth: ``full`` also puts every direction of the gap to a score test.

    Raises:
        UsageError: for a file or a model that cannot be used.
    """
    _refuse_depth(depth, DEPTHS_OF_A_LOG)
    from lockstep.logged.file import read_logged
    from lockstep.logged.judge import judge
    from lockstep.parity.layers.directions import deepen
    from lockstep.policy.pretrained import resolve_model
    from lockstep.rendering import Renderer
    from lockstep.training.trainer import Trainer

    path = resolve_model(recipe.model.path)
    logged = read_logged(file, recipe.sampling)
    size = f"{len(logged.token_ids):,} tokens in {len(logged.spans):,} completions"
    say(f"{size} under {len(logged.samplings)} sampling settings; scoring them with {recipe.model.path}")
    trainer = Trainer.load(path, recipe)
    deeper = deepen if depth == "full" else None
    return judge(logged, trainer, Renderer(path), recipe, say, rows, deeper)


@dataclass(frozen=True)
class Verification:
    """Whether a certificate still holds."""

    certificate: "Certificate"
    """Whole, not void, nothing planted, five layers that passed: any other is an error."""
    signature: Literal["verified", "not verified", "none"]
    """``not verified``: it has one, and no key was given."""
    changes: tuple[str, ...] | None
    """What of the pair is no longer as certified, ``name: then → now``; None where none was given."""

    @property
    def status(self) -> "Status":
        """PASS while it holds for the pair, FAIL when anything changed, NOT_RUN without a pair."""
        return "NOT_RUN" if self.changes is None else "FAIL" if self.changes else "PASS"


def verify(
    file: Path,
    recipe: Recipe | None = None,
    *,
    verify_key: Path | None = None,
    api_key_env: str = "",
    say: Say = quiet,
) -> Verification:
    """Read a certificate and, with a recipe, compare it with that pair as it is now.

    Without a recipe no engine is started.

    Args:
        verify_key: a key file; the certificate must be signed with that key.

    Raises:
        RunError: for a file that is no whole certificate, or is not signed with the key.
        ParityError: for one that is void, or of a pair that faults were planted in.
        UsageError, EngineError: as :func:`check`.
    """
    from lockstep.runs.certificate import read_certificate

    key = _key(verify_key, "--verify-key")
    certificate = read_certificate(file, key)
    signature = "verified" if key else "not verified" if certificate.signature else "none"
    if recipe is None:
        return Verification(certificate, signature, None)
    from lockstep.loop.open import open_session
    from lockstep.parity.certificate import changes

    with (
        tempfile.TemporaryDirectory(prefix="lockstep-check-") as scratch,
        open_session(recipe, Path(scratch) / "engine.log", say, None, api_key_env) as session,
    ):
        return Verification(certificate, signature, tuple(changes(certificate, session.pair)))


@dataclass(frozen=True)
class Audit:
    """What an engine resolved to."""

    engine: str
    """``name version (generation)``."""
    before: str
    """The version whose defaults stand beside."""
    rows: "list[KnobRow]"

    @property
    def status(self) -> "Status":
        """FAIL when something has to change, NOT_RUN when something could not be read, PASS otherwise."""
        verdicts = {row.verdict for row in self.rows}
        return "FAIL" if "change" in verdicts else "NOT_RUN" if "unknown" in verdicts else "PASS"


def audit(recipe: Recipe, before: str, *, api_key_env: str = "", say: Say = quiet) -> Audit:
    """Start the recipe's engine, or ask its server, and hold each resolved setting against what RL needs.

    Args:
        before: the vLLM version that the user comes from (``0.8.5``).

    Raises:
        UsageError: for a version whose defaults are not known.
        EngineError: as :func:`check`.
    """
    from lockstep.engines.audit import audit as rows_of
    from lockstep.engines.registry import checklist
    from lockstep.loop.open import open_engine

    known = checklist()
    # The CPU wheel of 0.8.5 is numbered 0.8.5.post2.
    before = next((version for version in known.versions if before in (version, f"{version}.post2")), before)
    if before not in known.versions:
        expected = f"one of {', '.join(known.versions)}"
        raise UsageError("flag --from", got=before, expected=expected, hint="--from 0.8.5")
    with (
        tempfile.TemporaryDirectory(prefix="lockstep-audit-") as scratch,
        open_engine(recipe, Path(scratch) / "engine.log", say, api_key_env) as running,
    ):
        ready = running.ready
        rows = rows_of(running, recipe, known, before)
        return Audit(f"{ready.engine} {ready.version} ({ready.generation})", before, rows)


def _loaded(recipe: Recipe | Path | str) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))


def _refuse_depth(depth: str, known: Sequence[str]) -> None:
    if depth not in known:
        expected = f"one of {', '.join(known)}"
        raise UsageError("flag --depth", got=repr(depth), expected=expected, hint="--depth full")


def _planted(names: Sequence[str]) -> tuple[str, ...]:
    from lockstep.faults.catalogue import planted

    return planted(list(names))


def _plants(faults: tuple[str, ...]) -> "Plants | None":
    """None for no fault, and then nothing that plants is loaded."""
    if not faults:
        return None
    from lockstep.faults.at_load import plants

    return plants(faults)


def _key(path: Path | None, flag: str) -> bytes:
    """The bytes of a key file; none where no key was given."""
    if path is None:
        return b""
    from lockstep.runs.signature import read_key

    return read_key(path, flag)
