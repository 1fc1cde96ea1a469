"""An engine version in a Python environment of its own, built from a recipe that is a data file."""
