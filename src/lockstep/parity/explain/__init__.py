"""Names the cause of a gap: everything that fits, tries and tells."""
