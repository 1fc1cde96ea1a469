"""Where a run's records go: one file for each sink. JSONL is the one that resume and every reader take them from."""
