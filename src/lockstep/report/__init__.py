"""From runs to what people read: trajectories compared, and one page a run. No torch."""
