"""``lockstep``: the entry point.

Exit codes: 0 pass, 1 parity FAIL, 2 usage or configuration, 3 could not run.
"""

import errno
import signal
import sys
import traceback
from typing import Annotated

import typer

import lockstep
from lockstep.cli import (
    atlas,
    certificate,
    check,
    check_log,
    compare,
    diagnose,
    engines,
    faults,
    init,
    metrics,
    models,
    report,
    train,
    upgrade,
)
from lockstep.cli.console import UNREAD, fail, guarded
from lockstep.errors import LockstepError, NotInstalledError, Stopped, UsageError
from lockstep.stopping import STOPS

EXTRA = (
    "torch",
    "transformers",
    "safetensors",
    "httpx2",
    "pyarrow",
    "reasoning_gym",
    "gguf",
    "accelerate",
    "jaxtyping",
    "huggingface_hub",
)
"""What ``lockstep-rl[trainer]`` brings, by the names that are imported; the last comes with transformers."""

NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
"""What the system says of a path whatever is there."""

app = typer.Typer(
    name="lockstep",
    help=(
        "Online RL for language models in which every rollout log-probability "
        "is proven before it is trained on."
    ),
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"lockstep {lockstep.__version__}")
        raise typer.Exit


FIRST = """\
lockstep init            write recipes/quickstart.toml, and say what it takes to run it
lockstep check RECIPE    prove that engine and trainer are the same policy, or name what is not
lockstep train RECIPE    prove it, then train; every weight sync is proven too
All verbs: lockstep --help. Guides: docs/guides/my-engine.md and beside it, in the source."""


@app.callback(invoke_without_command=True)
def _app(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Online RL for language models: every rollout log-probability is proven before it is trained on."""
    if context.invoked_subcommand is None:
        print(FIRST)


app.command("init")(init.init)
app.command("train")(train.train)
app.command("check")(check.check)
app.command("check-log")(check_log.check_log)
app.command("diagnose")(diagnose.diagnose)
app.command("faults")(faults.faults)
app.command("upgrade")(upgrade.upgrade)
app.command("atlas")(atlas.atlas)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("metrics")(metrics.metrics)
app.add_typer(certificate.app, name="certificate")
app.add_typer(engines.app, name="engines")
app.add_typer(models.app, name="models")


@guarded()
def main() -> None:
    """Run a verb and turn its error into an exit code."""
    _end_in_order()
    as_json = "--json" in sys.argv  # an error may come before the flags are read
    try:
        # Not standalone: a verb's exit code is returned, and is told from a SystemExit of somebody's code.
        code = app(standalone_mode=False)
        sys.stdout.flush()  # here, where it is known what it means that nobody reads any more
    except LockstepError as error:
        fail(error, as_json=as_json)
        code = error.exit_code
    except Stopped as stopped:
        if stopped.code != UNREAD:
            print("interrupted" if stopped.code == 130 else "ended by a signal", file=sys.stderr)
        code = stopped.code
    except SystemExit as error:
        # No verb ends that way: some code that it called would end the process, with its own code.
        traceback.print_exc()
        print(f"error: something called sys.exit({error.code!r})", file=sys.stderr)
        code = LockstepError.exit_code
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own errors, whose class has no public name
            code = _wrong_usage(error, as_json)
        elif (
            isinstance(error, ModuleNotFoundError) and (name := (error.name or "").partition(".")[0]) in EXTRA
        ):
            code = _without_extra(name, as_json)
        elif isinstance(error, OSError) and error.errno in NO_PATH:
            code = _no_path(error, as_json)
        else:  # a bug of ours: Python's own exit code, 1, would read as a parity FAIL
            traceback.print_exc()
            code = LockstepError.exit_code
    sys.exit(code or 0)


def _end_in_order() -> None:
    """Ctrl-C, SIGTERM and a lost terminal close what is open: an engine, shared memory.

    A second one ends at once.
    """

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(128 + number)

    for number in STOPS:
        # What is ignored stays ignored.
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)


def _wrong_usage(error, as_json: bool) -> int:
    if as_json:
        expected = "a command as --help shows it"
        hint = "lockstep --help"
        fail(
            UsageError("command line", got=error.format_message(), expected=expected, hint=hint), as_json=True
        )
    else:
        error.show()
    return error.exit_code


def _no_path(error: OSError, as_json: bool) -> int:
    """No path of ours is such; one that was typed may be."""
    where = f"path {error.filename}"
    got = error.strerror or str(error)
    told = UsageError(where, got=got, expected="a path that the system takes", hint="give a shorter one")
    fail(told, as_json=as_json)
    return told.exit_code


def _without_extra(name: str, as_json: bool) -> int:
    """A plain install has what reads runs and recipes.

    What the user's own modules lack is told where they are imported.
    """
    expected = "the trainer's packages beside it"
    hint = 'pip install "lockstep-rl[trainer]"'
    error = NotInstalledError("this Python", got=f"no {name}", expected=expected, hint=hint)
    fail(error, as_json=as_json)
    return error.exit_code


if __name__ == "__main__":
    main()
