"""Weight versions: integers counted by the trainer, 0 for the weights that the run started from."""

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

LoadMode = Literal["wait", "keep", "recompute"]
"""What becomes of requests in flight at a load. ``wait``: they end first. ``keep``: they go on over the cache
they have. ``recompute``: they go on, and their cache is computed anew under the new weights."""


class VersionSpan(Struct, frozen=True):
    """Tokens [start, stop) of a completion were sampled under weight version ``version``."""

    start: int
    stop: int
    version: int


def tiled(switches: Sequence[VersionSpan], version: int, n: int) -> tuple[VersionSpan, ...]:
    """Version spans that tile [0, n).

    Args:
        switches: where the weights changed and to which version, in order.
        version: the one that sampling began under.
    """
    starts = [VersionSpan(0, 0, version), *switches]
    ends = [*(switch.start for switch in switches), n]
    pieces = (VersionSpan(s.start, min(end, n), s.version) for s, end in zip(starts, ends, strict=True))
    return tuple(piece for piece in pieces if piece.start < piece.stop)


class NcclBroadcast(Struct, frozen=True):
    """Tensors that the trainer, rank 0, broadcasts one after the other in this order."""

    unique_id: bytes
    """128 bytes of ``ncclGetUniqueId``: the same for all updates of one communicator."""
    world_size: int
    names: tuple[str, ...]
    dtype_names: tuple[str, ...]
    """``float32``, ``bfloat16`` …"""
    shapes: tuple[tuple[int, ...], ...]


class WeightUpdate(Struct, frozen=True):
    """Where an engine finds the weights of one version.

    Example: ``WeightUpdate(version=12, path="/dev/shm/lockstep-x1/weights.safetensors")``.
    """

    version: int
    path: str = ""
    """A safetensors file in the directory that the engine was told of at start; none outside is read."""
    nccl: NcclBroadcast | None = None
    """In place of a file."""


class LoadReceipt(Struct, frozen=True):
    """What an engine did with a :class:`WeightUpdate`.

    It proves nothing: only scoring tokens does (``parity/canary.py``).
    """

    version: int
    n_tensors: int
    load_s: float
    repacked: tuple[str, ...]
    """Modules whose packed copies Lockstep rebuilt because the engine's own reload leaves them stale."""
    cache_cleared: bool
