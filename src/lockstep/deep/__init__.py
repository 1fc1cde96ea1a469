"""What ``--depth full`` adds: factors of the path, updates in flight, directions of the gap."""
