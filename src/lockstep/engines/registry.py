"""From a recipe's ``[engine]`` to a running engine. Adapters are imported only when they are chosen."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from lockstep.config.recipe import Engine as EngineConfig
from lockstep.engines.base import Engine, EngineSpec
from lockstep.engines.environments.locate import Environment, find, installed

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


def choose(config: EngineConfig) -> Choice:
    """Resolve ``auto`` and find the environment. Nothing is started.

    Raises:
        NotInstalledError: when the engine asked for is not installed; the hint is the install line.
    """
    if config.name in EMBEDDED:
        return Choice(config.name, None, "asked for")
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
