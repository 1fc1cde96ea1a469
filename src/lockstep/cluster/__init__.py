"""More processes than one: a trainer's ranks."""
