"""What crosses a process boundary: tokens, semantics, versions, verdicts. Torch-free and numpy-free (see tokens.py)."""
