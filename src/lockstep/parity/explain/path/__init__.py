"""Layer 2: the way through the engine."""
