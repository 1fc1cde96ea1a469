"""One module for each kind of file that a trajectory is read from."""
