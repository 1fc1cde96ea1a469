"""Lockstep's objectives beside the peers' own code, in an environment of its own: ``make peers``."""
