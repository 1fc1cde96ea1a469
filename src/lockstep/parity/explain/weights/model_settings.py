"""Where the engine's model configuration, as it resolved, departs from the trainer's; and the trainer's model built with it.

An engine may override what config.json says (``hf_overrides``), or be started on another file. What it resolved to is read back
under ``hf_config.``; a setting that differs is a suspect, and is proven when the trainer agrees once it computes with it.
"""

import contextlib
import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lockstep.parity.pair import Pair
from lockstep.policy.model import Policy
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
    config = pair.policy.model.config.to_dict()
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


def with_settings(policy: Policy, settings: Mapping[Path, Any]) -> Policy | None:
    """The policy's weights in a model built with other settings; None where there is no such model of these weights."""
    config = copy.deepcopy(policy.model.config)
    for path, value in settings.items():
        *parents, last = path
        holder: Any = config
        for name in parents:
            holder = holder[name] if isinstance(holder, dict) else getattr(holder, name)
        holder.update({last: value}) if isinstance(holder, dict) else setattr(holder, last, value)
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError):
        model: Any = type(policy.model)(config).eval()
        model.load_state_dict(policy.model.state_dict(), strict=False, assign=True)
        head = model.get_output_embeddings()
        return replace(policy, model=model, head=head.weight, head_bias=getattr(head, "bias", None))
    return None
