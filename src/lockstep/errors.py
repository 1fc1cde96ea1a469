"""Every error names the boundary it happened at, what was got, what was expected, and the next command.

LockstepError                exit 3   could not run
├── UsageError               exit 2   the user's input: a recipe, a flag, a path
│   ├── RecipeError                   a key or value of a recipe
│   ├── ModelError                    a model that is not there or cannot be scored
│   ├── NotInstalledError             an engine environment that is not there
│   ├── RewardError                   a reward function that raised or returned no finite number
│   └── EnvironmentFault              a task's environment that raised, or answered what it must not
│       └── RetokenisedError          one whose next prompt does not begin with the tokens that there are
├── ParityError              exit 1   a layer of the ladder failed
│   └── WeightSyncError               the engine does not serve the weights that it was sent
├── EngineError              exit 3   the engine answered with an error
│   ├── EngineDied                    the engine's process is gone
│   └── CapabilityError               the engine cannot do what was asked of it, and says why
├── ProtocolError            exit 3   a frame that is not a message of the worker protocol
├── InstallError             exit 3   an environment could not be built
├── MachineError             exit 3   an engine that this machine cannot run
├── NoRoomError              exit 3   memory or a disk without the room that is needed
├── RunError                 exit 3   a run directory that cannot be read or continued
├── ScheduleError            exit 3   a token past the staleness bound, or a ledger that does not close
└── DivergenceError          exit 3   the loss or a gradient is no finite number
"""

import re

USERINFO = re.compile(r"(?<=://)[^/?#\s@]*@")
QUERY = re.compile(r"(\b\w+://[^\s?#'\"]+)\?[^\s'\"]*")


def bare_urls(text: str) -> str:
    """The text with its URLs less user, password and query, which may be secrets."""
    return QUERY.sub(r"\1", USERINFO.sub("", text))


class LockstepError(Exception):
    """Base of all errors a user can see.

    Args:
        boundary: where it happened, in the user's words (``"recipe quickstart.toml, key training.stepz"``).
        got: what was found there.
        expected: what should have been there.
        hint: the next thing to do, preferably a command.
    """

    exit_code = 3

    def __init__(self, boundary: str, *, got: str, expected: str, hint: str) -> None:
        # Here, where all of them pass: what a library said is quoted, and may hold a URL with its password.
        self.boundary, self.got, self.expected, self.hint = map(bare_urls, (boundary, got, expected, hint))
        super().__init__(f"{self.boundary}: got {self.got}, expected {self.expected}\n\nhint: {self.hint}")


class UsageError(LockstepError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class ModelError(UsageError):
    pass


class NotInstalledError(UsageError):
    pass


class RewardError(UsageError):
    pass


class EnvironmentFault(UsageError):
    pass


class RetokenisedError(EnvironmentFault):
    pass


class ParityError(LockstepError):
    exit_code = 1


class WeightSyncError(ParityError):
    pass


class EngineError(LockstepError):
    pass


class EngineDied(EngineError):
    pass


class CapabilityError(EngineError):
    pass


class ProtocolError(LockstepError):
    pass


class InstallError(LockstepError):
    pass


class MachineError(LockstepError):
    pass


class NoRoomError(LockstepError):
    pass


class RunError(LockstepError):
    pass


class ScheduleError(LockstepError):
    pass


class DivergenceError(LockstepError):
    pass


class Stopped(SystemExit):
    """The process was asked to end, by Ctrl-C, a signal or a reader that went: what is open is closed first.

    No error; a type of its own, so that it is told from a ``SystemExit`` that somebody's reward raises.
    """
