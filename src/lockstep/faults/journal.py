"""What a campaign has found so far, on disk: an hour's work goes on where a kill cut it off.

A line is taken over only by a campaign of the same recipe, engine and sources of Lockstep, so an outcome
never passes for one of other code. What could not be planted is tried anew.
"""

import hashlib
from pathlib import Path

import msgspec

import lockstep
from lockstep.config.recipe import Recipe
from lockstep.engines.registry import choose
from lockstep.faults.campaign import Outcome
from lockstep.runs.strict import append, drop_partial_line, exact, plain, read_lines


class Journal:
    """Outcomes of one recipe, appended as they come."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.key = _key(recipe)

    def outcomes(self) -> list[Outcome]:
        """Outcomes that an earlier campaign came to."""
        drop_partial_line(self.path)
        rows = [row["outcome"] for row in read_lines(self.path) if row.get("key") == self.key]
        return [msgspec.convert(exact(row), Outcome) for row in rows]

    def add(self, outcome: Outcome) -> None:
        """Keep one more."""
        if not outcome.not_run:
            append(self.path, {"key": self.key, "outcome": plain(outcome)})


def _key(recipe: Recipe) -> str:
    """A digest of everything that an outcome depends on."""
    digest = hashlib.sha256(msgspec.json.encode(recipe))
    environment = choose(recipe.engine).environment
    digest.update(environment.digest.encode() if environment is not None else b"transformers")
    root = Path(lockstep.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()
