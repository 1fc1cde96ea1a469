"""Takes a disagreement apart."""
