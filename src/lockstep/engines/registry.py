"""From a recipe's ``[engine]`` to a running engine. Adapters are imported only when they are chosen."""

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from lockstep.config.recipe import EngineConfig
from lockstep.engines.audit import Checklist
from lockstep.engines.base import Engine, EngineFacts, EngineSpec
from lockstep.engines.environments.in_place import in_place
from lockstep.engines.environments.locate import Environment, find, installed
from lockstep.errors import RecipeError, UsageError

EMBEDDED = {
    "transformers": "lockstep.engines.transformers:TransformersEngine",
    "openai": "lockstep.engines.openai_http:connect",
}
"""Engines that need no environment: one in this process, one behind a URL."""

ADAPTERS = {
    ("vllm", "V0"): "lockstep.engines.vllm.v0:VllmV0",
    ("vllm", "V1"): "lockstep.engines.vllm.v1:VllmV1",
}
"""Adapters of engines with an environment of their own, by name and generation."""

PREFERRED = "vllm"
"""What ``auto`` takes where an environment of it is installed."""

KEYED = {"openai": "lockstep.engines.openai_http.options:options_of"}
"""Engines that are sent a key: what refuses options that cannot be, given them and the key's variable."""

CHECKLISTS = {PREFERRED: "lockstep.engines.vllm.knobs:CHECKLIST"}
"""What one who comes from an engine has to look at (``audit.py``), of those that have such a list."""

REFUSALS = {PREFERRED: "lockstep.engines.vllm.served:refuse_options"}
"""What refuses options of other engines, given them."""


NAMES = ("auto", *sorted({*EMBEDDED, *(name for name, _ in ADAPTERS)}))
"""What ``engine.name`` may be."""


@dataclass(frozen=True)
class Choice:
    """Which engine a recipe comes to here, and why."""

    name: str
    environment: Environment | None
    reason: str


def choose(config: EngineConfig, api_key_env: str = "") -> Choice:
    """Resolve ``auto`` and find the environment. No engine is started, and nothing is sent.

    Args:
        api_key_env: the variable that the command line confirmed as holding a server's key.

    Raises:
        NotInstalledError: when the engine asked for is not installed; the hint is the install line.
        RecipeError: for an engine that nobody knows.
        UsageError: for options of a server that cannot be, or an option that would run a checkpoint's code.
    """
    if config.name not in NAMES:
        near = difflib.get_close_matches(config.name, NAMES, n=1)
        expected = f"one of {', '.join(NAMES)}"
        hint = f"--set engine.name={near[0] if near else 'auto'}"
        raise RecipeError("recipe, key engine.name", got=repr(config.name), expected=expected, hint=hint)
    if config.name in KEYED:
        _named(KEYED[config.name])(config.options, api_key_env)
    elif api_key_env:
        expected = "an engine over HTTP: no other is sent a key"
        hint = "leave --api-key-env out"
        raise UsageError(
            "flag --api-key-env", got=f"it with engine.name = {config.name!r}", expected=expected, hint=hint
        )
    if config.name in EMBEDDED:
        return Choice(config.name, None, "asked for")
    name = PREFERRED if config.name == "auto" else config.name
    if name in REFUSALS:
        _named(REFUSALS[name])(config.options)
    if config.python:
        return Choice(name, in_place(config.python, config.version), "engine.python: used where it is")
    if config.version or name == config.name:
        return Choice(name, find(name, config.version or None), "asked for")
    environments = [environment for environment in installed() if environment.name == name]
    if environments:
        return Choice(name, environments[-1], "auto: the newest installed vLLM")
    return Choice("transformers", None, "auto: no vLLM environment is installed")


def launch(choice: Choice, spec: EngineSpec) -> Engine:
    """Begin to start the chosen engine.

    It can be closed at any time, and used once its ``wait_ready`` has returned.
    """
    if choice.environment is None:
        return _named(EMBEDDED[choice.name])(spec)
    return _named(ADAPTERS[choice.environment.name, choice.environment.generation])(spec, choice.environment)


def facts_of(choice: Choice) -> EngineFacts:
    """What the chosen engine's adapter declares, before anything is started."""
    if choice.environment is None:
        return EngineFacts()
    adapter: Any = _named(ADAPTERS[choice.environment.name, choice.environment.generation])
    return adapter.facts


def checklist() -> Checklist:
    """The migration checklist of the preferred engine, which is the one that people come from."""
    return cast(Checklist, _named(CHECKLISTS[PREFERRED]))


def start(choice: Choice, spec: EngineSpec) -> Engine:
    """Start the chosen engine; returns when it can sample, and leaves nothing behind when it cannot."""
    engine = launch(choice, spec)
    try:
        engine.wait_ready()
    except BaseException:
        engine.close()
        raise
    return engine


def _named(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
