"""A model's configuration as plain settings, so that two of them can be compared."""

from collections.abc import Iterator, Mapping
from typing import Any

PREFIX = "hf_config."
"""Of the model's configuration in what an engine resolved to: ``hf_config.rope_parameters.rope_theta``."""


def leaves(settings: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every plain setting with its path; lists and private names are left out."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*above, str(name)))
        elif (value is None or isinstance(value, bool | int | float | str)) and not str(name).startswith("_"):
            yield (*above, str(name)), value


def resolved_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """They as an engine reports them."""
    return {PREFIX + ".".join(path): value for path, value in leaves(settings)}
