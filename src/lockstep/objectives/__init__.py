"""Losses as pure functions of log-probabilities and advantages: no model, no engine, no state."""
