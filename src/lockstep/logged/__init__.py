"""Logs of others, without an engine."""
