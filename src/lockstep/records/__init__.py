"""What crosses a boundary: tokens, samples, semantics, versions, verdicts.

Torch-free; all but samples numpy-free too.
"""
