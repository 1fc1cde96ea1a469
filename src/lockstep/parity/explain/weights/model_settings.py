"""Where the engine's model configuration, as it resolved, departs from the trainer's.

An engine may override what config.json says (``hf_overrides``), or be started on another file. What it
resolved to is read back under ``hf_config.``; a setting that differs is a suspect, and is proven when the
trainer agrees once it computes with it.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.parity.pair import Pair
from lockstep.records.settings import PREFIX, leaves

NO_MATHEMATICS = re.compile(
    r"architectures|model_type|transformers_version|use_cache|vocab_size|(torch_|head_)?dtype|\w+_token_id"
)
"""Settings that change no log-probability, or are judged elsewhere: precisions are read off parameters, and a
vocabulary may be padded."""

Path = tuple[str, ...]


@dataclass(frozen=True)
class Departure:
    """A setting that the two sides' models have otherwise."""

    path: Path
    """Where it is written in the trainer's configuration."""
    trainer: Any
    """None where the trainer's configuration lacks it."""
    engine: Any


def departures(pair: Pair) -> list[Departure]:
    """Settings that the engine's model has otherwise than the trainer's, each once."""
    asked = pair.recipe.engine.options.get("hf_overrides")
    wanted = {path[-1] for path, _ in leaves(asked)} if isinstance(asked, Mapping) else set()
    ours = dict(leaves(pair.trainer.config))
    by_path: dict[Path, Departure] = {}
    for key, value in pair.engine.ready.resolved.items():
        path = tuple(key.removeprefix(PREFIX).split("."))
        if not key.startswith(PREFIX) or NO_MATHEMATICS.fullmatch(path[-1]):
            continue
        home = _home(path, ours, pair.trainer.config, wanted)
        if home is not None and ours.get(home) != value:
            by_path[home] = Departure(home, ours.get(home), value)
    return list(by_path.values())


def _home(
    path: Path, ours: Mapping[Path, Any], config: Mapping[str, Any], wanted: Collection[str]
) -> Path | None:
    """Where a setting of the engine's belongs in the trainer's configuration; None where it is none of the
    model's.

    They are matched by the last part of their name, for releases of transformers nest them differently
    (``rope_theta``). One that the trainer's configuration lacks counts where it belongs to a section that is
    there, or where the recipe asks for it.
    """
    same_name = [known for known in ours if known[-1] == path[-1]]
    if same_name:
        return same_name[-1]
    return path if isinstance(config.get(path[0]), Mapping) or path[-1] in wanted else None
