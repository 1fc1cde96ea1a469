"""The last versions of the trainer's weights, so that a token is scored under the very weights that drew it.

remember(7) ─► │ 5 │ 6 │ 7 │        depth 3: version 4 goes
                 └───┴───┴── of(5)  what a token of version 5 is scored under at step 7 or 8
"""

from pathlib import Path

from safetensors.torch import load_file, save_file

from lockstep.policy.parameters import Snapshot


class Ring:
    """Copies of the parameters, by version.

    Args:
        depth: how many versions are kept.
        directory: where they lie; None: in memory.
    """

    def __init__(self, depth: int, directory: Path | None = None) -> None:
        self.depth = depth
        self._directory = directory
        self._held: dict[int, Snapshot | Path] = {}

    def __contains__(self, version: int) -> bool:
        return version in self._held

    @property
    def versions(self) -> list[int]:
        """Versions that are kept, the oldest first."""
        return sorted(self._held)

    def remember(self, version: int, weights: Snapshot) -> None:
        """Keep a version; the oldest beyond the depth goes."""
        if not self.depth:
            return
        # A resumed run trains a step again, and makes its version a second time.
        if self._directory is None:
            self._held[version] = weights
        else:
            path = self._directory / f"version-{version:06d}.safetensors"
            save_file({name: value.contiguous() for name, value in weights.values.items()}, path)
            self._held[version] = path
        # Only now: whoever is stopped before has the older ones, or this one too.
        while len(self._held) > self.depth:
            self._forget(min(self._held))

    def of(self, version: int) -> Snapshot:
        """The weights of a version. Raises KeyError for one that is not kept."""
        held = self._held[version]
        return held if isinstance(held, Snapshot) else Snapshot(load_file(held))

    def _forget(self, version: int) -> None:
        gone = self._held.pop(version)
        if isinstance(gone, Path):
            gone.unlink(missing_ok=True)
