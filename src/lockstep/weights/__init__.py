"""How weights travel from the trainer to an engine."""
