"""From a recipe's ``[engine]`` to a running engine. Adapters are imported only when they are chosen."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from lockstep.config.recipe import Engine as EngineConfig
from lockstep.engines.base import Engine, EngineSpec
from lockstep.engines.environments.locate import Environment, find, installed
from lockstep.errors import UsageError

EMBEDDED = {
    "transformers": "lockstep.engines.transformers:TransformersEngine",
    "openai": "lockstep.engines.openai_http:connect",
}
"""Engines that need no environment: one in this process, one behind a URL."""

ADAPTERS = {
    ("vllm", "V0"): "lockstep.engines.vllm.v0:VllmV0",
    ("vllm", "V1"): "lockstep.engines.vllm.v1:VllmV1",
}
"""Of engines with an environment of their own, by name and generation."""


@dataclass(frozen=True)
class Choice:
    """Which engine a recipe comes to here, and why."""

    name: str
    environment: Environment | None
    reason: str


def choose(config: EngineConfig, api_key_env: str = "") -> Choice:
    """Resolve ``auto`` and find the environment. Nothing is started, and nothing is sent.

    Args:
        api_key_env: the variable that the command line confirmed as holding a server's key.

    Raises:
        NotInstalledError: when the engine asked for is not installed; the hint is the install line.
        UsageError: for options of a server that cannot be, or an option that would run a checkpoint's own code.
    """
    if config.name == "openai":
        from lockstep.engines.openai_http.options import options_of

        options_of(config.options, api_key_env)
    elif api_key_env:
        expected, hint = "an engine over HTTP: no other is sent a key", "leave --api-key-env out"
        raise UsageError("flag --api-key-env", got=f"it with engine.name = {config.name!r}", expected=expected, hint=hint)
    if config.name in EMBEDDED:
        return Choice(config.name, None, "asked for")
    from lockstep.engines.vllm.served import refuse_options

    refuse_options(config.options)
    if config.name == "vllm":
        return Choice("vllm", find("vllm", config.version or None), "asked for")
    vllms = [environment for environment in installed() if environment.name == "vllm"]
    if vllms:
        return Choice("vllm", vllms[-1], "auto: the newest installed vLLM")
    return Choice("transformers", None, "auto: no vLLM environment is installed")


def launch(choice: Choice, spec: EngineSpec) -> Engine:
    """Begin to start the chosen engine. It can be closed at any time, and used once its ``wait_ready`` has returned."""
    if choice.environment is None:
        return _made_by(EMBEDDED[choice.name])(spec)
    return _made_by(ADAPTERS[choice.environment.name, choice.environment.generation])(spec, choice.environment)


def start(choice: Choice, spec: EngineSpec) -> Engine:
    """Start the chosen engine; returns when it can sample, and leaves nothing behind when it cannot."""
    engine = launch(choice, spec)
    try:
        engine.wait_ready()
    except BaseException:
        engine.close()
        raise
    return engine


def _made_by(name: str) -> Callable[..., Engine]:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
