"""Configurations as plain settings: to compare two of them, and to write no secret down with them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lockstep.errors import bare_urls

PREFIX = "hf_config."
"""How the keys of the model's configuration begin in what an engine resolved to: ``hf_config.rope_theta``."""

SECRETS = frozenset(
    (
        "api_key",
        "api_keys",
        "hf_token",
        "token",
        "access_token",
        "auth_token",
        "password",
        "secret",
        "credentials",
    )
)
"""Settings of engines that hold a secret. They are never written down, not even that there is one."""

OPEN_TABLES = frozenset(
    (
        "backend_per_kind",
        "hf_overrides",
        "inductor_compile_config",
        "inductor_passes",
        "linear_backend_per_quant",
        "mm_processor_kwargs",
        "override_generation_config",
        "pass_config",
        "quantization_config",
        "rope_parameters",
        "rope_scaling",
    )
)
"""Settings that are tables, can move a log-probability and hold no secret. Of other tables only the size is
written down: what a user passes to a store, a connector or a loader is there, credentials included."""
LONGEST = 1000
"""Characters of a setting, and of a table or list 200."""


def resolved_plain(settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Settings as they may be written down: plain values, lists of them, known tables; else type and size.

    Args:
        settings: full name (``model_config.dtype``) and value.
    """
    return {
        name: _plain(name, value)
        for name, value in settings
        if name.rpartition(".")[2].lower() not in SECRETS
    }


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return bare_urls(value)[:LONGEST]
    if isinstance(value, Mapping) and (not value or name.rpartition(".")[2] in OPEN_TABLES):
        return repr(value)[:200]
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)  # a set's own order differs from start to start
    if isinstance(value, list | tuple) and all(
        item is None or isinstance(item, str | int | float) for item in value
    ):
        return bare_urls(repr(value))[:200]
    if isinstance(value, list | tuple | Mapping):
        return f"{type(value).__name__} of {len(value)}"
    text = str(value)
    return text if text.startswith("torch.") else type(value).__name__


def leaves(settings: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every plain setting with its path; lists and private names are left out."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*above, str(name)))
        elif (value is None or isinstance(value, bool | int | float | str)) and not str(name).startswith("_"):
            yield (*above, str(name)), value


def resolved_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as an engine reports them."""
    return {PREFIX + ".".join(path): value for path, value in leaves(settings)}
