"""The process in an engine's own environment: standard library, msgspec and the engine itself, no more."""
