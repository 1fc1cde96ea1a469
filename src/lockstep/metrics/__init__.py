"""Every figure Lockstep reports: what it is called, what it is, and how it is computed."""
