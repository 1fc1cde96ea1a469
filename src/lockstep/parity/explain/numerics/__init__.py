"""Layer 4: which arithmetic."""
