"""Layer 3: which tensor, which setting of the model."""
