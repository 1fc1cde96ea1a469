"""The process that runs inside an engine's own environment: standard library, msgspec and the engine itself, nothing else."""
