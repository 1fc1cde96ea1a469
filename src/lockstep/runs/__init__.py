"""The run directory: one place for what a run was, did and proved. Reading one needs no torch."""
