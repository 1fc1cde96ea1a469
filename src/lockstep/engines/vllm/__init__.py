"""vLLM, one adapter per engine generation; each knows its version's facts."""
