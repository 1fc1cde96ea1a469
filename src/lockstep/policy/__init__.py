"""The trainer's model, and the only shift, temperature and log-softmax of the project."""
