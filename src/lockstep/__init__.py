"""Lockstep: online RL for language models in which every rollout log-probability is proven before it is trained on."""

__version__ = "0.1.0"
