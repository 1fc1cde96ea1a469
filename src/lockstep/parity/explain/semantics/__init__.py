"""Layer 1: which distribution, which tokens."""
