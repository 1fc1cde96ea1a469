"""The five layers, in the order in which they are run."""
