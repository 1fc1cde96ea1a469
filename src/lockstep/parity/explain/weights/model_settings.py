"""Where the engine's model configuration, as it resolved, departs from the trainer's.

An engine may override what config.json says (``hf_overrides``), or be started on another file. What it resolved to is read back
under ``hf_config.``; a setting that differs is a suspect, and is proven when the trainer agrees once it computes with it.
"""

import re
from collections.abc import Mapping
from typing import Any

from lockstep.parity.pair import Pair
from lockstep.records.settings import PREFIX, leaves

NO_MATHEMATICS = re.compile(
    r"architectures|model_type|transformers_version|use_cache|vocab_size|(torch_|head_)?dtype|\w+_token_id"
)
"""Precisions are read off parameters, and a vocabulary may be padded."""

Path = tuple[str, ...]


def departures(pair: Pair) -> dict[Path, tuple[Any, Any]]:
    """Settings that the engine's model has otherwise, by their path in the trainer's configuration: (trainer's, engine's).

    They are matched by the last part of their name, for releases of transformers nest them differently (``rope_theta``). One
    that the trainer's configuration lacks counts where it belongs to a section that is there, or where the recipe asks for it.
    """
    config = pair.trainer.config
    ours, asked = dict(leaves(config)), pair.recipe.engine.options.get("hf_overrides")
    homes = {path[-1]: path for path in ours}
    wanted = {path[-1] for path, _ in leaves(asked)} if isinstance(asked, Mapping) else set()
    found = {}
    for key, value in pair.engine.ready.resolved.items():
        path = tuple(key.removeprefix(PREFIX).split("."))
        if not key.startswith(PREFIX) or NO_MATHEMATICS.fullmatch(path[-1]):
            continue
        near = isinstance(config.get(path[0]), Mapping) or path[-1] in wanted
        home = homes.get(path[-1], path if near else None)
        if home is not None and ours.get(home) != value:
            found[home] = ours.get(home), value
    return found
