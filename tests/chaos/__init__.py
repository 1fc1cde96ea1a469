"""What a run must stand: a full disk, a lost flush, a kill."""
