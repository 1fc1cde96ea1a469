"""From a recipe's ``[engine]`` to a running engine. Adapters are imported only when they are chosen."""

from dataclasses import dataclass

from lockstep.config.recipe import Engine as EngineConfig
from lockstep.engines.base import Engine, EngineSpec
from lockstep.engines.environments.locate import Environment, find, installed
from lockstep.errors import NotInstalledError


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
    if config.name == "transformers":
        return Choice("transformers", None, "asked for")
    if config.name == "vllm":
        return Choice("vllm", find("vllm", config.version or None), "asked for")
    newest = max((e for e in installed() if e.name == "vllm"), key=lambda e: _order(e.version), default=None)
    if newest is not None:
        return Choice("vllm", newest, "auto: the newest installed vLLM")
    return Choice("transformers", None, "auto: no vLLM environment is installed")


def start(choice: Choice, spec: EngineSpec) -> Engine:
    """Start the chosen engine; returns when it can sample."""
    if choice.name == "transformers":
        from lockstep.engines.transformers import TransformersEngine

        return TransformersEngine(spec)
    assert choice.environment is not None
    if choice.environment.generation != "V1":
        raise NotInstalledError(
            f"engine vllm {choice.environment.version}",
            got=f"generation {choice.environment.generation}",
            expected="V1, the one generation this version of lockstep drives",
            hint="lockstep engines install vllm==0.32.0",
        )
    from lockstep.engines.vllm.v1 import VllmV1

    return VllmV1(spec, choice.environment)


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
